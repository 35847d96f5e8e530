"""Whatever a model can be judged on: which protocol a set is of, and its results for people."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gkd.storage.errors import ConfigError
from gkd.trainer.evaluation.bin_file import VerificationSet, load_verification_set
from gkd.trainer.evaluation.embed import Embed
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache
from gkd.trainer.evaluation.identification import (
    IdentificationResult,
    IdentificationSet,
    identification_table,
    identify,
    is_identification,
    load_identification_set,
)
from gkd.trainer.evaluation.ijb import IjbResult, evaluate_ijb, ijb_table
from gkd.trainer.evaluation.ijb_set import IjbSet, is_ijb, load_ijb
from gkd.trainer.evaluation.verification import (
    VerificationResult,
    evaluate,
    plot_roc,
    results_table,
)

AnySet = VerificationSet | IjbSet | IdentificationSet
AnyResult = VerificationResult | IjbResult | IdentificationResult
PROTOCOLS: dict[type, str] = {
    VerificationResult: "pairs",
    IjbResult: "templates",
    IdentificationResult: "identification",
}


def load_set(path: Path) -> AnySet:
    """A ``.bin`` of pairs, a folder of IJB-B or IJB-C, or one of TinyFace.

    Raises:
        ConfigError: where it is none of them, or a part of it is missing.
        CorruptRecordError: naming the place of what cannot be.
    """
    if not path.is_dir():
        return load_verification_set(path)
    if is_ijb(path):
        return load_ijb(path)
    if is_identification(path):
        return load_identification_set(path)
    raise ConfigError(
        f"{path}: expected a folder with meta/*_template_pair_label.txt (IJB-B, IJB-C) or with "
        "Probe/ and Gallery_Match/ (TinyFace), got neither in it; pairs are a .bin file"
    )


def evaluate_set(
    embed: Embed, faces: AnySet, *, batch_size: int = 128, store: EmbeddingCache | None = None
) -> AnyResult:
    """Judge a model on a set by the set's protocol.

    Raises:
        CorruptRecordError: naming an image that cannot be read.
        ConfigError: where the model's embeddings are not finite.
    """
    match faces:
        case VerificationSet():
            return evaluate(embed, faces, batch_size=batch_size, store=store)
        case IjbSet():
            return evaluate_ijb(embed, faces, batch_size=batch_size, store=store)
        case IdentificationSet():
            return identify(embed, faces, batch_size=batch_size, store=store)


def plot_results(results: Sequence[AnyResult], out: Path) -> None:
    """Draw the ROC of each result that has one into a PNG.

    Raises:
        ConfigError: where none has, or matplotlib is not installed.
    """
    curves = [each for each in results if not isinstance(each, IdentificationResult)]
    if not curves:
        raise ConfigError(
            f"{out}: expected a set of pairs or templates to draw the ROC of, got identification "
            "alone; leave --plot out"
        )
    plot_roc(curves, out)


def show_results(results: Sequence[AnyResult]) -> None:
    """Print the results, a table for each protocol."""
    for kind, table in _TABLES.items():
        chosen = [each for each in results if isinstance(each, kind)]
        if chosen:
            Console().print(table(chosen))


def result_to_builtins(result: AnyResult) -> dict[str, Any]:
    """The result with the name of its protocol, for JSON."""
    return {"protocol": PROTOCOLS[type(result)], **result.to_builtins()}


def warn_of(result: AnyResult) -> None:
    """Say on stderr what makes a result less than it looks."""
    told = ""
    if isinstance(result, VerificationResult) and result.one_sided_folds:
        told = (
            f"{result.one_sided_folds} of 10 folds hold genuine or impostor pairs only, which "
            "biases the accuracy; compare by AUC and EER"
        )
    if isinstance(result, IdentificationResult) and result.without_mate:
        told = f"{result.without_mate:,} probes have no mate in the gallery and are left out"
    if told:
        print(f"{result.name}: {told}", file=sys.stderr)


_TABLES: dict[type, Callable[[Any], Table]] = {
    VerificationResult: results_table,
    IjbResult: ijb_table,
    IdentificationResult: identification_table,
}
