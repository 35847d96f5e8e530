"""Class centres from the checkpoints of known training codes: their keys and orientations.

Known sources: arcface_torch (three generations), CVLface, AdaFace, AdaDistill, FaceX-Zoo, TFace,
face.evoLVe, and the files that ``gkd centers build`` writes.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gkd.storage.cache.spec import DatasetSpec, Preprocess, TeacherSpec
from gkd.storage.errors import ConfigError
from gkd.storage.util.input_files import refuse_foreign
from gkd.storage.util.text import first_few
from gkd.storage.util.torch_files import read_torch_file, tensors_of

METADATA = "gkd.centers"
# A part's file name contains its rank. Ranks are compared as numbers: 10 comes after 2.
RANKED = re.compile(
    r"checkpoint_gpu_(\d+)\.pt|softmax_fc_gpu_(\d+)\.pt|rank_(\d+)_softmax_weight\.pt"
    r"|.+_rank(\d+)\.pth?|HEAD_Epoch_.+_Split_(\d+)(?:\D.*)?"
)
MOMENTUM = re.compile(r"rank_\d+_softmax_weight_mom\.pt")


class Layout(NamedTuple):
    """Where one training code stores class centres.

    key         regular expression of the dotted key
    transposed  whether they are stored as [D, C], and not [C, D]
    file        regular expression of the file name: the layout applies to such files only, and
                they must contain the key
    padded      whether rows are added to make their number a multiple of the number of ranks
    """

    source: str
    key: str
    transposed: bool = False
    file: str | None = None
    padded: bool = False


LAYOUTS = (
    Layout("gkd", r"centers"),
    Layout("arcface_torch", r"state_dict_softmax_fc\.weight", file=r"checkpoint_gpu_\d+\.pt"),
    Layout("arcface_torch", r"weight", file=r"softmax_fc_gpu_\d+\.pt"),
    Layout("arcface_torch", r"", file=r"rank_\d+_softmax_weight\.pt"),
    Layout("TFace", r"(.+\.)?weight", transposed=True, file=r"HEAD_Epoch_.*"),
    Layout("arcface_torch", r"state_dict_softmax_fc\.weight"),
    Layout("CVLface", r"(.+\.)?partial_fc\.weight", padded=True),
    Layout("AdaFace", r"(state_dict\.)?head\.kernel", transposed=True),
    Layout("FaceX-Zoo", r"(state_dict\.)?(module\.)?head\.weight", transposed=True),
    Layout("AdaDistill", r"(module\.)?kernel", transposed=True),
    Layout("face.evoLVe", r"(module\.)?weight"),
)
# Any other file that contains a single matrix.
PLAIN = Layout("plain", r".*")
# One matrix beside a network in its file.
MAGFACE = Layout("MagFace", r".*", transposed=True)


class RefineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How class means were refined: epochs of SGD on a CosFace head over frozen embeddings."""

    epochs: int
    seed: int
    scale: float
    margin: float
    learning_rate: float
    batch_size: int


class BuiltCenters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The origin of centres made by ``gkd centers build``: JSON in the file's metadata."""

    kind: Literal["class-mean", "refined"]
    teacher: TeacherSpec
    preprocess: Preprocess
    precision: str
    dataset: DatasetSpec
    refine: RefineSpec | None = None


@dataclass(frozen=True)
class CenterFile:
    """Class centres float32 [n, D] of one file.

    transposed  whether the file stores them as [D, n]
    built       their origin, if ``gkd centers build`` made them
    """

    path: Path
    layout: Layout
    key: str
    transposed: bool
    array: npt.NDArray[np.float32]
    built: BuiltCenters | None


def read_center_files(paths: Sequence[Path], embedding_dim: int | None = None) -> list[CenterFile]:
    """Read the files of centres in the order in which they are to be joined.

    A path may be a folder of parts, or a pattern such as ``run/checkpoint_gpu_*.pt``. Parts with a
    rank in their names are sorted by rank; other files stay in the order given. The side of length
    ``embedding_dim`` is D. If both sides have this length or it is None, the source decides the
    orientation; for an unknown source the longer side is the classes.

    Raises:
        ConfigError: if a file cannot be read, contains no centres or several candidates, or if a
            part is missing, given twice, or belongs to another checkpoint.
    """
    files = _sort_parts([file for path in paths for file in _expand(path)])
    return [_read_file(file, embedding_dim) for file in files]


