"""Batches of face images with labels and targets, from records and a joined cache.

May be imported by the training loop, the dry run and the commands.
"""
