"""Class centres from the files that training codes leave: which key holds them, which way round.

Sources, each with its own place for them: arcface_torch (three generations), CVLface, AdaFace,
AdaDistill, FaceX-Zoo, TFace, face.evoLVe, and what ``gkd centers build`` writes.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
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
from gkd.storage.util.torch_files import read_torch_file

METADATA = "gkd.centers"
SHOWN = 5
# A part's rank stands in its name. Ranks count as numbers: 10 comes after 2.
RANKED = re.compile(
    r"checkpoint_gpu_(\d+)\.pt|softmax_fc_gpu_(\d+)\.pt|rank_(\d+)_softmax_weight\.pt"
    r"|.+_rank(\d+)\.pth?|HEAD_Epoch_.+_Split_(\d+)(?:\D.*)?"
)
MOMENTUM = re.compile(r"rank_\d+_softmax_weight_mom\.pt")


class Layout(NamedTuple):
    """Where one training code keeps class centres.

    key      regular expression of the dotted key
    turned   whether it keeps them [D, C], and not [C, D]
    file     of the file's name: a file of such a name must have the key, and only there it counts
    padded   whether rows are added to make their number a multiple of the ranks'
    """

    source: str
    key: str
    turned: bool = False
    file: str | None = None
    padded: bool = False


LAYOUTS = (
    Layout("gkd", r"centers"),
    Layout("arcface_torch", r"state_dict_softmax_fc\.weight", file=r"checkpoint_gpu_\d+\.pt"),
    Layout("arcface_torch", r"weight", file=r"softmax_fc_gpu_\d+\.pt"),
    Layout("arcface_torch", r"", file=r"rank_\d+_softmax_weight\.pt"),
    Layout("TFace", r"(.+\.)?weight", turned=True, file=r"HEAD_Epoch_.*"),
    Layout("arcface_torch", r"state_dict_softmax_fc\.weight"),
    Layout("CVLface", r"(.+\.)?partial_fc\.weight", padded=True),
    Layout("AdaFace", r"(state_dict\.)?head\.kernel", turned=True),
    Layout("FaceX-Zoo", r"(state_dict\.)?(module\.)?head\.weight", turned=True),
    Layout("AdaDistill", r"(module\.)?kernel", turned=True),
    Layout("face.evoLVe", r"(module\.)?weight"),
)
# Any other file with one matrix alone.
PLAIN = Layout("plain", r".*")


class RefineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How class means were refined: epochs of SGD on a CosFace head over frozen embeddings."""

    epochs: int
    seed: int
    scale: float
    margin: float
    learning_rate: float
    batch_size: int


