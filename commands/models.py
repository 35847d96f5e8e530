"""Commands on trained networks: ``gkd evaluate``, ``report``, ``export``; and ``gkd demo``."""

from pathlib import Path
from typing import Any

import click

from gkd.commands.builders import embedder_from_options, require_plot
from gkd.commands.options import (
    LOCAL_PATH,
    OUTPUT_PATH,
    as_json,
    description_options,
    network_options,
)
from gkd.commands.output import echo, emit_json


@click.command("evaluate", short_help="Verification and identification accuracy.")
@click.argument("model", type=LOCAL_PATH)
@click.argument("sets", metavar="SET...", type=LOCAL_PATH, nargs=-1, required=True)
@network_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=128,
    help="Images per batch.",
)
@click.option("--plot", type=OUTPUT_PATH, help="Plot the ROC into this PNG file.")
@click.option(
    "--cache",
    type=OUTPUT_PATH,
    help="Folder that keeps embeddings for the next evaluation; by default under GKD_CACHE_DIR.",
)
@click.option("--no-cache", is_flag=True, help="Neither keep nor reuse embeddings.")
@as_json
def evaluate(
    model: Path,
    sets: tuple[Path, ...],
    batch_size: int,
    plot: Path | None,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate MODEL, a run folder, a checkpoint, weights or an ONNX file, on each SET.

    A SET is a .bin file of pairs (verification over ten folds), a folder of IJB-B or IJB-C with
    meta/ and loose_crop/ (1:1 verification of templates), or one of TinyFace with Gallery_Match/,
    Probe/ and optionally Gallery_Distractor/ (1:N identification).
    """
    from rich.console import Console

    from gkd.trainer.evaluation.embed import evaluate as evaluate_set
    from gkd.trainer.evaluation.embedding_cache import EmbeddingCache, default_embeddings
    from gkd.trainer.evaluation.protocols import load_set, plot_results
    from gkd.trainer.evaluation.results import print_results

    if cache and no_cache:
        raise click.UsageError("--cache and --no-cache exclude each other")
    if plot:
        require_plot(plot)
    embed = embedder_from_options(model, options)
    store = None
    if not no_cache:
        folder = cache or default_embeddings()
        store = EmbeddingCache(
            folder, f"{embed.sha256} {embed.arch}", embed.preprocess, embed.precision
        )
    loaded = [load_set(path) for path in sets]
    results = [evaluate_set(embed, data, batch_size=batch_size, store=store) for data in loaded]
    if plot:
        plot_results(results, plot)
    for result in results:
        if result.warning:
            echo(f"{result.name}: {result.warning}", err=True)
    if as_json:
        emit_json([{"protocol": result.protocol, **result.to_builtins()} for result in results])
    else:
        print_results(results, Console())


@click.command("report", short_help="Write a run's report.html again.")
@click.argument("run", type=LOCAL_PATH)
def report(run: Path) -> None:
    """Write RUN/report.html again, from the files of the run folder RUN alone."""
    from gkd.trainer.report.page import write_report

    echo(write_report(run))


@click.command("export", short_help="Export a student as ONNX or safetensors.")
@click.argument("run", type=LOCAL_PATH)
@click.argument("out", metavar="OUT.onnx|OUT.safetensors", type=OUTPUT_PATH)
@description_options
@as_json
def export(run: Path, out: Path, licence: str | None, note: str | None, as_json: bool) -> None:
    """Write the student of RUN, a run folder or a checkpoint, for programs without gkd.

    OUT.onnx takes any batch size and is checked against torch. OUT.safetensors holds the weights
    under their publisher's names. The model card OUT.md says what the model is and how to use it.
    """
    from gkd.trainer.export.model_card import export_student

    exported = export_student(run, out, licence=licence, note=note)
    if as_json:
        emit_json(exported.to_builtins())
    else:
        checked = ", checked against torch" if out.suffix == ".onnx" else ""
        echo(f"{out}: {exported.bytes:,} bytes{checked}; model card {exported.card}")


@click.command("demo", short_help="Small end-to-end run on synthetic faces.")
@click.argument("out", type=OUTPUT_PATH, default=Path("gkd-demo"))
def demo(out: Path) -> None:
    """Draw faces, train a teacher, cache its targets, train a student with and without them."""
    from gkd.demo.run import run_demo

    run_demo(out)
