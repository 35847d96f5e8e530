"""What torchrun told, and cores."""

import os

import pytest

from gkd.storage.util import torchrun_env


def test_cores_are_those_allowed_and_shared_among_a_nodes_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert (torchrun_env.all_cores(), torchrun_env.usable_cores()) == (allowed, allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert (torchrun_env.all_cores(), torchrun_env.usable_cores()) == (16, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert torchrun_env.usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert (torchrun_env.all_cores(), torchrun_env.usable_cores()) == (64, 2)


def test_one_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (torchrun_env.rank(), torchrun_env.world_size()) == (0, 1)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        torchrun_env.log_rank0(f"said by {rank}")
    assert capsys.readouterr().err == "said by 0\n"


def test_a_rank_takes_a_gpu_that_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """All GPUs of the node, or its own alone."""
    assert (torchrun_env.local_rank(), torchrun_env.own_gpu(4)) == (None, 0)
    for number in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert (torchrun_env.own_gpu(4), torchrun_env.own_gpu(1)) == (number, 0)
