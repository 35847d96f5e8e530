"""A cache as training reads it: joined to records by digest, and mapped into memory.

May be imported by ``sharing``, ``analysis``, the two stages and the commands.
"""
