"""The results of a dry run, against counts by hand and against real steps."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import DrawsSpec, View
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.checkpoint import student_backbone
from gkd.trainer.config_file import load_config
from gkd.trainer.data.dataset import FaceBatches, join_targets
from gkd.trainer.data.loader import BatchLoader
from gkd.trainer.dry_run import (
    PeakBytes,
    activation_bytes,
    backbone_flops,
    class_layer_bytes,
    dry_run,
    optimizer_bytes,
)
from gkd.trainer.state import RunState
from tests.trainer.faces import load, small_config, write_cache


def test_parameters_and_steps_by_hand(faces: Path) -> None:
    records = open_records(faces / "faces")
    cost = dry_run(load_config(None, ["train.batch_size=8", "kd.enabled=false"]), records, None)
    # MobileFaceNet of arcface_torch at scale 2 with 512 numbers has 2,059,520; the 512 weights
    # of its last BatchNorm are not trained.
    assert cost.parameters == {"backbone": 2059520, "head": 6 * 512, "trainable": 2059520 + 2560}
    assert (cost.images, cost.classes) == (42, 6)
    assert (cost.steps_per_epoch, cost.epochs, cost.total_steps) == (5, 20, 100)
    assert cost.memory["class_centers"] == 6 * 512 * 4
    assert cost.memory["gradients"] == 4 * (2059520 + 2560)
    assert cost.memory["optimizer_state"] == 4 * (2059520 + 2560)
    assert cost.memory_total == sum(cost.memory.values())
    assert cost.targets_bytes == 0
    # Four batches ahead for each worker, and three on their way.
    batches = min(4, usable_cores()) * 4 + 3
    assert cost.shared_memory == batches * 8 * (112 * 112 * 3 + 64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("optimizer.momentum=0", "optimizer.nesterov=false"), 0),
        ((), 4 * 130),
        # AdamW: two moments of every number, and a step counter of float32 a tensor.
        (("optimizer.kind=adamw",), 2 * 4 * 130 + 2 * 4),
    ],
)
def test_optimizer_state_by_hand(settings: tuple[str, ...], expected: int) -> None:
    parameters = list(nn.Linear(12, 10).parameters())
    assert optimizer_bytes(load_config(None, settings), parameters) == expected


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_operations_are_the_sum_over_layers(name: str) -> None:
    model = student_backbone(small_config(f"student.name={name}", "student.width=0.25").student)
    counted = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal counted
        match layer:
            case nn.Conv2d():
                products = layer.weight[0].numel()
            case nn.Linear():
                products = layer.in_features
            case _:
                return
        counted += 2 * out[0].numel() * products

    cost = backbone_flops(model)
    for layer in model.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 112, 112))
    assert cost == counted


def test_operations_of_a_transformer_by_hand() -> None:
    """Nine patches of 64 channels, twelve blocks; the two products of attention count too."""
    settings = small_config("student.name=vit_t", "student.width=0.25", "student.embedding_dim=8")
    patches, channels = 9, 64
    attention = 2 * patches * patches * channels
    block = patches * channels * channels * (3 + 1 + 4 + 4) + attention
    embedding = patches * 3 * 81 * channels
    feature = patches * channels * channels + channels * 8
    expected = 2 * (embedding + 12 * block + feature)
    assert backbone_flops(student_backbone(settings.student)) == expected


def test_activations_by_hand() -> None:
    """The input and the ReLU's output: each is saved twice and counted once."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    pixels = 112 * 112
    expected = 7 * 4 * pixels * (3 + 4)
    assert activation_bytes(model, 7, torch.float32, last=False) == expected


