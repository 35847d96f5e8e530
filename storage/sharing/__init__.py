"""Caches at other addresses: pushed, pulled and looked at where they are.

May be imported by the two stages and the commands.
"""
