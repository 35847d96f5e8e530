import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gkd.storage.errors import ConfigError, GkdError, IncompleteCacheError
from gkd.storage.util import lock
from gkd.storage.util.lock import Holder, WriteLock


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "faces.gkd"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)


def leave(target: Path, **changes: Any) -> Path:
    """The file of another process, by default one of this very machine that is long dead."""
    fields = {"rank": 0, "world_size": 1, "host": "elsewhere", "machine": lock._machine()}
    holder = Holder(**{**fields, "pid": 2**22, "born": "1", "started": "then", **changes})
    path = WriteLock(target).folder / "other.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.encode(holder))
    return path


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """Somebody on another machine who touches a file."""
    stop = threading.Event()

    def beat() -> None:
        for n in range(10**6):
            if stop.wait(0.02):
                return
            os.utime(path, ns=(n, n))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def another_process(target: Path, rank: int = 0, world_size: int = 1) -> Iterator[int]:
    """A real process that holds a lock until it is told to go, or dies."""
    code = (
        "import sys; from pathlib import Path; from gkd.storage.util.lock import WriteLock\n"
        "with WriteLock(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target), str(rank), str(world_size)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield process.pid
        if process.poll() is None:
            process.communicate(timeout=60)


def test_the_second_run_is_refused_with_the_first_ones_host_process_and_start(
    target: Path,
) -> None:
    with another_process(target) as pid:
        with pytest.raises(ConfigError) as caught, WriteLock(target):
            pass
        message = str(caught.value)
        assert message.startswith(f"{target}: another run is writing it: rank 0 of 1, process")
        assert f"process {pid} on {socket.gethostname()}, started 20" in message
        assert re.search(r"started \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for its end", message)
    with WriteLock(target):
        pass
    assert not WriteLock(target).folder.exists()


def test_a_killed_owner_is_recognised_and_its_file_deleted(target: Path) -> None:
    with another_process(target) as pid:
        (left,) = WriteLock(target).folder.iterdir()
        os.kill(pid, signal.SIGKILL)
        # Not yet asked for its end by its parent, so the system still has an entry for it.
        while lock._born(pid) not in ("", None):
            time.sleep(0.01)
        with WriteLock(target):
            assert not left.exists()
    assert not left.parent.exists()


def test_another_process_with_the_id_of_a_dead_one_is_not_it(target: Path) -> None:
    left = leave(target, pid=os.getpid(), born="1")
    with WriteLock(target):
        assert not left.exists()


def test_ranks_of_one_run_hold_it_together(target: Path) -> None:
    with another_process(target, 1, 2), WriteLock(target, 0, 2):
        assert len(list(WriteLock(target).folder.iterdir())) == 2


@pytest.mark.parametrize(("rank", "world_size"), [(1, 2), (0, 3)])
def test_the_same_rank_or_another_world_size_is_another_run(
    target: Path, rank: int, world_size: int
) -> None:
    with another_process(target, 1, 2):
        other = WriteLock(target, rank, world_size)
        with pytest.raises(ConfigError, match="another run is writing it: rank 1 of 2"), other:
            pass
        # Whoever gave way left nothing behind, and the owner is as it was.
        assert len(list(other.folder.iterdir())) == 1


def test_an_owner_on_another_machine_that_gives_signs_is_respected(
    target: Path, quick: None
) -> None:
    path = leave(target, machine="another", host="far-away")
    with (
        beating(path),
        pytest.raises(ConfigError, match="rank 0 of 1, process 4194304 on far-away"),
        WriteLock(target),
    ):
        pass


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_silent_owner_on_another_machine_is_taken_over(
    target: Path, quick: None, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave(target, machine="another")
    if content is not None:
        path.write_bytes(content)
    began = time.monotonic()
    with WriteLock(target):
        assert time.monotonic() - began >= lock.SILENT_SECONDS
        assert not path.exists()
    assert "wait for a sign of life of" in capsys.readouterr().err


def test_a_lock_gives_signs(target: Path, quick: None) -> None:
    with WriteLock(target) as held:
        (path,) = held.folder.iterdir()
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            time.sleep(0.01)


def test_who_was_taken_for_dead_writes_nothing_more(target: Path) -> None:
    with WriteLock(target, 2, 3) as held:
        held.check()
        (path,) = held.folder.iterdir()
        path.unlink()
        with pytest.raises(GkdError, match=r"rank 2 of 3 .* taken for dead, so another"):
            held.check()


def test_waiting_ends_when_the_work_is_done(target: Path, quick: None) -> None:
    answers = iter([False, False, True])
    with WriteLock(target, 0, 2) as held:
        held.wait_for(lambda: next(answers))
    assert next(answers, None) is None


def test_waiting_ends_with_an_error_when_a_rank_dies(target: Path, quick: None) -> None:
    with another_process(target, 1, 2) as pid, WriteLock(target, 0, 2) as held:
        kill = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        kill.start()
        message = r"rank 1 of 2 ended before all was written; .* run the same command again"
        with pytest.raises(IncompleteCacheError, match=message):
            held.wait_for(lambda: False)
        kill.join()


def test_a_rank_that_died_before_anybody_waited_for_it_is_missed(
    target: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after the time that a rank has to come."""
    monkeypatch.setattr(lock, "ARRIVAL_SECONDS", 1e9)
    with WriteLock(target, 0, 2) as held:
        with another_process(target, 1, 2) as pid:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(IncompleteCacheError, match="rank 1 of 2 ended"):
            held.wait_for(lambda: False)


def test_waiting_ends_with_an_error_when_a_rank_on_another_machine_falls_silent(
    target: Path, quick: None
) -> None:
    with WriteLock(target, 0, 2) as held:
        path = leave(target, machine="another", rank=1, world_size=2)
        with beating(path):
            held.wait_for(lambda: 1 in held._met)
        with pytest.raises(IncompleteCacheError, match="rank 1 of 2 ended"):
            held.wait_for(lambda: False)


def test_waiting_ends_with_an_error_when_a_rank_never_comes(
    target: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ARRIVAL_SECONDS", 0.2)
    # What an earlier run left is not the rank that is waited for.
    leave(target, machine="another", rank=1, world_size=2)
    message = "rank 1 of 2 did not come within 0 s"
    with WriteLock(target, 0, 2) as held, pytest.raises(IncompleteCacheError, match=message):
        held.wait_for(lambda: False)


def test_being_alone_is_waited_for(target: Path, quick: None) -> None:
    with another_process(target, 1, 2) as pid, WriteLock(target, 0, 2) as held:
        kill = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        kill.start()
        held.wait_until_alone()
        kill.join()


def test_a_system_that_does_not_tell_of_processes_is_asked_by_their_ids(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", _refuse)
    assert lock._machine() == socket.gethostname()
    with another_process(target):
        left = leave(target, pid=os.getpid(), born=None, machine=lock._machine())
        with pytest.raises(ConfigError, match="another run is writing it"), WriteLock(target):
            pass
        left.unlink()


def _refuse(path: Path) -> str:
    raise FileNotFoundError(path)
