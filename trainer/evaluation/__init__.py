"""Verification and identification protocols of face recognition, and the embeddings they need.

A set of faces (``FaceSet``) knows how it is scored: ``embed.evaluate`` embeds it and scores it.
``protocols.load_set`` opens any of the sets that gkd knows.

May be imported by the loop, ``report``, ``export`` and the commands.
"""
