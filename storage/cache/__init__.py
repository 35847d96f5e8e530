"""The target cache on disk, format 1 (``storage/FORMAT.md``): spec, layout, writer and reader.

May be imported by ``reading``, ``sharing``, ``analysis``, the two stages and the commands.
Imports ``storage.records`` and ``storage.util``.
"""
