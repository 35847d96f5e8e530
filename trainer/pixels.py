"""Images made a network's input, on its device."""

from collections.abc import Callable

import torch
from torch import Tensor

from gkd.storage.cache.spec import Preprocess


def network_input(preprocess: Preprocess, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Make a function that is ``Preprocess.apply`` on ``device``, to the same bits.

    Of RGB images uint8 [B, H, W, 3] it gives float32 [B, 3, H, W], in memory channels last.
    """
    # Made once: a step that copied them to a GPU would wait for it.
    scale = 1 / torch.tensor(preprocess.std, device=device)
    shift = -torch.tensor(preprocess.mean, device=device) * scale

    def apply(images: Tensor) -> Tensor:
        images = images.flip(3) if preprocess.bgr else images
        return images.mul(scale).add_(shift).permute(0, 3, 1, 2)

    return apply
