"""Ranks, cores and GPUs of a process started by torchrun."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gkd.storage.errors import ConfigError
from gkd.storage.util import torchrun_env

ASKED: list[Callable[[], object]] = [
    torchrun_env.world_size,
    torchrun_env.rank,
    torchrun_env.local_world_size,
    torchrun_env.local_rank,
    torchrun_env.meeting_point,
]


@pytest.fixture(autouse=True)
def no_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have one."""
    monkeypatch.setattr(torchrun_env, "cpu_quota", lambda _: float("inf"))


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_cores_are_shared_among_the_processes_of_a_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert (torchrun_env.all_cores(), torchrun_env.usable_cores()) == (allowed, allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    launched(monkeypatch, WORLD_SIZE="64", LOCAL_WORLD_SIZE="6")
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
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        torchrun_env.log_rank0(f"rank {rank}")
    assert capsys.readouterr().err == "rank 0\n"


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": " "},
        {"LOCAL_WORLD_SIZE": "0", "LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "none", "LOCAL_WORLD_SIZE": "8"},
        {"RANK": "$SLURM_PROCID", "MASTER_PORT": "tcp://10.0.0.1:80"},
    ],
)
def test_what_templates_leave_means_nothing_to_a_process_alone(
    left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, **left)
    assert [ask() for ask in ASKED[:4]] == [1, 0, 1, None]
    assert torchrun_env.usable_cores() == torchrun_env.all_cores()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "0", "from 1 to 1,000,000"),
        ("WORLD_SIZE", "-2", "from 1 to"),
        ("WORLD_SIZE", "two", "from 1 to"),
        ("WORLD_SIZE", "9" * 5000, "from 1 to"),
        ("RANK", "", "from 0 to 3"),
        ("RANK", "4", "from 0 to 3"),
        ("LOCAL_WORLD_SIZE", "0", "from 1 to 4"),
        ("LOCAL_WORLD_SIZE", "5", "from 1 to 4"),
        ("LOCAL_RANK", "-1", "from 0 to 1"),
        ("LOCAL_RANK", "2", "from 0 to 1"),
        ("MASTER_ADDR", "", "the address of rank 0"),
        # Kubernetes sets this for a service of the name "master".
        ("MASTER_PORT", "tcp://10.0.0.1:29500", "from 1 to 65,535"),
        ("MASTER_PORT", "", "from 1 to 65,535"),
    ],
)
def test_half_of_a_launch_is_refused_by_the_variable(
    name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    whole |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    launched(monkeypatch, **whole)
    assert [ask() for ask in ASKED] == [4, 1, 2, 1, ("localhost", 29500)]
    monkeypatch.setenv(name, value)

    def ask_all() -> None:
        for ask in ASKED:
            ask()

    with pytest.raises(ConfigError, match=rf"variable {name}\b.*{expected}.* unset WORLD_SIZE"):
        ask_all()


def test_nothing_is_read_on_import() -> None:
    env = {**os.environ, "WORLD_SIZE": "x", "LOCAL_WORLD_SIZE": "0", "RANK": "", "LOCAL_RANK": "-"}
    subprocess.run([sys.executable, "-c", "import gkd.cli"], env=env, check=True)


def test_a_rank_takes_one_of_its_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """All GPUs of the node are visible, or only its own."""
    assert (torchrun_env.local_rank(), torchrun_env.own_gpu(4)) == (None, 0)
    monkeypatch.setenv("WORLD_SIZE", "6")
    for number in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert (torchrun_env.own_gpu(4), torchrun_env.own_gpu(1)) == (number, 0)
    launched(monkeypatch, LOCAL_RANK="4", LOCAL_WORLD_SIZE="5")
    with pytest.raises(ConfigError, match=r"rank 4 of this node .* at most 4 ranks .*, got 5"):
        torchrun_env.own_gpu(4)


def test_one_of_many_processes_of_another_launcher_says_that_it_works_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(monkeypatch, SLURM_PROCID="0", SLURM_NTASKS="4", PMI_RANK="")
    torchrun_env.note_other_launcher()  # the only one, where sbatch runs a script
    launched(monkeypatch, OMPI_COMM_WORLD_RANK="2", OMPI_COMM_WORLD_SIZE="4")
    torchrun_env.note_other_launcher()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "OMPI_COMM_WORLD_RANK=2 of OMPI_COMM_WORLD_SIZE=4: each process that mpi"
    )


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        (
            {  # a limit above the own group
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            },
            2.0,
        ),
        (
            {  # version 1, a path of the host's that is not visible inside
                "proc/self/cgroup": "4:memory:/x\n2:cpuacct,cpu:/docker/0123\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            float("inf"),
        ),
        ({"proc/self/cgroup": "nonsense\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_containers_quota_bounds_the_cores(
    files: dict[str, str], cores: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    quota = torchrun_env.cpu_quota(tmp_path)
    assert quota == cores
    monkeypatch.setattr(torchrun_env, "cpu_quota", lambda _: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert torchrun_env.all_cores() == {1.5: 2, 2.0: 2, 0.5: 1}.get(quota, 16)
