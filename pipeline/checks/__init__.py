"""Checks that preprocessing, centres and stored targets are those of the teacher.

May be imported by the run, ``plan``, ``centers.build`` and the commands.
"""
