"""Checkpoints of a run: complete or absent, and read without running code from them."""

import json
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import DTensor

from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.util.files import publish_file, sha256_file, sync_path
from gkd.storage.util.text import describe_differences
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones import build_backbone
from gkd.trainer.config import RunConfig, StudentConfig
from gkd.trainer.config_file import FREE_KEYS, stored_config
from gkd.trainer.distributed import Ranks
from gkd.trainer.saved import SavedStudent, as_declared, load_weights

FORMAT = 1
FOLDER = "checkpoints"
LAST, BEST = "last.pt", "best.pt"
CENTERS = "centers"


class RunData(NamedTuple):
    """What a run must not change when it is resumed: its data, and the cache of its targets."""

    num_images: int
    num_classes: int
    dataset: str  # fingerprint of the records
    cache_id: str  # empty without distillation


class Student(NamedTuple):
    """A trained backbone in eval mode, float [B, 3, 112, 112] to [B, D], and its history.

    config    settings of its run
    data      what it was trained on
    step      number of steps trained
    accuracy  of the evaluation at that step, by verification set
    """

    backbone: nn.Module
    config: RunConfig
    data: RunData
    step: int
    accuracy: dict[str, float]


def student_backbone(config: StudentConfig) -> nn.Module:
    """The backbone that a configuration describes, freshly initialised."""
    return build_backbone(
        config.name,
        embedding_dim=config.embedding_dim,
        width=config.width,
        input_size=config.input_size,
    )


def load_student(path: Path) -> Student:
    """The student of a run folder (its best checkpoint, else its last) or of one of its ``.pt``.

    Raises:
        ConfigError: if there is no checkpoint, or the file is not one of gkd's.
    """
    path = Path(path)
    if path.is_dir():
        path = chosen_checkpoint(path)
    saved = as_declared(read_checkpoint(path), SavedStudent, path)
    config = _config_of(saved.config, path)
    backbone = student_backbone(config.student)
    load_weights(backbone, saved.model, path)
    return Student(backbone.eval(), config, RunData(*saved.data), saved.step, saved.accuracy)


def chosen_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run folder, or its last if there is no best.

    Raises:
        ConfigError: if the folder has neither.
    """
    for name in (BEST, LAST):
        if (run / FOLDER / name).exists():
            return run / FOLDER / name
    raise ConfigError(
        f"{run}: not a gkd run folder: found no {FOLDER}/{LAST} in it; give the folder of a run of "
        "`gkd train-student`, or the weights file itself"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content given to ``write_checkpoint``, on the CPU.

    Raises:
        ConfigError: if the file is absent, damaged or not a checkpoint of gkd.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: expected a checkpoint, found none; give the folder of a run of "
            "`gkd train-student`, or one of the .pt files in its checkpoints/"
        )
    try:
        return _read(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_alternatives(path)}") from error


def _read(path: Path) -> dict[str, Any]:
    content = read_torch_file(path, remedy="")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: not a checkpoint of gkd's format {FORMAT}; weights of other programs are "
            "read as a backbone, not as a run"
        )
    return content


def _alternatives(damaged: Path) -> str:
    """What to do if a checkpoint, or a folder of class centres, is ``damaged``."""
    intact: list[tuple[int, str]] = []
    for path in damaged.parent.glob("*.pt"):
        with suppress(ConfigError, OSError, KeyError):
            content = _read(path)
            folder, digests = centers_of(content, path)
            if folder != damaged and not _fault(folder, digests):
                intact.append((content["step"], path.name))
    names = ", ".join(f"{name} (step {step})" for step, name in sorted(intact, reverse=True))
    if not names:
        return "no intact checkpoint is beside it: train into another folder"
    if damaged.suffix == ".pt" and damaged.name != LAST:
        return f"give an intact one beside it: {names}"
    return (
        f"to resume from an intact one beside it, {names}, remove {LAST}, copy that one to {LAST} "
        "and run the same command again"
    )


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Publish a checkpoint atomically. ``content`` is builtins and tensors."""
    with publish_file(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)


