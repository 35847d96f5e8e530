"""Ranks, cores and GPUs of a process started by torchrun."""

import os

import pytest

from gkd.storage.util import torchrun_env


def test_cores_are_shared_among_the_processes_of_a_node(
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


def test_only_rank_0_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (torchrun_env.rank(), torchrun_env.world_size()) == (0, 1)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        torchrun_env.log_rank0(f"rank {rank}")
    assert capsys.readouterr().err == "rank 0\n"


def test_a_rank_takes_one_of_its_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """All GPUs of the node are visible, or only its own."""
    assert (torchrun_env.local_rank(), torchrun_env.own_gpu(4)) == (None, 0)
    for number in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert (torchrun_env.own_gpu(4), torchrun_env.own_gpu(1)) == (number, 0)
