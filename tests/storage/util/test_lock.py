import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.util.lock import Holder, WriteLock, file_lock


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "faces.gkd"


@contextmanager
def another_process(target: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real process that holds the lock until its input ends or it is killed."""
    code = (
        "import sys; from pathlib import Path; from gkd.storage.util.lock import WriteLock\n"
        "with WriteLock(Path(sys.argv[1])):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield process
        if process.poll() is None:
            process.communicate(timeout=60)


def test_a_second_run_is_refused_naming_the_first(target: Path) -> None:
    with another_process(target) as process:
        for _ in range(2):  # the first refusal must not disturb the holder
            with pytest.raises(ConfigError) as caught:
                WriteLock(target).acquire()
            message = str(caught.value)
            assert message.startswith(f"{target}: another run is writing it: process {process.pid}")
            assert f"on {socket.gethostname()}, started 20" in message
            assert re.search(r"started \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait until", message)
    with WriteLock(target):
        pass
    assert list(target.parent.iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(target: Path) -> None:
    with another_process(target) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        with WriteLock(target) as lock:
            holder = lock.holder()
            assert holder is not None
            assert holder.pid == os.getpid()


def test_a_run_whose_target_was_taken_over_writes_nothing_more(target: Path) -> None:
    other_rank = WriteLock(target, "run")
    with WriteLock(target, "run"):
        other_rank.check()
    other_rank.check()  # rank 0 has ended, but no other run has begun
    with (
        WriteLock(target, "another run"),
        pytest.raises(GkdError, match=r"taken it over: process .* writes nothing more"),
    ):
        other_rank.check()


def test_a_lock_file_without_a_readable_holder_is_nobodys(target: Path) -> None:
    lock = WriteLock(target)
    for content in (b"", b"{", b'{"pid": 1}'):
        lock.path.write_bytes(content)
        lock.check()
        with lock:
            pass


def test_a_lock_folder_of_an_earlier_version_is_replaced(target: Path) -> None:
    lock = WriteLock(target)
    lock.path.mkdir()
    (lock.path / "0123.json").write_bytes(b"{}")
    with lock:
        assert lock.path.is_file()
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_lock_file_does(
    target: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on Lustre and some network file systems: a living run is respected, a dead one is not."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with another_process(target) as process:
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(ConfigError) as caught:
            WriteLock(target).acquire()
        message = str(caught.value)
        assert f"another run is writing it: process {process.pid}" in message
        assert f"locks no files ({os.strerror(number)}), and the lock file names a run" in message
        process.kill()
        process.wait(timeout=60)
        with WriteLock(target):
            assert capsys.readouterr().err.count("start no second run that writes it") == 1
    lock = WriteLock(target)
    lock.path.write_bytes(msgspec.json.encode(Holder("another-host", 1, "2026", "old run")))
    with pytest.raises(ConfigError, match=rf"delete {re.escape(str(lock.path))}\)"):
        lock.acquire()
    lock.path.unlink()  # as the message says
    with lock:
        pass
    assert list(target.parent.iterdir()) == []


def test_a_linked_lock_does_not_empty_what_it_leads_to(target: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("precious")
    lock = WriteLock(target)
    lock.path.symlink_to(kept)
    with pytest.raises(GkdError, match="lock"):
        lock.acquire()
    assert kept.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_scratch_files_are_not_shared_where_files_cannot_be_locked(
    number: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:  # as on Lustre, or NFS without its lock service
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = f"{target.parent}: its file system has no locks.*; set GKD_CACHE_DIR"
    with pytest.raises(ConfigError, match=message), file_lock(target.with_name("lock")):
        pass


def test_what_a_linked_lock_points_to_stays(target: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_bytes(b"kept")
    lock = target.with_name(f".{target.name}.lock")
    lock.symlink_to(tmp_path / "thesis")
    with pytest.raises(ConfigError, match=str(lock)):
        WriteLock(target).acquire()
    with pytest.raises(OSError, match=str(lock)), file_lock(lock):
        pass
    assert (tmp_path / "thesis").read_bytes() == b"kept"
