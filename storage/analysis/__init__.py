"""Analysis of a cache: statistics, label noise, confused identities.

May be imported by the two stages and the commands.
"""
