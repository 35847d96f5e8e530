"""Checkpoints: written whole or not at all, read without running their code."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
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
from gkd.storage.util.files import publish_file, sha256_file, sync_file, sync_folder
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones import build_backbone
from gkd.trainer.config import RunConfig, StudentConfig
from gkd.trainer.config_file import differences, stored_config
from gkd.trainer.distributed import Ranks

FORMAT = 1
FOLDER = "checkpoints"
LAST, BEST = "last.pt", "best.pt"
CENTERS = "centers"


class RunData(NamedTuple):
    """What a run may not change on its way: its data, and the cache that teaches it."""

    num_images: int
    num_classes: int
    dataset: str  # fingerprint of the records
    cache_id: str  # empty without distillation


class Student(NamedTuple):
    """A trained backbone in eval mode, float [B, 3, 112, 112] to [B, D], and what became of it.

    config    settings of its run
    data      what it was trained on
    step      steps that were taken
    accuracy  of the evaluation then, by verification set
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
    """The student of a run folder (its best checkpoint, else its last) or of a ``.pt`` of one.

    Raises:
        ConfigError: where there is no checkpoint, or the file is none of gkd's.
    """
    path = Path(path)
    if path.is_dir():
        path = chosen_checkpoint(path)
    content = read_checkpoint(path)
    config = _config_of(content, path)
    backbone = student_backbone(config.student)
    lacking = [name for name in ("model", "data", "step", "accuracy") if name not in content]
    if lacking:
        raise ConfigError(
            f"{path}: expected a checkpoint of a run, it lacks {', '.join(lacking)}; give the "
            "folder of a run of `gkd train-student`, or a file in its checkpoints/"
        )
    try:
        backbone.load_state_dict(content["model"])
        data = RunData(*content["data"])
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{path}: its weights do not fit its configuration: {error}") from error
    return Student(backbone.eval(), config, data, content["step"], content["accuracy"])


def chosen_checkpoint(run: Path) -> Path:
    """The checkpoint that stands for a run folder: its best, else its last.

    Raises:
        ConfigError: where the folder has neither.
    """
    for name in (BEST, LAST):
        if (run / FOLDER / name).exists():
            return run / FOLDER / name
    raise ConfigError(
        f"{run}: expected the folder of a run of `gkd train-student`, found no {FOLDER}/{LAST} in "
        "it; give such a folder, or the weights file itself"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``write_checkpoint`` was given, on the CPU.

    Raises:
        ConfigError: for a file that is absent, damaged or not a checkpoint of gkd.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: expected a checkpoint, found none; give the folder of a run of "
            "`gkd train-student`, or one of the .pt files in its checkpoints/"
        )
    try:
        return _whole(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_ways_on(path)}") from error


def _whole(path: Path) -> dict[str, Any]:
    """A checkpoint's content; raises ConfigError where it is damaged or none, with no remedy."""
    content = read_torch_file(path, remedy="")
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: not a checkpoint of gkd's format {FORMAT}; weights of other programs are "
            "read as a backbone, not as a run"
        )
    return dict(content)


