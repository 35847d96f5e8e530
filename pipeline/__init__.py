"""Stage one: a teacher and its class centres in, a cache of targets out.

May be imported by the commands alone; imports ``storage`` and never ``trainer``.
"""
