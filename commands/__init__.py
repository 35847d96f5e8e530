"""The commands of ``gkd``, one module a subject; ``gkd.cli`` puts them together."""
