"""Verification and identification protocols of face recognition, and the embeddings they need.

May be imported by the loop, ``report``, ``export`` and the commands.
"""