def _ways_on(damaged: Path) -> str:
    """What to do in place of a checkpoint, or a folder of class centres, that is ``damaged``."""
    whole: dict[str, int] = {}
    for path in damaged.parent.glob("*.pt"):
        try:
            content = _whole(path)
            folder, digests = centers_of(content, path)
            if folder != damaged and not _fault(folder, digests):
                whole[path.name] = content["step"]
        except (ConfigError, OSError, KeyError):
            continue
    newest = sorted(whole, key=lambda name: -whole[name])
    told = ", ".join(f"{name} (step {whole[name]})" for name in newest)
    if not told:
        return "no whole checkpoint stands beside it: train into another folder"
    if damaged.suffix == ".pt" and damaged.name != LAST:
        return f"give a whole one that stands beside it: {told}"
    return (
        f"to go on from a whole one that stands beside it, {told}, remove {LAST}, copy that one to "
        f"{LAST} and run the same command again"
    )


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Publish a checkpoint: written aside, synced, renamed. ``content`` is builtins and tensors."""
    with publish_file(path) as aside, aside.open("wb") as file:
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

    Each rank writes its class centres into a folder of their own first, so that what stands is
    whole at any instant; ``written`` says that those of this ``step`` stand already. Centres of
    older checkpoints that are not kept, nor the best, are deleted. All ranks call it.

    Raises:
        ConfigError: where the disk is full or closed.
    """
    where = folder / f"{CENTERS}_{step:09d}"
    failed: BaseException | None = None
    try:
        if not written:
            _write_centers(where, centers, ranks)
        if ranks.first:
            digests = {file.name: sha256_file(file) for file in sorted(where.iterdir())}
            named = {"folder": where.name, "tensors": list(centers), "sha256": digests}
            write_checkpoint(folder / LAST, {**content, "centers": named})
            settle(folder, step=step, best_step=best_step, keep=keep)
    except (OSError, RuntimeError, CheckpointException) as error:
        # No fault of the disk: a death that was met here by chance, or a GPU that is full.
        if worker_death(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        failed = error
    if ranks.all_reduce_max(int(failed is not None)):
        reason = _reason(failed) if failed else "another rank's disk"
        raise ConfigError(
            f"{folder}: the checkpoint of step {step} could not be written ({reason}); make "
            "room on the disk, or open the folder to this user"
        ) from failed


def worker_death(error: BaseException) -> str:
    """What torch says of a killed data worker, wherever it raised it; empty for another error.

    One that is killed while it hands a batch over leaves a connection that is cut, and no word.
    """
    if isinstance(error, ConnectionResetError):
        return str(error)
    told = (re.search(r"DataLoader worker.*", str(each)) for each in _chain(error))
    return next((found[0] for found in told if found), "")


def _reason(error: BaseException) -> str:
    """What the system said, where torch's own words hide it; else the last line."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
    return str(error).strip().splitlines()[-1]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def settle(folder: Path, *, step: int, best_step: int, keep: int) -> None:
    """Make the rest fit ``last.pt``, which is of ``step``: its other names, and what is too old.

    A resumed run calls it too, for one that was killed after it wrote ``last.pt``.
    """
    names = [BEST] if step == best_step else []
    names += [f"step_{step:09d}.pt"] if keep else []
    for name in names:
        if not _same_file(folder / LAST, folder / name):
            _duplicate(folder / LAST, folder / name)
    if keep:
        for old in sorted(folder.glob("step_*.pt"))[: -(keep + 1)]:
            old.unlink()
    steps = {path.stem.removeprefix("step_") for path in folder.glob("step_*.pt")}
    steps |= {f"{step:09d}", f"{best_step:09d}"}
    for old in folder.glob(f"{CENTERS}_*"):
        if old.name.removeprefix(f"{CENTERS}_") not in steps:
            shutil.rmtree(old)
    sync_folder(folder)


def _write_centers(folder: Path, centers: Mapping[str, Tensor], ranks: Ranks) -> None:
    failed: OSError | None = None
    if ranks.first:
        try:
            if folder.exists():  # of a run that was killed before it named them
                shutil.rmtree(folder)
            folder.mkdir()
        except OSError as error:
            failed = error
    if ranks.all_reduce_max(int(failed is not None)):
        raise failed or OSError("another rank's disk")
    with warnings.catch_warnings():
        # torch tells a process that is alone that it is.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save(
            dict(centers),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            no_dist=ranks.world_size == 1,
        )
    if ranks.first:
        for file in folder.iterdir():
            sync_file(file)
        sync_folder(folder)


def centers_of(content: Mapping[str, Any], path: Path) -> tuple[Path, dict[str, str]]:
    """Folder of the class centres of the checkpoint ``path``, and the sha256 of each file in it.

    Raises:
        ConfigError: where it names none, or files that are not beside it.
    """
    try:
        folder, digests = content["centers"]["folder"], dict(content["centers"]["sha256"])
        if any(Path(name).name != name or name == ".." for name in (folder, *digests)):
            raise ValueError("a path")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected the name of a folder beside it with its class centres, got "
            f"{content.get('centers')!r:.200}; go on from a checkpoint that gkd wrote"
        ) from error
    return path.parent / folder, digests


def read_centers(
    folder: Path,
    centers: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    sha256: Mapping[str, str],
) -> None:
    """Fill class centres, and what belongs to them, from whatever number of ranks wrote them.

    ``sha256`` is the hex digest of each file. All ranks call it.

    Raises:
        ConfigError: where they are missing, damaged or of another shape.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: expected the class centres of the checkpoint beside it, got nothing; copy "
            f"the whole folder of checkpoints, not one file; {_ways_on(folder)}"
        )
    fault = _fault(folder, sha256) if ranks.first else ""
    if ranks.all_reduce_max(int(bool(fault))):
        ranks.fail(f"{fault}; {_ways_on(folder)}")
    alone = not any(isinstance(tensor, DTensor) for tensor in centers.values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            state_dict_loader.load(
                dict(centers),
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=alone,
            )
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{folder}: expected the class centres of the checkpoint, got {reason}; "
            f"{_ways_on(folder)}"
        ) from error


def _fault(folder: Path, sha256: Mapping[str, str]) -> str:
    """What is wrong with the files of class centres; empty where they are as they were written."""
    for name, expected in sha256.items():
        file = folder / name
        found = sha256_file(file) if file.is_file() else "no file"
        if found != expected:
            return (
                f"{file}: expected the class centres of the checkpoint as they were written "
                f"(sha256 {expected[:12]}), got {found[:12]}"
            )
    return "" if folder.is_dir() else f"{folder}: expected class centres, got nothing"


def _same_file(path: Path, name: Path) -> bool:
    return name.exists() and name.samefile(path)


def _duplicate(path: Path, name: Path) -> None:
    """A second name for a whole file: a link, or a copy where the disk knows no links."""
    with publish_file(name) as aside:
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)


def require_same_run(
    content: Mapping[str, Any], config: RunConfig, data: RunData, path: Path
) -> None:
    """Refuse to go on with another configuration, other data or another cache.

    Raises:
        ConfigError: naming each key that differs.
        SpecMismatchError: where data or cache differ.
    """
    changed = differences(_config_of(content, path), config)
    if changed:
        raise ConfigError(
            f"{path}: the run was begun with another configuration ({'; '.join(changed)}); set "
            "these back to go on, or train into another folder"
        )
    begun = RunData(*content["data"])
    if begun != data:
        names = ("number of images", "number of classes", "records (fingerprint)", "cache (id)")
        faults = [
            f"{name}: {old or 'none'}, now {new or 'none'}"
            for name, old, new in zip(names, begun, data, strict=True)
            if old != new
        ]
        raise SpecMismatchError(
            f"{path}: the run was begun with other data ({'; '.join(faults)}); give the same "
            "records and targets to go on, or train into another folder"
        )


def _config_of(content: Mapping[str, Any], path: Path) -> RunConfig:
    try:
        return stored_config(content["config"])
    except (KeyError, AttributeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: its configuration cannot be: {error}") from error
