"""A cache as training reads it: joined to records by digest, mapped into memory, collected.

May be imported by ``sharing``, ``analysis``, the two stages and the commands.
"""
