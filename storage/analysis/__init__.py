"""What a cache says about its data: statistics, label noise, confused identities.

May be imported by the two stages and the commands.
"""
