"""Keeps two runs off one target, and tells a run's processes which of them are still there.

Every process that writes shows itself by a file in a hidden folder beside the target. Shards go to
ranks by number, so processes of one world size and different ranks never touch the same shard;
what must not be is another process of the same rank, or of another world size. Whoever meets one
that is alive gives way; what the dead left is deleted. Each file has a name of its own and is
written before the others are read, so of two processes that come at once at least one sees the
other.

On one machine (one boot, one space of process ids) a process is alive while the system knows it.
Elsewhere it is alive while it is seen to touch its file: only changes count, no clock is compared.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec
from msgspec import Meta

from gkd.storage.cache.places import require_outside_caches
from gkd.storage.errors import ConfigError, GkdError, IncompleteCacheError
from gkd.storage.util.files import disk_errors
from gkd.storage.util.progress import progress

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # longer than a network file system may show an old time of a file
ARRIVAL_SECONDS = 600.0
POLL_SECONDS = 0.5

State = Literal["alive", "dead", "unknown"]


class Holder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process that writes; ``born`` tells it from a later one with the same id."""

    rank: int
    world_size: int
    host: str
    machine: str
    pid: Annotated[int, Meta(gt=0, lt=2**31)]
    born: str | None
    started: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.world_size}, process {self.pid} on {self.host}, started "
            f"{self.started}"
        )


@dataclass
class _Sign:
    """When another machine's file was seen to change; ``beats`` after it was seen first."""

    touched: int
    seen: float
    beats: int = 0


@dataclass
class _Signs:
    signs: dict[Path, _Sign] = field(default_factory=dict)

    def state(self, path: Path, touched: int) -> State:
        now = time.monotonic()
        sign = self.signs.setdefault(path, _Sign(touched, now))
        if sign.touched != touched:
            sign.touched, sign.seen = touched, now
            sign.beats += 1
        if now - sign.seen > SILENT_SECONDS:
            return "dead"
        return "alive" if sign.beats else "unknown"


