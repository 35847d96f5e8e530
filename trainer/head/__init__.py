"""The class layer: margins, the distillation loss, and both fused without ever holding all logits.

May be imported by the loop and the dry run.
"""
