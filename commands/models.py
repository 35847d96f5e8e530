"""Networks judged, exported and shown: ``gkd evaluate``, ``export``, ``demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from gkd.commands.shared import (
    OUT,
    PATH,
    arch_option,
    as_json,
    bgr_option,
    build_embedder,
    device_option,
    emit_json,
    precision_option,
    preprocess_option,
    require_plot,
)

if TYPE_CHECKING:
    from gkd.storage.cache.spec import Precision


@click.command("evaluate")
@click.argument("model", type=PATH)
@click.argument("sets", metavar="SET...", type=PATH, nargs=-1, required=True)
@arch_option
@preprocess_option
@bgr_option
@device_option
@precision_option
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--plot", type=OUT, help="Draw the ROC into this PNG.")
@click.option(
    "--cache",
    type=OUT,
    help="Where embeddings are kept for the next time, by default below GKD_CACHE_DIR.",
)
@click.option("--no-cache", is_flag=True, help="Keep no embeddings and read none.")
@as_json
def evaluate(
    model: Path,
    sets: tuple[Path, ...],
    arch: str,
    preset: str,
    bgr: bool,
    device: str,
    precision: 'Precision | Literal["auto"]',
    batch_size: int,
    plot: Path | None,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Judge MODEL on SETs: a run folder, a checkpoint, weights or an ONNX file.

    A SET is a .bin of pairs (verification over ten folds), a folder of IJB-B or IJB-C with meta/
    and loose_crop/ (1:1 verification of templates), or one of TinyFace with Gallery_Match/, Probe/
    and perhaps Gallery_Distractor/ (1:N identification).
    """
    from gkd.storage.cache.spec import preprocess_preset
    from gkd.trainer.evaluation.embedding_cache import EmbeddingCache, default_embeddings
    from gkd.trainer.evaluation.protocols import (
        evaluate_set,
        load_set,
        plot_results,
        result_to_builtins,
        show_results,
        warn_of,
    )

    if cache and no_cache:
        raise click.UsageError("--cache and --no-cache exclude each other")
    if plot:
        require_plot(plot)
    preprocess = preprocess_preset(preset, bgr=bgr)
    embed = build_embedder(
        model, arch=arch, preprocess=preprocess, device=device, precision=precision
    )
    store = None
    if not no_cache:
        folder = cache or default_embeddings()
        store = EmbeddingCache(folder, embed.sha256, preprocess, embed.precision)
    loaded = [load_set(path) for path in sets]
    results = [evaluate_set(embed, each, batch_size=batch_size, store=store) for each in loaded]
    if plot:
        plot_results(results, plot)
    for each in results:
        warn_of(each)
    if as_json:
        emit_json([result_to_builtins(each) for each in results])
    else:
        show_results(results)


@click.command("report")
@click.argument("run", type=PATH)
def report(run: Path) -> None:
    """Write RUN/report.html again, from the files of the run folder RUN alone."""
    from gkd.trainer.report.page import write_report

    click.echo(write_report(run))


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("out", metavar="OUT.onnx|OUT.safetensors", type=OUT)
@click.option("--licence", metavar="TEXT", help="Terms of the model, for its card.")
@click.option("--note", metavar="TEXT", help="Anything else its users should know, for its card.")
@as_json
def export(run: Path, out: Path, licence: str | None, note: str | None, as_json: bool) -> None:
    """Write the student of RUN, a run folder or a checkpoint, for programs without gkd.

    OUT.onnx takes any batch size and was checked against torch. OUT.safetensors holds the weights
    under the names of who published the network. Beside it OUT.md says what the model is and how to
    use it.
    """
    from gkd.trainer.export.model_card import export_student

    exported = export_student(run, out, licence=licence, note=note)
    if as_json:
        emit_json(exported.to_builtins())
    else:
        checked = ", checked against torch" if out.suffix == ".onnx" else ""
        click.echo(f"{out}: {exported.bytes:,} bytes{checked}; described in {exported.card}")


@click.command("demo")
@click.argument("out", type=OUT, default=Path("gkd-demo"))
def demo(out: Path) -> None:
    """Draw faces, train a teacher on them, cache it, and train a student with and without it."""
    from gkd.demo.run import run_demo

    run_demo(out)
