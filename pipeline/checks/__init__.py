"""Checks that preprocessing, centres and stored targets are those of the teacher.

May be imported by ``run``, ``plan``, ``build_centers`` and the commands.
"""
