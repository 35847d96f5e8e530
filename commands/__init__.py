"""The commands of ``gkd``, one module per family; ``gkd.cli`` assembles them.

May be imported by ``gkd.cli`` alone. Heavy imports stay inside the commands: ``--help`` is fast.
"""
