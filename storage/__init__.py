"""What gkd keeps on disk: records, caches of targets, and how both are read and shared.

Numpy alone; torch is loaded only where a file of torch's is read. ``errors`` may be imported by
every module of the package; nothing here imports ``pipeline``, ``trainer`` or ``commands``.
"""
