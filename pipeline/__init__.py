"""Stage one: a teacher and its class centres in, a cache of targets out.

``run`` makes a cache, and ``build_centers`` a file of centres: ``embed`` turns records into
embeddings, ``shard`` these into shards, and ``ranks`` keeps the processes in step. Only the
commands and the demo import this package; it imports ``storage`` and never ``trainer``.
"""