class BuiltCenters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file of ``gkd centers build`` says of itself, as JSON among its metadata."""

    kind: Literal["class-mean", "refined"]
    teacher: TeacherSpec
    preprocess: Preprocess
    precision: str
    dataset: DatasetSpec
    refine: RefineSpec | None = None


@dataclass(frozen=True)
class CenterFile:
    """Class centres [n, D] of one file, and where and how it keeps them.

    shape  as they stand there; ``turned``: [D, n]
    rank   of the process that wrote this part; None where the name has none
    built  what a file of ``gkd centers build`` says of itself
    """

    path: Path
    source: str
    key: str
    shape: tuple[int, int]
    turned: bool
    padded: bool
    rank: int | None
    array: npt.NDArray[np.float32]
    built: BuiltCenters | None


def read_center_files(paths: Sequence[Path], embedding_dim: int | None = None) -> list[CenterFile]:
    """The files of centres that are to be joined, in this order.

    A path may be a folder of parts, or a pattern such as ``run/checkpoint_gpu_*.pt``. Parts whose
    names have the rank that wrote them are put in the order of these numbers, others stay in the
    order given. Where both sides of a matrix fit ``embedding_dim``, or it is not known, its source
    says which way round it stands; of an unknown source the longer side is the classes.

    Raises:
        ConfigError: where a file cannot be read, holds no centres or several matrices that may be,
            or a part is missing, twice there, or of another checkpoint.
    """
    files = _in_order([file for path in paths for file in _expanded(path)])
    return [_read_file(file, embedding_dim) for file in files]


def rank_of(path: Path) -> int | None:
    """The rank that wrote a part, by its name."""
    match = RANKED.fullmatch(path.name)
    return None if match is None else int(next(group for group in match.groups() if group))


def _expanded(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if rank_of(file) is not None)
        if not files:
            raise ConfigError(
                f"{path}: expected a folder of parts of class centres, such as checkpoint_gpu_0.pt "
                "or classifier_rank0.pt, found none; name the files themselves"
            )
        return files
    if path.exists() or not any(each in path.name for each in "*?["):
        return [path]
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise ConfigError(f"{path}: expected files of class centres, no name is like this")
    return files


def _in_order(files: Sequence[Path]) -> list[Path]:
    ranks = [rank_of(file) for file in files]
    known = {rank: file for rank, file in zip(ranks, files, strict=True) if rank is not None}
    if not known:
        return list(files)
    if None in ranks:
        raise ConfigError(
            f"{files[ranks.index(None)]}: expected a part of class centres whose name has its rank "
            f"like {next(iter(known.values())).name}, got one without; join either parts of one "
            "checkpoint or files in an order that you give"
        )
    names = {_without_rank(file) for file in files}
    if len(names) > 1:
        raise ConfigError(
            f"{files[0].parent}: parts of {len(names)} checkpoints, {', '.join(sorted(names))}; "
            "name those of one"
        )
    for file, rank in zip(files, ranks, strict=True):
        if rank is not None and known[rank] is not file:
            raise ConfigError(
                f"{file} and {known[rank]}: both are the part of rank {rank}; name each part once"
            )
    missing = sorted(set(range(max(known) + 1)) - set(known))
    if missing:
        told = ", ".join(map(str, missing[:SHOWN])) + ", ..." * (len(missing) > SHOWN)
        raise ConfigError(
            f"{files[0].parent}: the centres' parts of rank {told} are missing of "
            f"{max(known) + 1} or more, got {len(known)}; name the files of all ranks"
        )
    return [known[rank] for rank in sorted(known)]


def _without_rank(path: Path) -> str:
    match = RANKED.fullmatch(path.name)
    assert match is not None
    group = next(i for i, each in enumerate(match.groups(), 1) if each)
    return f"{path.name[: match.start(group)]}*{path.name[match.end(group) :]}"


def _read_file(path: Path, embedding_dim: int | None) -> CenterFile:
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file of class centres, got nothing there")
    if MOMENTUM.fullmatch(path.name):
        raise ConfigError(
            f"{path}: holds an optimiser's momentum, not class centres; they are in "
            f"{path.name.replace('_mom', '')} beside it"
        )
    content = _read(path)
    arrays = dict(_tensors("", content))
    layout, key = _chosen(path, arrays, embedding_dim)
    tensor = arrays[key]
    rows, columns = tensor.shape
    turned = _turned(path, layout, key, (rows, columns), embedding_dim)
    matrix = tensor.detach().float().numpy()
    return CenterFile(
        path=path,
        source=layout.source,
        key=key,
        shape=(rows, columns),
        turned=turned,
        padded=layout.padded,
        rank=rank_of(path),
        array=np.ascontiguousarray(matrix.T if turned else matrix),
        built=_built(path) if key == "centers" else None,
    )


def _chosen(
    path: Path, arrays: Mapping[str, Tensor], embedding_dim: int | None
) -> tuple[Layout, str]:
    """The layout that a file is of, and the key of its centres."""
    matrices = {key: tensor for key, tensor in arrays.items() if tensor.dim() == 2}
    for layout in LAYOUTS:
        if layout.file is not None and not re.fullmatch(layout.file, path.name):
            continue
        keys = [key for key in matrices if re.fullmatch(layout.key, key)]
        if len(keys) == 1:
            return layout, keys[0]
        if keys or layout.file is not None:
            wanted = re.sub(r"\(.*?\)\?|\\", "", layout.key) or "a matrix alone"
            raise ConfigError(
                f"{path}: expected class centres at {wanted}, where {layout.source} keeps them, "
                f"got {len(keys)} matrices there; the file has {_listed(arrays)}"
            )
    if any(tensor.dim() > 2 for tensor in arrays.values()):
        raise ConfigError(
            f"{path}: holds a network, and no class centres at a key that a known training code "
            f"has them ({', '.join(layout.source for layout in LAYOUTS[1:])}); it has "
            f"{_listed(arrays)}. Save the centres alone, as .npy [C, D], or use --centers "
            "class-mean"
        )
    fitting = [key for key in matrices if embedding_dim in (None, *matrices[key].shape)]
    if len(fitting) != 1:
        length = "D" if embedding_dim is None else embedding_dim
        raise ConfigError(
            f"{path}: expected exactly one matrix of centres [C, {length}] for the teacher's "
            f"embeddings of length {length}, got {len(fitting)}: "
            f"{_listed({key: arrays[key] for key in fitting} or arrays)}"
        )
    return PLAIN, fitting[0]


def _turned(
    path: Path, layout: Layout, key: str, shape: tuple[int, int], embedding_dim: int | None
) -> bool:
    """Whether a matrix is [D, C]."""
    if embedding_dim is None:
        return shape[0] < shape[1] if layout is PLAIN else layout.turned
    if embedding_dim not in shape:
        raise ConfigError(
            f"{path}: {key or 'an array'} {list(shape)}: expected class centres [C, "
            f"{embedding_dim}] for the teacher's embeddings of length {embedding_dim}; these are "
            "the centres of another teacher"
        )
    if shape[0] == shape[1]:
        return layout.turned
    return shape[0] == embedding_dim


def _listed(arrays: Mapping[str, Tensor]) -> str:
    told = [f"{key or 'an array'} {list(tensor.shape)}" for key, tensor in arrays.items()]
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return (", ".join(told[:SHOWN]) + more)[:400] or "no array"


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        return torch.from_numpy(read_npy(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth", ".ckpt") or rank_of(path) is not None:
        return read_torch_file(
            path,
            what="class centres",
            remedy="get it again, or save the centres alone, as a tensor or .npy",
        )
    raise ConfigError(
        f"{path}: expected class centres as .npy, .pt, .pth, .ckpt or .safetensors, got "
        f"{path.suffix!r}"
    )


def read_npy(path: Path) -> npt.NDArray[Any]:
    """An array of floats from a ``.npy`` file.

    Raises:
        ConfigError: for another file.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{path}: expected a .npy array of numbers, got {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        got = getattr(array, "dtype", type(array).__name__)
        raise ConfigError(f"{path}: expected a .npy array of floats, got {got}")
    return array


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path}: expected a safetensors file, got {error}") from error


def _built(path: Path) -> BuiltCenters | None:
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=BuiltCenters)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path}: expected what `gkd centers build` says of its centres, got {error}; make "
            "them again"
        ) from error


def _tensors(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Floating tensors of nested dicts, by dotted name."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{prefix}.{key}" if prefix else str(key), item)
