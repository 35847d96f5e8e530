"""Primary groups, secondary mass and draws of predictions whose logits are never all held.

``primary_group`` cuts the group, ``partition`` drives it. May be imported by ``checks``, ``plan``
and the run.
"""
