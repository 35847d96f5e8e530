"""Checkpoints: complete or absent, read without running code, refused if they do not fit."""

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from gkd.storage.errors import ConfigError, GkdError, SpecMismatchError
from gkd.trainer.checkpoint import (
    RunData,
    centers_of,
    load_student,
    publish,
    read_centers,
    read_checkpoint,
    require_same_run,
    settle,
    student_backbone,
    write_checkpoint,
)
from gkd.trainer.distributed import ALONE
from tests.trainer.faces import small_config

CONFIG = small_config()
DATA = RunData(10, 3, "aa", "bb")
CENTERS = {"weight": torch.ones(3, 8)}
CENTERS_FILE = "shard-00001-model-00001-of-00001.safetensors"


def content(value: float = 0.5, **more: object) -> dict[str, object]:
    model = student_backbone(CONFIG.student)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return {
        "config": msgspec.to_builtins(CONFIG),
        "data": list(DATA),
        "model": model.state_dict(),
        "step": 0,
        "accuracy": {},
        **more,
    }


def test_a_student_loads_in_eval_mode_with_its_settings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.pt", content(0.25))
    student = load_student(tmp_path / "x.pt")
    assert not student.backbone.training
    assert student.config == CONFIG
    assert {p.unique().item() for p in student.backbone.parameters()} == {0.25}


def test_of_a_run_folder_the_best_checkpoint_is_read_else_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first, second = content(0.25), content(0.75)
    publish(folder, first, CENTERS, ALONE, step=1, best_step=-1, keep=0)
    assert next(load_student(tmp_path).backbone.parameters()).unique().item() == 0.25
    publish(folder, second, CENTERS, ALONE, step=2, best_step=2, keep=0)
    publish(folder, first, CENTERS, ALONE, step=3, best_step=2, keep=0)
    assert next(load_student(tmp_path).backbone.parameters()).unique().item() == 0.75
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt",
        "centers_000000002",
        "centers_000000003",
        "last.pt",
    ]


