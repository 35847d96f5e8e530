"""Face images with labels, in every form that data sets are kept in.

May be imported by everything above it: ``cache``, ``reading``, ``analysis``, the two stages and
the commands. Imports only ``storage.util`` and ``storage.errors``.
"""