def test_the_class_layer_grows_linearly() -> None:
    config = load_config(None, ["student.embedding_dim=32"])
    sizes = [class_layer_bytes(config, 16, classes) for classes in (4096, 8192, 12288)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
    assert sizes[0] < 20 * 4 * 4096 * (16 + 32)


def test_the_peak_counts_each_storage_while_it_lives() -> None:
    with PeakBytes() as peak:
        first = torch.ones(1000)
        second = first.view(10, 100) + 1
        second.mul_(2)
        del first
        third = second * second
        del second, third
    assert peak.highest == 8000
    assert peak.now == 0


@pytest.mark.parametrize("settings", [(), ("optimizer.kind=adamw",), ("train.precision=bfloat16",)])
def test_a_real_step_takes_the_predicted_memory(faces: Path, settings: tuple[str, ...]) -> None:
    records = open_records(faces / "faces")
    config = small_config(
        *("student.width=0.25", "student.input_size=56", "kd.enabled=false", *settings)
    )
    cost = dry_run(config, records, None)
    state = RunState(config, records, None)
    batches = BatchLoader(
        FaceBatches(records, None, temperature=4.0), state.sampler, workers=0, pin=False
    )
    first, second = next(batches), next(batches)
    with PeakBytes() as peak:
        state.take_step(first, records)
        state.take_step(second, records)
    persistent = cost.memory["backbone_weights"] + cost.memory["class_centers"]
    assert peak.highest == pytest.approx(cost.memory_total - persistent, rel=0.05)


@pytest.mark.parametrize("order", ["full", "blocks"])
def test_targets_take_as_much_as_their_files(faces: Path, tmp_path: Path, order: str) -> None:
    config = small_config(f"data.order={order}", "data.block_shards=1")
    records, joined = join_targets(
        *(open_records(faces / "faces"), Cache.open(faces / "targets.gkd")),
        workers=1,
        folder=tmp_path / "unused",
        order="blocks",
    )
    cost = dry_run(config, records, joined).targets_bytes
    assert not (tmp_path / "unused").exists()
    _, targets = load(faces)
    arrays = [np.load(path) for path in sorted(targets.store.path.glob("*.npy"))]  # type: ignore[union-attr]
    total = sum(array.nbytes for array in arrays)
    if order == "full":
        assert cost == total
    else:
        assert 0.5 * total < cost < total  # two shards of three, 16 + 16 of 42 samples


def test_sampled_centres_by_hand(faces: Path) -> None:
    """100,000 classes: eight labels and a tenth of the others, eight numbers each."""
    records = Subset(open_records(faces / "faces"), np.arange(42), 100_000)
    settings = ("kd.enabled=false", "data.empty_classes=keep")
    full, sampled = (
        dry_run(small_config(*settings, f"head.sample_rate={rate}"), records, None)
        for rate in (1, 0.1)
    )
    trained = 8 + 10_000
    assert sampled.memory["sampled_centers"] == 2 * 32 * trained  # centres and momentum
    saved = full.memory["gradients"] - sampled.memory["gradients"]
    assert saved == 32 * (100_000 - trained)
    assert full.flops_per_step - sampled.flops_per_step == 8 * 4 * 8 * (100_000 - trained)
    assert "sampled_centers" not in full.memory


@pytest.mark.parametrize("signal", ["auto", "draws", "hybrid", "group"])
def test_sampled_centres_are_those_of_the_signal_in_use(
    faces: Path, tmp_path: Path, signal: str
) -> None:
    """Five draws an image, more or fewer classes than its stored group."""
    records = open_records(faces / "faces")
    views: tuple[View, ...] = ("original", "flipped")
    write_cache(tmp_path / "drawn.gkd", records, views, DrawsSpec(5, 4.0, "all"))
    cache = Cache.open(tmp_path / "drawn.gkd")
    _, joined = join_targets(records, cache, workers=1, folder=tmp_path, order="blocks")
    many = Subset(records, np.arange(42), 100_000)
    settings = (f"kd.signal={signal}", "head.sample_rate=0.1", "data.empty_classes=keep")
    config = small_config(*settings)
    cost = dry_run(config, many, replace(joined, num_classes=100_000))
    sizes = [cache.read_shard(shard, view).sizes for shard in range(3) for view in views]
    stored = int(np.concatenate(sizes).sum()) / (2 * 42)
    assert 1 < stored < 6
    assert stored != 5
    entries = {"draws": 5, "hybrid": stored + 5, "group": stored}[
        "draws" if signal == "auto" else signal
    ]
    wanted = 8 + int(8 * entries)
    trained = wanted + math.ceil(0.1 * (100_000 - wanted))
    assert cost.memory["sampled_centers"] == 2 * 32 * trained


def test_it_refuses_what_a_training_refuses(faces: Path) -> None:
    records = open_records(faces / "faces")
    with pytest.raises(ConfigError, match="fewer than one batch of 64"):
        dry_run(small_config("train.batch_size=64", "kd.enabled=false"), records, None)
    with pytest.raises(ConfigError, match="no targets were given"):
        dry_run(small_config(), records, None)
    low = "kd.enabled=false", "train.precision=float16"
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        dry_run(small_config(*low, "train.device=cpu"), records, None)


def test_no_gpu_is_needed(faces: Path) -> None:
    settings = "kd.enabled=false", "train.precision=float16", "train.device=cuda"
    cost = dry_run(small_config(*settings), open_records(faces / "faces"), None)
    assert cost.precision == "float16"
