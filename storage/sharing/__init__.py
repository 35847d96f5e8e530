"""Caches at fsspec addresses: push, pull, and reading their metadata in place.

May be imported by the two stages and the commands.
"""
