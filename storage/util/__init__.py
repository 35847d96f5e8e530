"""Files, locks, threads, progress and pages: general helpers that know no face recognition.

May be imported by everything; imports only ``storage.errors``.
"""
