"""Face images with labels, in every form that people keep them in.

May be imported by everything above it: ``cache``, ``reading``, ``analysis``, the two stages and
the commands. Imports ``storage.util`` and ``storage.errors`` alone.
"""
