"""All sets that a model can be evaluated on, by what is found at a path."""

from collections.abc import Sequence
from pathlib import Path

from gkd.storage.errors import ConfigError
from gkd.trainer.evaluation.bin_file import load_verification_set
from gkd.trainer.evaluation.embed import FaceSet
from gkd.trainer.evaluation.identification import is_identification, load_identification_set
from gkd.trainer.evaluation.ijb import is_ijb, load_ijb
from gkd.trainer.evaluation.results import Result
from gkd.trainer.evaluation.roc import RocResult, plot_roc


def load_set(path: Path) -> FaceSet[Result]:
    """A ``.bin`` of pairs, a folder of IJB-B or IJB-C, or one of TinyFace.

    Raises:
        ConfigError: if it is none of them, or a part of it is missing.
        CorruptRecordError: if a file is damaged; names the location.
    """
    if not path.is_dir():
        return load_verification_set(path)
    if is_ijb(path):
        return load_ijb(path)
    if is_identification(path):
        return load_identification_set(path)
    raise ConfigError(
        path=path,
        expected="a folder with meta/*_template_pair_label.txt (IJB-B, IJB-C) or with Probe/ and "
        "Gallery_Match/ (TinyFace)",
        got="neither",
        remedy="pairs are a .bin file",
    )


def plot_results(results: Sequence[Result], out: Path) -> None:
    """Draw the ROC of each result that has one into a PNG.

    Raises:
        ConfigError: if none has, or matplotlib is not installed.
    """
    curves = [result for result in results if isinstance(result, RocResult)]
    if not curves:
        raise ConfigError(
            path=out,
            expected="a set of pairs or templates to draw the ROC of",
            got="identification alone",
            remedy="leave --plot out",
        )
    plot_roc(curves, out)
