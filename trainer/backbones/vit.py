"""ViT: transformers over patches of 9x9 pixels, without a class token.

In the form of arcface_torch (deepinsight/insightface: ``backbones/vit.py``), with its state-dict
keys. Training sees every patch in every step: neither masked patches nor stochastic depth.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gkd.trainer.backbones.common import INPUT_SIZES, Family, InputPool, Sizes, numbered, scaled

# Channels and blocks.
SHAPES: dict[str, tuple[int, int]] = {
    "vit_t": (256, 12),
    "vit_s": (512, 12),
    "vit_b": (512, 24),
    "vit_l": (768, 24),
}
PATCH = 9
HEADS = 8
MLP_RATIO = 4
FEATURE_EPS = 2e-5


class Attention(nn.Module):
    """Softmax attention among all patches, with ``HEADS`` heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, patches, channels], the same shape out."""
        batch, patches, channels = x.shape
        heads = self.qkv(x).reshape(batch, patches, 3, HEADS, channels // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # Not the fused function: torch does not count its operations.
        scores = (query @ key.transpose(-2, -1)) / math.sqrt(channels // HEADS)
        mixed = scores.softmax(dim=-1) @ value
        y: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, patches, channels))
        return y


class Mlp(nn.Module):
    """Linear, ReLU6, linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, patches, channels], the same shape out."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class Block(nn.Module):
    """Attention and then an MLP, each over a LayerNorm and added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, patches, channels], the same shape out."""
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PatchEmbed(nn.Module):
    """A linear map of each patch; incomplete patches at the right and lower edge are ignored."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, 3, H, W] to [B, patches, channels]."""
        x: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return x


class VisionTransformer(nn.Module):
    """Float images [B, 3, 112, 112] to un-normalised embeddings [B, embedding_dim].

    ``width`` multiplies the channels; ``input_size`` 56 or 28 pools the images first, which leaves
    fewer patches.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: int = 112,
    ) -> None:
        super().__init__()
        # A whole number of channels per head.
        channels = HEADS * scaled(channels // HEADS, width)
        patches = (input_size // PATCH) ** 2
        self.pool = InputPool(input_size)
        self.patch_embed = PatchEmbed(channels)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, channels))
        self.blocks = nn.ModuleList(Block(channels) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.senet: nn.Module | None = None  # of TransFace
        self.feature = nn.Sequential(
            nn.Linear(channels * patches, channels, bias=False),
            nn.BatchNorm1d(channels, eps=FEATURE_EPS),
            nn.Linear(channels, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=FEATURE_EPS),
        )
        # For masked patches, which are not used here; published files have it.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels), requires_grad=False)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, 3, 112, 112] to [B, embedding_dim]."""
        x = self.patch_embed(self.pool(images)) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.senet is not None:
            x = x * self.senet(x.flatten(1)).unsqueeze(2)
        embeddings: Tensor = self.feature(x.flatten(1))
        return embeddings


def _recognise(state: Mapping[str, Tensor]) -> str | None:
    """By depth, and among those of equal depth by the closest width."""
    if "pos_embed" not in state or state["pos_embed"].dim() != 3:
        return None
    depth, channels = numbered(state, "blocks.", ".attn.qkv.weight"), state["pos_embed"].shape[2]
    fits = {abs(c - channels): name for name, (c, blocks) in SHAPES.items() if blocks == depth}
    return fits[min(fits)] if fits else None


def _sizes(name: str, state: Mapping[str, Tensor]) -> Sizes:
    _, patches, channels = state["pos_embed"].shape
    sides = {(size // PATCH) ** 2: size for size in INPUT_SIZES}
    embedding_dim = state["feature.2.weight"].shape[0]
    return Sizes(embedding_dim, channels / SHAPES[name][0], sides.get(patches, INPUT_SIZES[0]))


def _adapt(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """TransFace (DanJun6737/TransFace: backbones/vit.py) weighs each patch by all of them."""
    if "senet.0.weight" in state and isinstance(module, VisionTransformer):
        _, patches, channels = module.pos_embed.shape
        module.senet = nn.Sequential(
            nn.Linear(channels * patches, patches, bias=False),
            nn.ReLU(),
            nn.Linear(patches, patches, bias=False),
            nn.Sigmoid(),
        )


FAMILY = Family(
    widths=dict.fromkeys(SHAPES, 1.0),
    build=lambda name, sizes: VisionTransformer(*SHAPES[name], **sizes._asdict()),
    recognise=_recognise,
    size_keys={"pos_embed": 3, "feature.2.weight": 2},
    sizes=_sizes,
    adapt=_adapt,
    optional=("num_batches_tracked", "mask_token"),
)
