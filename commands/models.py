"""Networks judged, exported and shown: ``gkd evaluate``, ``export``, ``demo``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gkd.commands.shared import (
    PATH,
    arch_option,
    as_json,
    bgr_option,
    build_embedder,
    device_option,
    precision_option,
    preprocess_option,
    require_plot,
)

if TYPE_CHECKING:
    from gkd.pipeline.teacher import Precision


@click.command("evaluate")
@click.argument("model", type=PATH)
@click.argument("sets", metavar="BIN...", type=PATH, nargs=-1, required=True)
@arch_option
@preprocess_option
@bgr_option
@device_option
@precision_option
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--plot", type=PATH, help="Draw the ROC into this PNG.")
@as_json
def evaluate(
    model: Path,
    sets: tuple[Path, ...],
    arch: str,
    preset: str,
    bgr: bool,
    device: str,
    precision: "Precision",
    batch_size: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Verify MODEL on verification sets: a run folder, a checkpoint, weights or an ONNX file."""
    from rich.console import Console

    from gkd.storage.spec import preprocess_preset
    from gkd.trainer.evaluation import evaluate, plot_roc, results_table
    from gkd.trainer.verification_set import load_verification_set

    if plot:
        require_plot(plot)
    preprocess = preprocess_preset(preset, bgr=bgr)
    embed = build_embedder(
        model, arch=arch, preprocess=preprocess, device=device, precision=precision
    )
    pairs = [load_verification_set(path) for path in sets]
    results = [evaluate(embed, each, batch_size=batch_size) for each in pairs]
    for result in results:
        if result.one_sided_folds:
            click.echo(
                f"{result.name}: {result.one_sided_folds} of 10 folds hold genuine or impostor "
                "pairs only, which biases the accuracy; compare by AUC and EER",
                err=True,
            )
    if plot:
        plot_roc(results, plot)
    if as_json:
        click.echo(json.dumps([result.to_builtins() for result in results]))
    else:
        Console().print(results_table(results))


@click.command("report")
@click.argument("run", type=PATH)
def report(run: Path) -> None:
    """Write RUN/report.html again, from the files of the run folder RUN alone."""
    from gkd.trainer.report import write_report

    click.echo(write_report(run))


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("out", metavar="OUT.onnx", type=PATH)
@as_json
def export(run: Path, out: Path, as_json: bool) -> None:
    """Write the student of RUN, a run folder or a checkpoint, as ONNX with any batch size."""
    from gkd.storage.spec import preprocess_preset
    from gkd.trainer.checkpoint import load_student
    from gkd.trainer.export import export_onnx

    student = load_student(run)
    name = student.config.student.name
    export_onnx(student.backbone, out, preprocess=preprocess_preset("arcface"), name=name)
    size = out.stat().st_size
    if as_json:
        click.echo(json.dumps({"path": str(out), "bytes": size, "name": name}))
    else:
        click.echo(f"{out}: {size:,} bytes, checked against torch")


@click.command("demo")
@click.argument("out", type=PATH, default=Path("gkd-demo"))
def demo(out: Path) -> None:
    """Draw faces, train a teacher on them, cache it, and train a student with and without it."""
    from gkd.demo import run_demo

    run_demo(out)