def publish(
    folder: Path,
    content: Mapping[str, Any],
    centers: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    step: int,
    best_step: int,
    keep: int,
    written: bool = False,
) -> None:
    """Write ``last.pt``; at ``best_step``, ``best.pt`` too; keep the ``keep`` newest before it.

    First each rank writes its class centres into a new folder, so that there is a complete
    checkpoint at any instant; ``written`` means that those of this ``step`` exist already. Centres
    of older checkpoints that are neither kept nor the best are deleted. All ranks call it.

    Raises:
        ConfigError: if the disk is full or read-only.
    """
    home = folder / f"{CENTERS}_{step:09d}"
    failed: OSError | None = None
    try:
        if not written:
            _write_centers(home, centers, ranks)
        if ranks.first:
            digests = {file.name: sha256_file(file) for file in sorted(home.iterdir())}
            named = {"folder": home.name, "tensors": list(centers), "sha256": digests}
            write_checkpoint(folder / LAST, {**content, "centers": named})
            settle(folder, step=step, best_step=best_step, keep=keep)
    except (OSError, RuntimeError, CheckpointException) as error:
        failed = _disk_error(error)
        if failed is None:  # a full GPU, or a data worker that just died
            raise
    if ranks.all_reduce_max(int(failed is not None)):
        reason = (failed.strerror or failed) if failed else "another rank's disk"
        raise ConfigError(
            f"{folder}: the checkpoint of step {step} could not be written ({reason}); make "
            "room on the disk, or allow this user to write to the folder"
        ) from failed


def _disk_error(error: BaseException | None) -> OSError | None:
    """The system's error behind one of torch's."""
    while error is not None and not isinstance(error, OSError):
        if isinstance(error, CheckpointException):
            found = (_disk_error(failure) for failure, _ in error.failures.values())
            return next(filter(None, found), None)
        error = error.__cause__ or error.__context__
    return error


def settle(folder: Path, *, step: int, best_step: int, keep: int) -> None:
    """Give ``last.pt``, which is of ``step``, its other names, and delete what is too old.

    A resumed run calls it too, in case it was killed after it wrote ``last.pt``.
    """
    names = [BEST] if step == best_step else []
    names += [f"step_{step:09d}.pt"] if keep else []
    last = folder / LAST
    for path in (folder / name for name in names):
        if not (path.exists() and path.samefile(last)):
            with publish_file(path) as temporary:
                try:
                    os.link(last, temporary)
                except OSError:  # a file system without links
                    shutil.copyfile(last, temporary)
    if keep:
        for old in sorted(folder.glob("step_*.pt"))[: -(keep + 1)]:
            old.unlink()
    steps = {path.stem.removeprefix("step_") for path in folder.glob("step_*.pt")}
    steps |= {f"{step:09d}", f"{best_step:09d}"}
    for old in folder.glob(f"{CENTERS}_*"):
        if old.name.removeprefix(f"{CENTERS}_") not in steps:
            shutil.rmtree(old)
    sync_path(folder)


def _write_centers(folder: Path, centers: Mapping[str, Tensor], ranks: Ranks) -> None:
    failed: OSError | None = None
    if ranks.first:
        try:
            if folder.exists():  # of a run that was killed before a checkpoint named them
                shutil.rmtree(folder)
            folder.mkdir()
        except OSError as error:
            failed = error
    if ranks.all_reduce_max(int(failed is not None)):
        raise failed or OSError("another rank's disk")
    with _undistributed():
        state_dict_saver.save(
            dict(centers),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            no_dist=ranks.world_size == 1,
        )
    if ranks.first:
        for file in folder.iterdir():
            _sort_header(file)
            sync_path(file)
        sync_path(folder)