def _rank_span(path: Path) -> tuple[int, int] | None:
    """Start and end of the rank in the file name of a part."""
    match = RANKED.fullmatch(path.name)
    return match and match.span(match.lastindex or 0)


def _expand(path: Path) -> list[Path]:
    """The files that a path, folder or pattern names."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _rank_span(file))
        expected = (
            "a folder of parts of class centres, such as checkpoint_gpu_0.pt or "
            "classifier_rank0.pt, found none; give the files themselves"
        )
    elif path.exists() or not any(wildcard in path.name for wildcard in "*?["):
        return [path]
    else:
        files = sorted(path.parent.glob(path.name))
        expected = "files of class centres, but no file name matches"
    if not files:
        raise ConfigError(f"{path}: expected {expected}")
    return files


def _sort_parts(files: Sequence[Path]) -> list[Path]:
    """Parts by rank, after a check that each rank of one checkpoint is there exactly once."""
    spans = [_rank_span(file) for file in files]
    ranked = [(file, *span) for file, span in zip(files, spans, strict=True) if span]
    if not ranked:
        return list(files)
    ranks = [int(file.name[start:end]) for file, start, end in ranked]
    names = sorted({f"{file.name[:start]}*{file.name[end:]}" for file, start, end in ranked})
    repeated = [rank for rank, count in Counter(ranks).items() if count > 1]
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if None in spans:
        fault = f"{files[spans.index(None)].name}, which has no rank in its name"
    elif len(names) > 1:
        fault = f"those of {len(names)} checkpoints: {first_few(names)}"
    elif repeated:
        fault = f"several of rank {first_few(repeated, 5)}"
    elif missing:
        fault = f"{len(ranks)} of {max(ranks) + 1} or more: rank {first_few(missing, 5)} is missing"
    else:
        return [ranked[ranks.index(rank)][0] for rank in range(len(ranks))]
    raise ConfigError(
        f"{files[0].parent}: expected parts of class centres, one for each rank of one checkpoint, "
        f"got {fault}; give all parts of one checkpoint, or only files without ranks, in the order "
        "in which they are to be joined"
    )


def _read_file(path: Path, embedding_dim: int | None) -> CenterFile:
    if not path.exists():
        raise ConfigError(f"{path}: expected a file of class centres, but there is no such file")
    if MOMENTUM.fullmatch(path.name):
        raise ConfigError(
            f"{path}: contains an optimiser's momentum, not class centres; they are in "
            f"{path.name.replace('_mom', '')} beside it"
        )
    content, metadata = _read_content(path)
    tensors = {key: value for key, value in tensors_of(content) if value.is_floating_point()}
    layout, key = _find_centers(path, tensors, embedding_dim)
    matrix = tensors[key].detach().float().numpy()
    transposed = _is_transposed(path, layout, key, matrix.shape, embedding_dim)
    built = None
    if METADATA in metadata:
        try:
            built = msgspec.json.decode(metadata[METADATA], type=BuiltCenters)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{path}: expected metadata as `gkd centers build` writes it, got {error}; build "
                "the centres again"
            ) from error
    array = np.ascontiguousarray(matrix.T if transposed else matrix)
    return CenterFile(path, layout, key, transposed, array, built)


def _find_centers(
    path: Path, tensors: Mapping[str, Tensor], embedding_dim: int | None
) -> tuple[Layout, str]:
    """The layout of a file and the key of its centres."""
    matrices = {key: tensor for key, tensor in tensors.items() if tensor.dim() == 2}
    for layout in LAYOUTS:
        if layout.file is not None and not re.fullmatch(layout.file, path.name):
            continue
        keys = [key for key in matrices if re.fullmatch(layout.key, key)]
        if len(keys) == 1:
            return layout, keys[0]
        if keys or layout.file is not None:
            wanted = re.sub(r"\(.*?\)\?|\\", "", layout.key) or "the top level"
            raise ConfigError(
                f"{path}: expected class centres at {wanted}, where {layout.source} stores them, "
                f"got {len(keys)} matrices there; the file contains {_describe(tensors)}"
            )
    # What is not under the name of the network's convolutions is beside the network.
    inner = [key for key, tensor in tensors.items() if tensor.dim() > 2]
    is_network = bool(inner)
    below = _common([key.split(".")[:-1] for key in inner]) if len(inner) > 1 else ""
    fitting = [
        key
        for key in matrices
        if embedding_dim in (None, *matrices[key].shape)
        and not (is_network and (not below or f"{key}.".startswith(f"{below}.")))
        and not key.startswith("optim")
    ]
    if len(fitting) != 1:
        shape = f"[C, {embedding_dim or 'D'}]"
        got = "a network" if is_network and not fitting else f"{len(fitting)} such matrices"
        sources = ", ".join(dict.fromkeys(layout.source for layout in LAYOUTS[1:]))
        raise ConfigError(
            f"{path}: expected class centres under a key of {sources}, or exactly one matrix "
            f"{shape}, got {got}: {_describe(tensors)}; save the centres alone, as .npy {shape}, "
            "or use --centers class-mean"
        )
    return (MAGFACE if is_network else PLAIN), fitting[0]


def _common(keys: Sequence[Sequence[str]]) -> str:
    """The parts with which all keys begin, joined."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*keys, strict=False))
    return ".".join(parts[0] for parts in same)


