"""``gkd plan``: the groups, size and time of a cache, forecast from a sample.

May be imported by the commands only.
"""
