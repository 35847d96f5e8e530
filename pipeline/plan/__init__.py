"""``gkd plan``: what a cache will hold, cost and take, forecast from a sample.

May be imported by the commands alone.
"""
