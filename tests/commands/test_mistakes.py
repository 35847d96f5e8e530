"""Mistakes of a user: each ends in one message."""

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from gkd.storage.cache.verify import verify
from tests.caches import make_cache
from tests.commands.running import fails, gkd

pytestmark = pytest.mark.usefixtures("materialised")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train-student", "faces", "r", "--set", "train.epoch=3"), "did you mean train.epoc"),
        (("train-student", "faces", "r", "--student", "resnet"), "iresnet50"),
        (
            ("train-student", "nowhere", "r", "--without-kd"),
            "nowhere: expected a folder with train.rec",
        ),
        (("train-student", "faces", "faces", "r"), "expected a cache of targets"),
        (("records", "verify", "teacher.pt"), "expected a folder with train.rec"),
        (("targets", "verify", "faces"), "expected a cache of targets"),
        (("evaluate", "nothing.pt", "others.bin"), "nothing.pt"),
        (("evaluate", "teacher.pt", "teacher.pt"), "teacher.pt"),
        (("evaluate", "teacher.pt", "others.bin", "--arch", "iresnet50"), "fit iresnet50"),
        (("export", "nowhere", "out.onnx"), "nowhere"),
        (("export", "faces", "out.pt"), "expected a name that ends in .onnx or .safetensors, got"),
        (("export", "faces", "out.onnx"), "faces: not a gkd run folder"),
        (("evaluate", "teacher.pt", "others.bin", "--plot", "no/x.png"), "there is no folder no"),
        (("evaluate", "teacher.pt", "others.bin", "--plot", "faces"), "got a folder; name a file"),
        (("targets", "stats", "targets.gkd", "--plot", "no/x.png"), "there is no folder no"),
    ],
)
def test_a_mistake_ends_in_one_message(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(home)
    stderr = fails(*arguments)
    assert stderr.startswith("Error: ")
    assert message in stderr


def test_no_copies_of_targets_go_into_a_cache(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path / "c.gkd")
    monkeypatch.setenv("GKD_CACHE_DIR", str(cache.path / "copies"))
    stderr = fails("train-student", home / "faces", cache.path, tmp_path / "run")
    assert f"inside the cache {cache.path}, which it would damage" in stderr
    assert verify(cache.path).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "2"), "threshold: expected from 0 to 1, got 2"),
        (("--views", "flopped"), "views: expected original, flipped"),
        (("--centers", "nothing.npy"), "nothing.npy"),
        (("--device", "abacus"), "device: expected auto, cpu"),
        (("--teacher", "nothing.onnx"), "nothing.onnx"),
        (("--teacher", "."), ".: not a gkd run folder"),
    ],
)
def test_a_wrong_option_of_cache_teacher_is_explained(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(home)
    given = {"--teacher": "teacher.pt", "--centers": "class-mean"} | {options[0]: options[1]}
    stderr = fails(
        "cache-teacher", "faces", "out.gkd", *(word for pair in given.items() for word in pair)
    )
    assert message in stderr
    assert not (home / "out.gkd").exists()


@pytest.mark.parametrize(
    "option", [("--compile",), ("--precision", "bfloat16"), ("--arch", "iresnet50")], ids=str
)
def test_options_that_do_not_apply_to_onnx_are_refused(
    home: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    teacher = ("--teacher", home / "teacher.onnx", "--centers", "class-mean", *option)
    stderr = fails("cache-teacher", home / "faces", tmp_path / "c.gkd", *teacher)
    named = " ".join(option)
    assert f"teacher.onnx: {named}: expected weights for a torch network, got an ONNX" in stderr


def test_running_out_of_memory_ends_in_one_message(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    for error in (
        MemoryError("Unable to allocate 3 TiB"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 TiB"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),  # ulimit -v
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 3 TiB"),
    ):
        monkeypatch.setattr("gkd.pipeline.run.cache_teacher", Mock(side_effect=error))
        stderr = fails("cache-teacher", home / "faces", tmp_path / "c.gkd", *huge)
        assert "out of memory" in stderr
        assert "use a smaller batch (--batch-size" in stderr
    monkeypatch.setattr("gkd.pipeline.run.cache_teacher", Mock(side_effect=RuntimeError("a bug")))
    command = ("cache-teacher", home / "faces", tmp_path / "c.gkd", *huge)
    assert "unexpected RuntimeError: a bug\nThis is a bug in gkd, or a file" in fails(*command)
    monkeypatch.setenv("GKD_TRACEBACK", "1")
    assert isinstance(gkd(*command).exception, RuntimeError)


def test_centres_are_class_means_or_files(home: Path) -> None:
    both = ("--centers", "class-mean", "--centers", "x.npy", "--teacher", home / "teacher.pt")
    stderr = fails("cache-teacher", home / "faces", home / "out.gkd", *both)
    assert "--centers: expected either class-mean alone or files, got class-mean x.npy" in stderr


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stderr = fails("evaluate", "no.pt", home / "others.bin", "--plot", tmp_path / "x.png")
    assert "pip install '.[plot]'" in stderr


def test_wrong_usage_is_exit_code_2(home: Path) -> None:
    assert "Missing option '--teacher'" in fails("cache-teacher", "a", "b", code=2)
    numbers = ("--teacher", "t", "--centers", "class-mean", "--temperatures", "one")
    assert "expected numbers such as 1,2,4" in fails("cache-teacher", "a", "b", *numbers, code=2)
    numbers = ("--teacher", "t", "--centers", "class-mean", "--shard-samples", "many")
    assert "--draw-from sets how classes are drawn; give --draws above 0 too" in fails(
        *("cache-teacher", "a", "b", "--teacher", "t", "--centers", "class-mean"),
        *("--draws", "0", "--draw-from", "all"),
        code=2,
    )
    assert "expected auto or a whole number" in fails("cache-teacher", "a", "b", *numbers, code=2)
