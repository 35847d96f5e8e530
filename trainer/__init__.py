"""Stage two: students, their losses, training, evaluation and export.

May be imported by the commands alone; imports ``storage`` and never ``pipeline``.
"""