def _is_transposed(
    path: Path, layout: Layout, key: str, shape: tuple[int, ...], embedding_dim: int | None
) -> bool:
    if embedding_dim is None:
        return shape[0] < shape[1] if layout is PLAIN else layout.transposed
    if embedding_dim not in shape:
        raise ConfigError(
            f"{path}: {key or 'an array'} {list(shape)}: expected class centres [C, "
            f"{embedding_dim}] for the teacher's embeddings of length {embedding_dim}; these are "
            "the centres of another teacher"
        )
    return layout.transposed if shape[0] == shape[1] else shape[0] == embedding_dim


def _describe(tensors: Mapping[str, Tensor]) -> str:
    items = [f"{key or 'an array'} {list(tensor.shape)}" for key, tensor in tensors.items()]
    return first_few(items, 5)[:400] if items else "no array"


def _read_content(path: Path) -> tuple[Any, Mapping[str, str]]:
    """A tensor or nested dictionaries of tensors, and the metadata of a safetensors file."""
    if path.suffix == ".npy":
        return torch.from_numpy(read_npy(path)), {}
    if path.suffix == ".safetensors":
        refuse_foreign(path, "a safetensors file")
        try:
            with safe_open(path, framework="pt") as file:
                content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return content, file.metadata() or {}
        except SafetensorError as error:
            raise ConfigError(f"{path}: expected a safetensors file, got {error}") from error
    if path.suffix not in (".pt", ".pth", ".ckpt") and not _rank_span(path):
        raise ConfigError(
            f"{path}: expected class centres as .npy, .pt, .pth, .ckpt or .safetensors, got "
            f"{path.suffix!r}"
        )
    remedy = "get it again, or save the centres alone, as a tensor or .npy"
    return read_torch_file(path, what="class centres", remedy=remedy), {}


def read_npy(path: Path) -> npt.NDArray[Any]:
    """An array of floats from a ``.npy`` file.

    Raises:
        ConfigError: if the file is anything else.
    """
    refuse_foreign(path, "a .npy array")
    try:
        # A map is refused where the header claims more than the file holds.
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, OSError, OverflowError) as error:
        raise ConfigError(f"{path}: expected a .npy array of numbers, got {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        got = getattr(array, "dtype", type(array).__name__)
        raise ConfigError(f"{path}: expected a .npy array of floats, got {got}")
    if array.dtype.itemsize > 8:
        raise ConfigError(
            f"{path}: expected floats of at most 64 bits, got {array.dtype}; save the array as "
            "float32: np.save(path, array.astype(np.float32))"
        )
    return np.array(array, array.dtype.newbyteorder("="))