def test_older_checkpoints_are_kept_as_configured(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        publish(tmp_path, content(step=step), CENTERS, ALONE, step=step, best_step=-1, keep=2)
    centers = sorted(path.name for path in tmp_path.glob("centers_*"))
    assert centers == [f"centers_{step:09d}" for step in (10, 15, 20)]
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["last.pt", *(f"step_{step:09d}.pt" for step in (10, 15, 20))]
    assert read_checkpoint(tmp_path / "step_000000010.pt")["step"] == 10
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 20


def test_without_links_a_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    publish(tmp_path, content(step=1), CENTERS, ALONE, step=1, best_step=1, keep=0)
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 1


def test_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, content(step=1))
    with pytest.raises(AttributeError):
        write_checkpoint(path, content(step=lambda: None))
    assert read_checkpoint(path)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("x.pt"), content(step=Payload()))
    with pytest.raises(ConfigError, match=r"x\.pt: cannot be read .* none that would run code"):
        load_student(Path("x.pt"))
    assert not Path("ran").exists()


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.pt", content())
    complete = (tmp_path / "x.pt").read_bytes()
    for cut in (0, 10, len(complete) // 2):
        (tmp_path / "x.pt").write_bytes(complete[:cut])
        with pytest.raises(ConfigError, match=r"x\.pt: cannot be read as weights"):
            load_student(tmp_path / "x.pt")


def flip(path: Path, part: bytes) -> None:
    """Flip the lowest bit in the middle of ``part`` of a file."""
    content = bytearray(path.read_bytes())
    assert content.count(part) == 1
    content[content.index(part) + len(part) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_an_intact_checkpoint_named(tmp_path: Path) -> None:
    mark = torch.arange(7, 1007)
    for step in (5, 10, 15):
        state = content(step=step, mark=mark)
        publish(tmp_path, state, CENTERS, ALONE, step=step, best_step=5, keep=3)
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    flip(last, mark.numpy().tobytes())  # step_000000015.pt is the same file
    flip(tmp_path / "centers_000000010" / CENTERS_FILE, CENTERS["weight"].numpy().tobytes())
    with pytest.raises(ConfigError) as error:
        read_checkpoint(last)
    message = str(error.value)
    assert re.search(r"last\.pt: .* the checksum of archive/data/\d+ does not match", message)
    named = set(re.findall(r"(\S+\.pt) \(step (\d+)\)", message))
    assert named == {("best.pt", "5"), ("step_000000005.pt", "5")}
    assert "remove last.pt, copy that one to last.pt and run the same command again" in message
    flip(best, mark.numpy().tobytes())
    with pytest.raises(ConfigError, match="no intact checkpoint is beside it: train into"):
        read_checkpoint(last)
    with pytest.raises(ConfigError, match=r"best\.pt: its bytes are not those that were written"):
        load_student(tmp_path / "best.pt")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_centers_are_found(tmp_path: Path, damage: str) -> None:
    for step in (5, 10):
        publish(tmp_path, content(step=step), CENTERS, ALONE, step=step, best_step=-1, keep=1)
    file = tmp_path / "centers_000000010" / CENTERS_FILE
    if damage == "flip":
        flip(file, CENTERS["weight"].numpy().tobytes())
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        file.unlink()
    digests = read_checkpoint(tmp_path / "last.pt")["centers"]["sha256"]
    with pytest.raises(GkdError) as error:
        read_centers(file.parent, {"weight": torch.empty(3, 8)}, ALONE, sha256=digests)
    message = str(error.value)
    assert f"{file}: expected the class centres of the checkpoint as they were written" in message
    assert "got no file" in message or damage != "gone"
    assert "beside it, step_000000005.pt (step 5), remove last.pt, copy" in message


def test_names_missing_after_a_kill_are_added(tmp_path: Path) -> None:
    """Killed between the rename of last.pt and the link of best.pt."""
    for step in (5, 10):
        publish(tmp_path, content(step=step), CENTERS, ALONE, step=step, best_step=5, keep=0)
    write_checkpoint(
        tmp_path / "last.pt", {**read_checkpoint(tmp_path / "last.pt"), "best_step": 10}
    )
    settle(tmp_path, step=10, best_step=10, keep=0)
    assert read_checkpoint(tmp_path / "best.pt")["step"] == 10
    assert [path.name for path in tmp_path.glob("centers_*")] == ["centers_000000010"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"x\.pt: not a checkpoint of gkd's format 1"):
        load_student(tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"gone\.pt: expected a checkpoint, found none"):
        load_student(tmp_path / "gone.pt")
    with pytest.raises(ConfigError, match=r"not a gkd run folder: found no checkpoints.last\.pt"):
        load_student(tmp_path)


def test_weights_of_another_student_are_refused(tmp_path: Path) -> None:
    wide = small_config("student.width=0.5")
    write_checkpoint(tmp_path / "x.pt", {**content(), "config": msgspec.to_builtins(wide)})
    with pytest.raises(ConfigError, match=r"x\.pt: its weights do not fit its configuration"):
        load_student(tmp_path / "x.pt")


def test_an_invalid_configuration_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.pt", {**content(), "config": {"train": {"epochs": 0}}})
    with pytest.raises(ConfigError, match=r"x\.pt: its configuration is invalid: .*epochs"):
        load_student(tmp_path / "x.pt")


def test_resuming_needs_the_same_configuration(tmp_path: Path) -> None:
    other = small_config("train.seed=5", "optimizer.lr=0.2", "data.workers=3")
    with pytest.raises(ConfigError) as error:
        require_same_run(content(), other, DATA, tmp_path)
    assert "optimizer.lr: was 0.1, now 0.2; train.seed: was 0, now 5" in str(error.value)
    assert "workers" not in str(error.value)
    require_same_run(content(), small_config("data.workers=3"), DATA, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA._replace(cache_id="cc"), r"cache \(id\): was bb, now cc"),
        (DATA._replace(cache_id=""), r"cache \(id\): was bb, now none"),
        (DATA._replace(dataset="dd"), r"records \(fingerprint\): was aa, now dd"),
        (DATA._replace(num_classes=4), "number of classes: was 3, now 4"),
    ],
)
def test_resuming_needs_the_same_data(data: RunData, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecMismatchError, match=message):
        require_same_run(content(), CONFIG, data, tmp_path)


@pytest.mark.parametrize("folder", ["../elsewhere", "/tmp", "..", None])
def test_class_centres_in_other_folders_are_refused(tmp_path: Path, folder: str | None) -> None:
    path = tmp_path / "last.pt"
    content: dict[str, Any] = {"centers": {"folder": folder, "sha256": {"a.safetensors": ""}}}
    with pytest.raises(ConfigError, match=r"last\.pt: expected the name of a folder beside it"):
        centers_of(content, path)
    content = {"centers": {"folder": "centers", "sha256": {"../a": ""}}}
    with pytest.raises(ConfigError, match=r"last\.pt: expected the name of a folder beside it"):
        centers_of(content, path)
    content["centers"]["sha256"] = {"a": "0"}
    assert centers_of(content, path) == (tmp_path / "centers", {"a": "0"})