class WriteLock:
    """The right of one rank to write its shards of ``target``, while the context lasts.

    Raises:
        ConfigError: on entering, where another run is at work; naming its host, process and start;
            or where ``target`` is inside a cache.
    """

    def __init__(self, target: Path, rank: int = 0, world_size: int = 1) -> None:
        self.target, self.rank, self.world_size = target, rank, world_size
        self.folder = target.with_name(f".{target.name}.lock")
        self._path = self.folder / f"{uuid.uuid4().hex}.json"
        self._signs = _Signs()
        self._met: set[int] = set()
        self._lost: set[int] = set()
        self._entered = 0.0
        self._leaving = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Self:
        require_outside_caches(self.target, may_be_one=True)
        with disk_errors(self.folder):
            self._show()
            try:
                self._give_way()
            except BaseException:
                self._hide()
                raise
        self._entered = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()

    def check(self) -> None:
        """Make sure that nobody took this process for dead, before it writes.

        Raises:
            GkdError: where another did, because this one was stopped for long.
        """
        if not self._path.exists():
            raise GkdError(
                f"{self.target}: rank {self.rank} of {self.world_size} (this process) gave no sign "
                f"for {SILENT_SECONDS:.0f} s and was taken for dead, so another may have gone on; "
                "nothing more is written: run the same command again once no other is at work"
            )

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait for what other ranks have still to do, as long as all of them are there.

        Raises:
            IncompleteCacheError: naming a rank that went away, or never came.
        """
        while not done():
            missing = self._missing()
            if missing and not done():
                raise IncompleteCacheError(
                    f"{self.target}: {missing}; see why in its own output, and run the same "
                    "command again, with any number of ranks, to go on"
                )
            time.sleep(POLL_SECONDS)

    def wait_until_alone(self) -> None:
        """Wait until no other process is seen, or those that are left are dead."""
        while any(state != "dead" for _, _, state in self._others()):
            time.sleep(POLL_SECONDS)

    def _look(self) -> set[int]:
        """Ranks that are not dead; remembers who was met alive, and who of this machine died.

        Its dead of earlier runs were cleared away on entering. Another machine's may be left.
        """
        here: set[int] = set()
        for _, holder, state in self._others():
            if holder is None:
                continue
            if state == "dead":
                if holder.machine == _machine():
                    self._lost.add(holder.rank)
                continue
            here.add(holder.rank)
            if state == "alive":
                self._met.add(holder.rank)
        return here

    def _missing(self) -> str:
        here = self._look()
        for rank in range(self.world_size):
            if rank == self.rank or rank in here:
                continue
            if rank in self._met or rank in self._lost:
                return f"rank {rank} of {self.world_size} ended before all was written"
            if time.monotonic() - self._entered > ARRIVAL_SECONDS:
                return (
                    f"rank {rank} of {self.world_size} did not come within {ARRIVAL_SECONDS:.0f} s"
                )
        return ""

    def _give_way(self) -> None:
        """Delete what the dead left; wait for a sign of those of whom it cannot be told."""
        unclear = self._rivals()
        if not unclear:
            return
        what = f"wait for a sign of life of {unclear[0] or 'another run'}"
        with progress(what, round(SILENT_SECONDS), "s") as advance:
            waited = 0
            began = time.monotonic()
            while self._rivals():
                time.sleep(POLL_SECONDS)
                seconds = min(int(time.monotonic() - began), round(SILENT_SECONDS))
                advance(seconds - waited)
                waited = seconds

    def _rivals(self) -> list[Holder | None]:
        """Rivals of whom it is not known whether they live.

        Raises:
            ConfigError: at one that does.
        """
        unclear: list[Holder | None] = []
        for path, holder, state in self._others():
            if state == "dead":
                path.unlink(missing_ok=True)
            elif holder is None:
                unclear.append(holder)
            elif holder.rank == self.rank or holder.world_size != self.world_size:
                if state == "alive":
                    raise ConfigError(
                        f"{self.target}: another run is writing it: {holder}; wait for its end or "
                        f"stop it, and run again to go on (it shows itself by {path}; where its "
                        "host is gone for good, remove that file)"
                    )
                unclear.append(holder)
        return unclear

    def _others(self) -> list[tuple[Path, Holder | None, State]]:
        found: list[tuple[Path, Holder | None, State]] = []
        for path in self.folder.glob("*.json"):
            if path == self._path:
                continue
            try:
                # Opened, not only looked at: a network file system asks its server then.
                with path.open("rb") as file:
                    content, touched = file.read(), os.fstat(file.fileno()).st_mtime_ns
            except FileNotFoundError:
                continue
            holder = _decode(content)
            if holder is not None and holder.machine == _machine():
                found.append((path, holder, "alive" if _alive(holder) else "dead"))
            else:
                found.append((path, holder, self._signs.state(path, touched)))
        return found

    def _show(self) -> None:
        holder = Holder(
            rank=self.rank,
            world_size=self.world_size,
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            started=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        )
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._path.write_bytes(msgspec.json.encode(holder))
                break
            except FileNotFoundError:
                continue  # the last of those before deleted the folder in between
        self._beating.start()

    def _beat(self) -> None:
        while not self._leaving.wait(BEAT_SECONDS):
            try:
                os.utime(self._path)
                # Who comes and goes before this process waits for anybody is seen here.
                self._look()
            except OSError:
                # Whether the file still stands is what `check` asks; a server may be away a while.
                continue

    def _hide(self) -> None:
        self._leaving.set()
        self._beating.join()
        self._path.unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            return  # others are there


def _decode(content: bytes) -> Holder | None:
    """None where it is just being written, or its writer was killed in that moment."""
    try:
        return msgspec.json.decode(content, type=Holder)
    except msgspec.DecodeError:
        return None


def _machine() -> str:
    """One boot of one machine and one space of process ids, where process ids mean something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _alive(holder: Holder) -> bool:
    """Whether a process of this machine is there, and not a later one with its id."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, but there
    born = _born(holder.pid)
    return born is None or born == holder.born


def _born(pid: int) -> str | None:
    """When a process of this machine began, in the system's own words; empty once it has ended.

    None where the system does not tell.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which stands in parentheses and may hold anything: first the state, which
    # is Z until somebody asks how the process ended, and twentieth the time when it began.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
