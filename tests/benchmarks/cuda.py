"""What runs on a GPU: the class layer, a student's step, the partition, and both stages whole.

``python -m tests.benchmarks.cuda`` needs a GPU, and for the stages the LFW pack. Each time is the
least of some alternating rounds, of the host and the device together; of `cache-teacher` it is
one run's, of `train-student` the median of its log's windows. The teacher is an IResNet-50 in
bfloat16 whose weights are random, its BatchNorm statistics those of faces; 93,431 classes, whose
centres are the means of LFW's identities and random beyond.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gkd.pipeline.centers.load import Centers
from gkd.pipeline.embed import ACCELERATOR_BATCH
from gkd.pipeline.groups.partition import partition
from gkd.pipeline.run import cache_teacher
from gkd.pipeline.settings import DRAWS, CacheSettings, PartitionSettings
from gkd.pipeline.teacher.torch_embedder import TorchEmbedder
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.records.base import Records, Subset
from gkd.storage.records.open import open_records
from gkd.storage.util.torchrun_env import usable_cores
from gkd.trainer.backbones import build_backbone
from gkd.trainer.config_file import load_config
from gkd.trainer.data.dataset import join_targets
from gkd.trainer.logging import METRICS
from gkd.trainer.loop import train
from tests.benchmarks import student_step
from tests.benchmarks.fused_head import NUM_CLASSES, WEBFACE42M, Layer, random_targets
from tests.benchmarks.harness import report
from tests.benchmarks.partition import DRAWN, SHARP, sorted_softmax, teacher_like, teacher_logits
from tests.paths import SHARED_DATA
from tests.pipeline.given_logits import partition_logits

ROUNDS = 20
STEP_BATCH = 128
IMAGES = 40_000
MEGABYTE, GIGABYTE = 1e6, 2**30


def seconds(works: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Least time of each, host and device, after one go that is not counted."""
    best = dict.fromkeys(works, float("inf"))
    for counted in range(rounds + 1):
        for name, work in works.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if counted:
                best[name] = min(best[name], time.perf_counter() - began)
    shown = {name: f"{value * 1e3:.2f} ms" for name, value in best.items()}
    print(shown, file=sys.stderr, flush=True)
    return best


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak memory of a function above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def class_layer(device: torch.device) -> dict[str, float]:
    layer = Layer(NUM_CLASSES, device.type)
    groups = {mean: random_targets(NUM_CLASSES, mean, layer.labels) for mean in (19, 2000)}
    few, many = (targets.to(device) for targets in groups.values())

    def plain_bfloat16() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            layer.plain()

    took = seconds(
        {
            "products": layer.products,
            "plain": layer.plain,
            "plain, bfloat16": plain_bfloat16,
            "fused": partial(layer.fused, few),
            "fused, groups of 2,000": partial(layer.fused, many),
            "compiled": partial(layer.fused, few, compiled=True),
        }
    )
    gradient = layer.centers.nbytes
    extra = {}
    for name, work in (("plain", layer.plain), ("fused", partial(layer.fused, few))):
        layer.forget()
        extra[name] = (peak_bytes(work) - gradient) / MEGABYTE
    return {
        "class layer, fused / three products": took["fused"] / took["products"],
        "class layer, compiled / three products": took["compiled"] / took["products"],
        "class layer, groups of 2,000 / three products": took["fused, groups of 2,000"]
        / took["products"],
        "class layer, fused / plain": took["fused"] / took["plain"],
        "class layer, compiled / plain": took["compiled"] / took["plain"],
        "class layer, compiled / plain in bfloat16": took["compiled"] / took["plain, bfloat16"],
        "class layer, MB above centres and gradient": extra["fused"],
        "class layer, MB above centres and gradient, plain": extra["plain"],
    }


def large_class_layer(device: torch.device) -> dict[str, float]:
    layer = Layer(WEBFACE42M, device.type)
    targets = random_targets(WEBFACE42M, 19, layer.labels).to(device)
    above = peak_bytes(partial(layer.fused, targets)) - layer.centers.nbytes
    return {"class layer, MB above centres and gradient, 2,059,906 classes": above / MEGABYTE}


def student_steps(device: torch.device) -> dict[str, float]:
    """Whole steps of MobileFaceNet in bfloat16, and what a teacher's forward would add to them."""
    ratios = {}
    teacher = build_backbone("iresnet50").eval().to(device).to(memory_format=torch.channels_last)
    images = torch.randn(STEP_BATCH, 3, 112, 112, device=device)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            teacher(images.to(memory_format=torch.channels_last))

    for name, (num_classes, entries) in student_step.SHAPES.items():
        step = student_step.make_step(num_classes, STEP_BATCH, device, torch.bfloat16)
        targets = student_step.random_targets(num_classes, entries, STEP_BATCH).to(device)
        took = seconds(
            {
                "without": partial(step, None),
                "with": partial(step, targets),
                "teacher": forward,
            }
        )
        ratios[f"step with / without, {name}"] = took["with"] / took["without"]
        online = 1 + took["teacher"] / took["without"]
        ratios[f"step with an online IResNet-50 / without, {name}"] = online
    return ratios


