"""``gkd demo``: faces that it draws, and a whole run on them through the public commands.

May be imported by the commands alone; nothing of the product depends on drawn faces.
"""
