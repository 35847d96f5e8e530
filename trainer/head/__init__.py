"""The class layer: margins, centres, and the distillation loss, computed without dense logits.

``fused.grouped_margin_loss`` is the entry point. The loss on primary groups is in ``loss``, the
loss on drawn classes in ``drawn_loss``, the tensors that carry both in ``targets``.

May be imported by the loop and the dry run; ``targets`` and ``margin`` by all of the trainer.
"""