def groups(device: torch.device) -> dict[str, float]:
    logits, labels = (tensor.to(device) for tensor in teacher_logits())
    uniforms = np.random.default_rng(0).random((len(labels), 64))
    embeddings, own, centers = (
        tensor.to(device) for tensor in teacher_like(len(labels), NUM_CLASSES, 512)
    )
    took = seconds(
        {
            "logsumexp": partial(torch.logsumexp, logits, 1),
            "groups": partial(partition_logits, logits, labels, SHARP),
            "draws too": partial(partition_logits, logits, labels, DRAWN, uniforms=uniforms),
            "sort": partial(sorted_softmax, logits),
            "teacher's draws": partial(
                partition, embeddings, own, centers, DRAWN, uniforms=uniforms
            ),
        }
    )
    return {
        "partition / logsumexp, T=1": took["groups"] / took["logsumexp"],
        "softmax + sort + cumsum / partition, T=1": took["sort"] / took["groups"],
        "with 64 draws / without, T=1": took["draws too"] / took["groups"],
        "partition of 256 from embeddings, with 64 draws, ms": 1e3 * took["teacher's draws"],
    }


def make_teacher(records: Records) -> TorchEmbedder:
    """An IResNet-50 whose random weights separate faces."""
    torch.manual_seed(0)
    network = build_backbone("iresnet50")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    rows = np.linspace(0, len(records) - 1, 64).astype(int)
    faces = np.stack([records.image(int(row)) for row in rows])
    preprocess = preprocess_preset("arcface")
    with torch.no_grad():
        network.train()(torch.from_numpy(preprocess.apply(faces)))
    return TorchEmbedder(
        network.eval(), name="random", arch="iresnet50", sha256="0" * 64, preprocess=preprocess
    )


def make_centers(records: Records, teacher: TorchEmbedder) -> Centers:
    """Means of the identities; the other classes are random directions."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(NUM_CLASSES, teacher.embedding_dim, generator=generator)
    known = int(records.labels.max()) + 1
    sums[:known] = 0
    for start in range(0, len(records), 512):
        rows = range(start, min(start + 512, len(records)))
        faces = np.stack([records.image(row) for row in rows])
        unit = F.normalize(torch.from_numpy(teacher(faces)))
        sums.index_add_(0, torch.from_numpy(records.labels[rows.start : rows.stop]), unit)
    return Centers(F.normalize(sums).numpy(), "file", "means and random")


def stages(folder: Path) -> dict[str, float]:
    """Both stages as a user runs them, on LFW's faces again and again."""
    pack = open_records(SHARED_DATA / "lfw")
    records = Subset(pack, np.arange(IMAGES) % len(pack), NUM_CLASSES)
    teacher = make_teacher(pack)
    centers = make_centers(pack, teacher)
    faces = np.stack([pack.image(row) for row in range(ACCELERATOR_BATCH)])
    forward = seconds({"teacher on a batch": partial(teacher, faces)})["teacher on a batch"]
    alone = ACCELERATOR_BATCH / forward / 2  # both views
    # Random weights separate faces less than trained ones; without the margin groups are alike.
    how = PartitionSettings(group_temperature=1.0, margin=0.0, draws=DRAWS)
    settings = CacheSettings(partition=how, workers=usable_cores())
    began = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    cache_teacher(records, folder / "targets.gkd", teacher, centers, settings)
    cached = IMAGES / (time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIGABYTE
    cache = Cache.open(folder / "targets.gkd")
    joined, targets = join_targets(records, cache, workers=usable_cores(), folder=folder / "store")
    common = (
        "train.epochs=1",
        f"data.workers={usable_cores() - 1}",
        "data.empty_classes=keep",
        "schedule.warmup_epochs=0",
    )
    rates = {}
    for name, distil in (("without", False), ("with", True)):
        config = load_config(None, [*common, f"kd.enabled={str(distil).lower()}"])
        train(config, joined, targets, folder / name)
        rates[name] = median(logged_rates(folder / name)[1:])  # libraries load in the first
    rates = {"teacher alone": alone, "cache-teacher": cached, **rates}
    print({name: f"{rate:.0f} images/s" for name, rate in rates.items()}, file=sys.stderr)
    return {
        "cache-teacher / its teacher alone, images a second": cached / alone,
        "cache-teacher, images a second, both views": cached,
        "cache-teacher, GiB at its peak": peak,
        "train-student of MobileFaceNet, images a second": rates["with"],
        "train-student, images a second with targets / without": rates["with"] / rates["without"],
    }


def logged_rates(run: Path) -> list[float]:
    """Images a second of each window of a training's log."""
    lines = map(json.loads, (run / METRICS).read_text().splitlines())
    return [line["images_per_second"] for line in lines if "images_per_second" in line]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here")
    device = torch.device("cuda")
    ratios = (
        class_layer(device) | large_class_layer(device) | student_steps(device) | groups(device)
    )
    if (SHARED_DATA / "lfw").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            ratios |= stages(Path(folder))
    report("cuda", ratios, {}, accelerator=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
