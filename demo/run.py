"""A small end-to-end run on synthetic faces, through the public commands.

Draws people, trains a teacher on them, caches its targets, and trains one small student twice:
alone and with the targets. All three are evaluated on people that none of them was trained on.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from gkd.demo.synthetic import draw_faces, draw_pairs
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.targets import decode_log_probs
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.records.open import open_records
from gkd.storage.util.files import write_file
from gkd.storage.util.input_files import read_small
from gkd.storage.util.plotting import new_figure, write_png
from gkd.storage.util.torchrun_env import all_cores
from gkd.trainer.evaluation.bin_file import write_verification_set

STATE = "demo.json"
MODELS = {"teacher": "teacher", "alone": "student alone", "gkd": "student with gkd"}
SHOWN_PEOPLE, SHOWN_IMAGES, SHOWN_CLASSES = 4, 6, 10


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a demo; its folder resumes with the same settings only."""

    seed: int = 0
    identities: int = 200
    images_each: int = 20
    held_out: int = 150
    held_out_images_each: int = 10
    pairs: int = 2000
    teacher: tuple[str, ...] = (
        "student.name=iresnet18",
        "student.width=0.25",
        "student.input_size=28",
        "student.embedding_dim=128",
        "train.epochs=10",
        "train.batch_size=64",
        "schedule.warmup_epochs=2",
        "data.workers=1",
    )
    student: tuple[str, ...] = (
        "student.name=iresnet18",
        "student.width=0.125",
        "student.input_size=28",
        "student.embedding_dim=128",
        "train.epochs=4",
        "train.batch_size=64",
        "schedule.warmup_epochs=1",
        "data.workers=1",
    )
    distillation: tuple[str, ...] = ("kd.temperature=4", "kd.ramp=0.1")
    cache: tuple[str, ...] = ("--group-temperature", "4", "--draws", "0")


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a demo, and the seconds that each finished stage took."""

    settings: Settings
    seconds: dict[str, float]


def run_demo(out: Path, settings: Settings | None = None) -> None:
    """Run the demo in the folder ``out``, or resume an interrupted run of it.

    Ends with tables on stdout and, if matplotlib is installed, ``out``/demo.png.

    Raises:
        ConfigError: if ``out`` holds something else.
        GkdError: if a command failed; its own message is printed before.
    """
    settings = settings or Settings()
    state = _begin(out, settings)
    console = Console()
    stages = _stages(out, settings)
    for number, (name, heading, run) in enumerate(stages, 1):
        done = name in state.seconds
        ending = " (done before)" if done else ""
        console.rule(f"{number}/{len(stages)}  {heading}{ending}", align="left")
        if done:
            continue
        began = time.monotonic()
        run()
        state = State(settings, {**state.seconds, name: time.monotonic() - began})
        write_file(out / STATE, msgspec.json.encode(state))
    _report(out, state, console)


def _begin(out: Path, settings: Settings) -> State:
    path = out / STATE
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"{out}: expected a new folder, or that of an interrupted demo, got something "
                "else; choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        state = State(settings, {})
        write_file(path, msgspec.json.encode(state))
        return state
    try:
        state = msgspec.json.decode(read_small(path), type=State)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: not written by this version's demo ({error}); delete {out} or choose another "
            "folder"
        ) from error
    if state.settings != settings:
        raise ConfigError(
            f"{out}: holds a demo with other settings; delete it or choose another folder"
        )
    return state


def _stages(out: Path, settings: Settings) -> list[tuple[str, str, Callable[[], object]]]:
    """Name, heading and work of each stage."""
    pack, pairs, targets = out / "pack", out / "held_out.bin", out / "targets.gkd"
    seed = f"train.seed={settings.seed}"
    evaluation = f'evaluation.sets=["{pairs.absolute()}"]'
    teacher = _sets(*settings.teacher, seed)
    student = _sets(*settings.student, *settings.distillation, seed, evaluation)
    weights = _weights(out, "teacher")

    def train_student(run: str, *options: str) -> None:
        _gkd(out, "train-student", pack, targets, out / run, *student, *options)

    def cache_teacher() -> None:
        of_teacher = ("--teacher", weights, "--centers", "class-mean")
        _gkd(out, "cache-teacher", pack, targets, *of_teacher, *settings.cache)

    return [
        ("draw", "Draw people", lambda: _draw(out, settings)),
        ("pack", "Pack them as records", lambda: _pack(out)),
        (
            "teacher",
            "Train a teacher",
            lambda: _gkd(out, "train-student", pack, out / "teacher", "--without-kd", *teacher),
        ),
        ("cache", "Cache the teacher's targets", cache_teacher),
        ("alone", "Train a student alone", lambda: train_student("alone", "--without-kd")),
        ("gkd", "Train the same student with the targets", lambda: train_student("gkd")),
        ("evaluate", "Evaluate all three on people never trained on", lambda: _evaluate(out)),
    ]


def _sets(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


def _gkd(out: Path, *arguments: object, capture: bool = False) -> str:
    """Run a gkd command as a user would; return its stdout if captured."""
    words = [str(argument) for argument in arguments]
    print("$ gkd", shlex.join(words), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "gkd.cli", *words],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GkdError(
            f"`gkd {words[0]}` ended with exit code {done.returncode}, see its message above; "
            f"run `gkd demo {shlex.quote(str(out))}` again to resume"
        )
    return done.stdout or ""


def _draw(out: Path, settings: Settings) -> None:
    """The people to train on, as a folder of images, and pairs of others, as a verification set."""
    known = range(settings.identities)
    unknown = range(settings.identities, settings.identities + settings.held_out)
    workers = all_cores()
    folder, seed = out / "held_out", settings.seed
    each, held_out_each = settings.images_each, settings.held_out_images_each
    draw_faces(out / "faces", identities=known, images_each=each, seed=seed, workers=workers)
    draw_faces(folder, identities=unknown, images_each=held_out_each, seed=seed, workers=workers)
    paths, issame = draw_pairs(
        folder, identities=unknown, images_each=held_out_each, pairs=settings.pairs, seed=seed
    )
    write_verification_set(out / "held_out.bin", [path.read_bytes() for path in paths], issame)


def _pack(out: Path) -> None:
    """Pack the people to train on, unless an interrupted run has done so."""
    try:
        open_records(out / "pack")
    except GkdError:
        _gkd(out, "records", "pack", out / "faces", out / "pack")


def _weights(out: Path, run: str) -> Path:
    # Not the best checkpoint: the evaluation set has chosen it.
    return out / run / "checkpoints" / "last.pt"


def _evaluate(out: Path) -> None:
    pairs = out / "held_out.bin"
    for run in MODELS:
        result = _gkd(out, "evaluate", _weights(out, run), pairs, "--json", capture=True)
        write_file(out / f"{run}.json", result.encode())


# --- the report -----------------------------------------------------------------------------------


def _report(out: Path, state: State, console: Console) -> None:
    results = {run: _result(out / f"{run}.json") for run in MODELS}
    cache = Cache.open(out / "targets.gkd")
    console.print(_accuracy_table(results))
    console.print(_stage_table(state))
    console.print(_cost(cache), highlight=False)
    try:
        plot_demo(out, results, out / "demo.png")
    except ConfigError as error:  # matplotlib is optional
        console.print(f"no plot: {error}", highlight=False, markup=False)
    else:
        console.print(f"Plot: {out / 'demo.png'}", highlight=False, markup=False)


def _result(path: Path) -> dict[str, Any]:
    (result,) = json.loads(path.read_bytes())
    return dict(result)


def _accuracy_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Verification of people never trained on")
    table.add_column("model")
    for heading in ("accuracy", "± over folds", "TAR at FAR 1e-2"):
        table.add_column(heading, justify="right")
    for run, name in MODELS.items():
        result = results[run]
        tar = result["tar_at_far"]["1e-02"]
        table.add_row(
            name,
            f"{result['accuracy']:.1%}",
            f"{result['accuracy_std']:.1%}",
            "-" if tar is None else f"{tar:.1%}",
        )
    return table


def _stage_table(state: State) -> Table:
    table = Table("stage", title="Time")
    table.add_column("seconds", justify="right")
    for name, seconds in state.seconds.items():
        table.add_row(name, f"{seconds:.0f}")
    table.add_row("total", f"{sum(state.seconds.values()):.0f}", style="bold")
    return table


def _cost(cache: Cache) -> str:
    assert cache.manifest is not None
    per_sample = cache.manifest.bytes / cache.spec.num_samples
    return f"Targets: {per_sample:,.0f} bytes per sample, {' and '.join(cache.spec.views)} views"


def plot_demo(out: Path, results: dict[str, dict[str, Any]], png: Path) -> None:
    """Plot the demo: people, the primary group of one image, and accuracy over epochs.

    Raises:
        ConfigError: if matplotlib is not installed, or ``png`` cannot be written.
    """
    figure = new_figure(13, 7.5)
    people, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    group, curves = below.subfigures(1, 2, width_ratios=[1.3, 1])
    _plot_people(people, out)
    _plot_group(group, out)
    _plot_curves(curves, out, results)
    write_png(figure, png, dpi=110)


def _plot_people(figure: Any, out: Path) -> None:
    records = open_records(out / "pack")
    first = np.searchsorted(records.labels, np.arange(2 * SHOWN_PEOPLE))
    figure.suptitle("People to train on: pose, light, colour, expression and cover vary by image")
    axes = figure.subplots(SHOWN_PEOPLE, 2 * SHOWN_IMAGES)
    for person, row in enumerate(first.tolist()):
        side, line = divmod(person, SHOWN_PEOPLE)
        for image in range(SHOWN_IMAGES):
            _show(axes[line, side * SHOWN_IMAGES + image], records.image(row + image))


def _plot_group(figure: Any, out: Path) -> None:
    """Show an image and the people that the teacher takes it for."""
    records = open_records(out / "pack")
    cache = Cache.open(out / "targets.gkd")
    targets = cache.read_shard(0, "original")
    row = _example_row(targets.sizes)
    entries = slice(int(targets.offsets[row]), int(targets.offsets[row + 1]))
    probabilities = np.exp(decode_log_probs(targets.log2_probs[entries]))
    shown = zip(targets.indices[entries].tolist(), probabilities, strict=True)

    label = int(records.labels[row])
    figure.suptitle(
        f"Primary group of an image of person {label}: {targets.sizes[row]} of "
        f"{records.num_classes} people, T = {cache.spec.group_temperature:g}, "
        f"margin {cache.spec.margin:g} on the person",
        fontsize=10,
    )
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    _show(left.subplots(), records.image(row), "the image")
    for axes in right.subplots(2, SHOWN_CLASSES // 2).flat:
        person, probability = next(shown, (None, 0.0))
        axes.set_axis_off()
        if person is not None:
            face = records.image(int(np.searchsorted(records.labels, person)))
            itself = " itself" if person == label else ""
            _show(axes, face, f"{person}{itself}\n{probability:.1%}")


def _example_row(sizes: npt.NDArray[np.int64]) -> int:
    """The first sample whose group fills the plot."""
    large = np.flatnonzero(sizes >= SHOWN_CLASSES)
    return int(large[0] if len(large) else sizes.argmax())


def _plot_curves(figure: Any, out: Path, results: dict[str, dict[str, Any]]) -> None:
    axes = figure.subplots()
    for run, color in (("alone", "tab:gray"), ("gkd", "tab:green")):
        lines = [
            json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()
        ]
        points = [
            (line["epoch"], line["accuracy"]["held_out"]) for line in lines if "accuracy" in line
        ]
        axes.plot(*np.array(points).T, marker="o", color=color, label=MODELS[run])
    axes.axhline(results["teacher"]["accuracy"], ls="--", color="tab:blue", label="teacher")
    axes.set(xlabel="epoch", ylabel="accuracy, people never trained on")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def _show(axes: Any, image: npt.NDArray[np.uint8], title: str = "") -> None:
    axes.imshow(image)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
