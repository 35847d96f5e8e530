"""Published networks as lists of key names and shapes, and as plain functions of such a dict.

Written from the published layouts: numpy, torch and nothing of gkd. ``w`` multiplies the channels.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = Mapping[str, Tensor]

IRESNETS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
MOBILES = {"mobilefacenet": ((1, 4, 6, 2), 2), "mbf_large": ((2, 8, 12, 4), 4)}
VITS = {"vit_t": (256, 12), "vit_s": (512, 12), "vit_b": (512, 24), "vit_l": (768, 24)}
IRS: dict[str, tuple[tuple[int, ...], dict[str, bool]]] = {
    "ir_18": ((2, 2, 2, 2), {}),
    "ir_34": ((3, 4, 6, 3), {}),
    "ir_50": ((3, 4, 14, 3), {}),
    "ir_101": ((3, 13, 30, 3), {}),
    "ir_152": ((3, 8, 36, 3), {"bottleneck": True}),
    "ir_200": ((3, 24, 36, 3), {"bottleneck": True}),
    "ir_se_50": ((3, 4, 14, 3), {"se": True}),
    "ir_se_101": ((3, 13, 30, 3), {"se": True}),
    "ir_se_152": ((3, 8, 36, 3), {"bottleneck": True, "se": True}),
    "ir_se_200": ((3, 24, 36, 3), {"bottleneck": True, "se": True}),
    "evolve_ir_50": ((3, 4, 14, 3), {"evolve": True}),
    "evolve_ir_101": ((3, 13, 30, 3), {"evolve": True}),
    "evolve_ir_152": ((3, 8, 36, 3), {"evolve": True}),
    "evolve_ir_se_50": ((3, 4, 14, 3), {"evolve": True, "se": True}),
    "evolve_ir_se_101": ((3, 13, 30, 3), {"evolve": True, "se": True}),
    "evolve_ir_se_152": ((3, 8, 36, 3), {"evolve": True, "se": True}),
}
DIM = 24
IMAGES = torch.from_numpy(np.random.default_rng(5).normal(size=(2, 3, 112, 112))).float()


def published(name: str, *, small: bool = False) -> Shapes:
    """Names and shapes as published, or of the same network with few channels."""
    dim = DIM if small else 512
    if name in IRESNETS:
        return iresnet_shapes(IRESNETS[name], 1 / 8 if small else 1, dim)
    if name in MOBILES:
        large, scale = MOBILES[name]
        return mobilefacenet_shapes(large, 1 if small else scale, dim)
    if name in VITS:
        channels, depth = VITS[name]
        return vit_shapes(16 if small else channels, depth, dim)
    blocks, form = IRS[name]
    return ir_shapes(blocks, 1 / 8 if small else 1, dim, **form)


def norm(key: str, channels: int, *, affine: bool = True) -> Shapes:
    learned = {f"{key}.weight": (channels,), f"{key}.bias": (channels,)} if affine else {}
    return {
        **learned,
        f"{key}.running_mean": (channels,),
        f"{key}.running_var": (channels,),
        f"{key}.num_batches_tracked": (),
    }


def iresnet_shapes(blocks: tuple[int, ...], w: float = 1, dim: int = 512, side: int = 7) -> Shapes:
    c = [int(channels * w) for channels in (64, 64, 128, 256, 512)]
    shapes: Shapes = {"conv1.weight": (c[0], 3, 3, 3), **norm("bn1", c[0]), "prelu.weight": (c[0],)}
    for stage in range(4):
        for i in range(blocks[stage]):
            key, out = f"layer{stage + 1}.{i}", c[stage + 1]
            into = c[stage] if i == 0 else out
            shapes |= norm(f"{key}.bn1", into) | {f"{key}.conv1.weight": (out, into, 3, 3)}
            shapes |= norm(f"{key}.bn2", out) | {f"{key}.prelu.weight": (out,)}
            shapes |= {f"{key}.conv2.weight": (out, out, 3, 3)} | norm(f"{key}.bn3", out)
            if i == 0:
                shapes[f"{key}.downsample.0.weight"] = (out, into, 1, 1)
                shapes |= norm(f"{key}.downsample.1", out)
    shapes |= norm("bn2", c[4])
    shapes |= {"fc.weight": (dim, c[4] * side * side), "fc.bias": (dim,)} | norm("features", dim)
    return shapes


def mobilefacenet_shapes(blocks: tuple[int, ...], scale: float, dim: int = 512) -> Shapes:
    shapes: Shapes = {}

    def unit(key: str, out: int, into: int, kernel: int = 1, *, active: bool = True) -> None:
        shapes[f"{key}.layers.0.weight"] = (out, into, kernel, kernel)
        shapes.update(norm(f"{key}.layers.1", out))
        if active:
            shapes[f"{key}.layers.2.weight"] = (out,)

    def bottleneck(key: str, into: int, out: int, hidden: int) -> None:
        unit(f"{key}.layers.0", hidden, into)
        unit(f"{key}.layers.1", hidden, 1, 3)
        unit(f"{key}.layers.2", out, hidden, active=False)

    a, b = int(64 * scale), int(128 * scale)
    unit("layers.0", a, 3, 3)
    if blocks[0] == 1:
        unit("layers.1", a, a // 64, 3)
    for i in range(blocks[0] if blocks[0] > 1 else 0):
        bottleneck(f"layers.1.layers.{i}", a, a, 128)
    for index, (into, out, hidden, inner), times in (
        (2, (a, a, 128, 128), blocks[1]),
        (4, (a, b, 256, 256), blocks[2]),
        (6, (b, b, 512, 256), blocks[3]),
    ):
        bottleneck(f"layers.{index}", into, out, hidden)
        for i in range(times):
            bottleneck(f"layers.{index + 1}.layers.{i}", out, out, inner)
    unit("conv_sep", 512, b)
    unit("features.layers.0", 512, 1, 7, active=False)
    return shapes | {"features.layers.2.weight": (dim, 512)} | norm("features.layers.3", dim)


def vit_shapes(channels: int, depth: int, dim: int = 512, patches: int = 144) -> Shapes:
    shapes: Shapes = {
        "pos_embed": (1, patches, channels),
        "mask_token": (1, 1, channels),
        "patch_embed.proj.weight": (channels, 3, 9, 9),
        "patch_embed.proj.bias": (channels,),
    }
    for i in range(depth):
        for key in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{key}.{name}": (channels,) for name in ("weight", "bias")}
        shapes[f"blocks.{i}.attn.qkv.weight"] = (3 * channels, channels)
        for key, out, into in (
            ("attn.proj", channels, channels),
            ("mlp.fc1", 4 * channels, channels),
            ("mlp.fc2", channels, 4 * channels),
        ):
            shapes[f"blocks.{i}.{key}.weight"] = (out, into)
            shapes[f"blocks.{i}.{key}.bias"] = (out,)
    shapes |= {"norm.weight": (channels,), "norm.bias": (channels,)}
    shapes["feature.0.weight"] = (channels, channels * patches)
    shapes |= norm("feature.1", channels) | {"feature.2.weight": (dim, channels)}
    return shapes | norm("feature.3", dim)


def ir_shapes(
    blocks: tuple[int, ...],
    w: float = 1,
    dim: int = 512,
    side: int = 7,
    *,
    bottleneck: bool = False,
    se: bool = False,
    evolve: bool = False,
) -> Shapes:
    wide = 4 if bottleneck else 1
    c = [int(64 * w), *(int(channels * w * wide) for channels in (64, 128, 256, 512))]
    shapes: Shapes = {"input_layer.0.weight": (c[0], 3, 3, 3), **norm("input_layer.1", c[0])}
    shapes["input_layer.2.weight"] = (c[0],)
    index = 0
    for stage in range(4):
        for i in range(blocks[stage]):
            key, out = f"body.{index}.res_layer", c[stage + 1]
            into, index = (c[stage] if i == 0 else out), index + 1
            shapes |= norm(f"{key}.0", into)
            inner = out // wide
            if bottleneck:
                shapes |= {f"{key}.1.weight": (inner, into, 1, 1)} | norm(f"{key}.2", inner)
                shapes[f"{key}.3.weight"] = (inner,)
                shapes |= {f"{key}.4.weight": (inner, inner, 3, 3)} | norm(f"{key}.5", inner)
                shapes[f"{key}.6.weight"] = (inner,)
                shapes |= {f"{key}.7.weight": (out, inner, 1, 1)} | norm(f"{key}.8", out)
            elif evolve:
                shapes |= {f"{key}.1.weight": (out, into, 3, 3), f"{key}.2.weight": (out,)}
                shapes |= {f"{key}.3.weight": (out, out, 3, 3)} | norm(f"{key}.4", out)
            else:
                shapes |= {f"{key}.1.weight": (out, into, 3, 3)} | norm(f"{key}.2", out)
                shapes |= {f"{key}.3.weight": (out,), f"{key}.4.weight": (out, out, 3, 3)}
                shapes |= norm(f"{key}.5", out)
            if se:
                squeeze = f"{key}.5" if evolve else f"{key}.se_block"
                shapes[f"{squeeze}.fc1.weight"] = (max(1, out // 16), out, 1, 1)
                shapes[f"{squeeze}.fc2.weight"] = (out, max(1, out // 16), 1, 1)
            if into != out:
                shortcut = f"body.{index - 1}.shortcut_layer"
                shapes |= {f"{shortcut}.0.weight": (out, into, 1, 1)} | norm(f"{shortcut}.1", out)
    shapes |= norm("output_layer.0", c[4])
    shapes |= {"output_layer.3.weight": (dim, c[4] * side * side), "output_layer.3.bias": (dim,)}
    return shapes | norm("output_layer.4", dim, affine=evolve)


def filled(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random values of a size that leaves activations near one."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            state[key] = torch.rand(shape, generator=generator) * 0.5 + 0.5
        else:
            fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 16
            state[key] = torch.randn(shape, generator=generator) / fan**0.5
    return state


def bn(state: State, key: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    weight, bias = state.get(f"{key}.weight"), state.get(f"{key}.bias")
    mean, variance = state[f"{key}.running_mean"], state[f"{key}.running_var"]
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


def vit(state: State, images: Tensor, heads: int = 8) -> Tensor:
    def linear(key: str, x: Tensor) -> Tensor:
        y: Tensor = x @ state[f"{key}.weight"].T
        return y + state[f"{key}.bias"] if f"{key}.bias" in state else y

    def layer_norm(key: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    proj = "patch_embed.proj"
    x = F.conv2d(images, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=9)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    size = x.shape[2] // heads
    for i in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        key = f"blocks.{i}"
        q, k, v = linear(f"{key}.attn.qkv", layer_norm(f"{key}.norm1", x)).chunk(3, dim=-1)
        mixed = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = q[..., own] @ k[..., own].transpose(1, 2) * size**-0.5
            mixed.append(torch.softmax(scores, -1) @ v[..., own])
        x = x + linear(f"{key}.attn.proj", torch.cat(mixed, -1))
        hidden = linear(f"{key}.mlp.fc1", layer_norm(f"{key}.norm2", x)).clamp(0, 6)
        x = x + linear(f"{key}.mlp.fc2", hidden)
    x = linear("feature.0", layer_norm("norm", x).flatten(1))
    return bn(state, "feature.3", linear("feature.2", bn(state, "feature.1", x, 2e-5)), 2e-5)


def ir(state: State, images: Tensor, blocks: tuple[int, ...]) -> Tensor:
    x = F.conv2d(images, state["input_layer.0.weight"], padding=1)
    x = F.prelu(bn(state, "input_layer.1", x), state["input_layer.2.weight"])
    strides = [2 if i == 0 else 1 for times in blocks for i in range(times)]
    for index, stride in enumerate(strides):
        shortcut = x[:, :, ::stride, ::stride]
        key = f"body.{index}.shortcut_layer"
        if f"{key}.0.weight" in state:
            shortcut = bn(state, f"{key}.1", F.conv2d(shortcut, state[f"{key}.0.weight"]))
        x = _res_layer(state, f"body.{index}.res_layer", x, stride) + shortcut
    x = bn(state, "output_layer.0", x).flatten(1)
    x = x @ state["output_layer.3.weight"].T + state["output_layer.3.bias"]
    return bn(state, "output_layer.4", x)


def _res_layer(state: State, key: str, x: Tensor, stride: int) -> Tensor:
    """The layers in order, by the tensors of each; the last convolution has the stride."""
    weights = {i: state.get(f"{key}.{i}.weight") for i in range(9)}
    last = max(i for i, weight in weights.items() if weight is not None and weight.dim() == 4)
    for i, weight in weights.items():
        if f"{key}.{i}.running_mean" in state:
            x = bn(state, f"{key}.{i}", x)
        elif weight is not None and weight.dim() == 1:
            x = torch.where(x > 0, x, x * weight.view(-1, 1, 1))
        elif weight is not None:
            step = stride if i == last else 1
            x = F.conv2d(x, weight, stride=step, padding=weight.shape[2] // 2)
    for squeeze in (f"{key}.5", f"{key}.se_block"):
        if f"{squeeze}.fc1.weight" in state:
            mean = x.mean((2, 3))
            inner = torch.relu(mean @ state[f"{squeeze}.fc1.weight"].flatten(1).T)
            x = (
                x
                * torch.sigmoid(inner @ state[f"{squeeze}.fc2.weight"].flatten(1).T)[
                    ..., None, None
                ]
            )
    return x


Forward = Callable[[State, Tensor], Tensor]
