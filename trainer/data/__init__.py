"""Batches of face images with labels and targets, from records and a joined cache.

May be imported by ``head`` users, the loop and the dry run.
"""
