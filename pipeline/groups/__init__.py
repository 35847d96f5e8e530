"""Primary groups, secondary mass and draws of a prediction, from logits that are never all held.

May be imported by ``checks``, ``plan`` and the run.
"""
