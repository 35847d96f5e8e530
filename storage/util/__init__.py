"""Files, locks, threads, progress and pages: what any layer needs and nothing of face recognition.

May be imported by everything; imports ``storage.errors`` alone.
"""
