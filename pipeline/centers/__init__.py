"""The teacher's class centres: read from published files, or computed as class means and refined.

May be imported by ``checks``, ``plan``, ``build_centers`` and ``run``; imports ``teacher``.
"""