def _sort_header(file: Path) -> None:
    """Sort the names in the header of a .safetensors, which its writer orders by chance.

    So equal centres are equal files. The header: its length as u64, then JSON and spaces.
    """
    with file.open("r+b") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        opened.seek(8)
        opened.write(text.encode().ljust(length))


@contextmanager
def _undistributed() -> Iterator[None]:
    """Silence torch's warning that a single process is not distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def centers_of(content: Mapping[str, Any], path: Path) -> tuple[Path, dict[str, str]]:
    """Folder of the class centres of the checkpoint ``path``, and the sha256 of each file in it.

    Raises:
        ConfigError: if it names none, or files outside the checkpoint's folder.
    """
    try:
        folder, digests = content["centers"]["folder"], dict(content["centers"]["sha256"])
        if any(Path(name).name != name or name == ".." for name in (folder, *digests)):
            raise ValueError("a path")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected the name of a folder beside it with its class centres, got "
            f"{content.get('centers')!r:.200}; resume from a checkpoint that gkd wrote"
        ) from error
    return path.parent / folder, digests


def read_centers(
    folder: Path, centers: Mapping[str, Tensor], ranks: Ranks, *, sha256: Mapping[str, str]
) -> None:
    """Fill class centres and their optimizer state, written by any number of ranks.

    ``sha256`` is the hex digest of each file. All ranks call it.

    Raises:
        ConfigError: if files are missing, damaged or of another shape.
    """
    fault = _fault(folder, sha256) if ranks.first else ""
    if ranks.all_reduce_max(int(bool(fault))):
        ranks.fail(f"{fault}; {_alternatives(folder)}")
    try:
        with _undistributed():
            state_dict_loader.load(
                dict(centers),
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=not any(isinstance(tensor, DTensor) for tensor in centers.values()),
            )
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{folder}: expected the class centres of the checkpoint, got {reason}; "
            f"{_alternatives(folder)}"
        ) from error


def _fault(folder: Path, sha256: Mapping[str, str]) -> str:
    """What is wrong with the files of class centres; empty if they are as they were written."""
    if not folder.is_dir():
        return (
            f"{folder}: expected the class centres of the checkpoint beside it, got nothing; copy "
            "the complete folder of checkpoints, not one file"
        )
    for name, expected in sha256.items():
        file = folder / name
        found = sha256_file(file) if file.is_file() else "no file"
        if found != expected:
            return (
                f"{file}: expected the class centres of the checkpoint as they were written "
                f"(sha256 {expected[:12]}), got {found[:12]}"
            )
    for stray in sorted({file.name for file in folder.iterdir()} - set(sha256)):
        return (  # the centres would be read from it too
            f"{folder / stray}: expected only files that the checkpoint names in this folder, got "
            "another; move it away"
        )
    return ""


def require_same_run(
    content: Mapping[str, Any], config: RunConfig, data: RunData, path: Path
) -> None:
    """Refuse to resume with another configuration, other data or another cache.

    Raises:
        ConfigError: naming each key that differs.
        SpecMismatchError: if data or cache differ.
    """
    changed = describe_differences(
        _config_of(content["config"], path),
        config,
        old_name="was",
        new_name="now",
        ignore=FREE_KEYS,
    )
    if changed:
        raise ConfigError(
            f"{path}: the run was started with another configuration ({'; '.join(changed)}); set "
            "these back to resume, or train into another folder"
        )
    names = ("number of images", "number of classes", "records (fingerprint)", "cache (id)")
    old, new = (
        {name: value or "none" for name, value in zip(names, values, strict=True)}
        for values in (content["data"], data)
    )
    faults = describe_differences(old, new, old_name="was", new_name="now")
    if faults:
        raise SpecMismatchError(
            f"{path}: the run was started with other data ({'; '.join(faults)}); give the same "
            "records and targets to resume, or train into another folder"
        )


def _config_of(content: Mapping[str, Mapping[str, Any]], path: Path) -> RunConfig:
    try:
        return stored_config(content)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: its configuration is invalid: {error}") from error
