"""The teacher's class centres: read from published files, or computed as class means and refined.

May be imported by ``checks``, ``plan`` and the run; imports ``teacher``. Only ``build`` imports
``checks``.
"""
