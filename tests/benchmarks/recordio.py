"""Random reads of the LFW pack by gkd and by MXNet 1.9.1, and our packs read back by MXNet.

    python -m tests.benchmarks.recordio

MXNet cannot be installed beside numpy 2, so it runs in an environment of its own, made once under
$XDG_CACHE_HOME (or ~/.cache) by pip; it needs a python3.11. Both read the same random keys, in
turns, in one run. A read of ours copies the image, as MXNet's does; reads without the copy, as
gkd uses them, are reported too.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gkd.storage.records.base import Records
from gkd.storage.records.open import open_records
from gkd.storage.records.recordio import (
    MAGIC,
    RecordReader,
    encode_record,
    read_index,
    record_writer,
)
from gkd.storage.records.write_pack import pack
from tests.benchmarks.harness import report
from tests.paths import SHARED_DATA

REQUIREMENTS = ("mxnet==1.9.1", "numpy==1.23.5")
READS = 50_000
ROUNDS = 7
BARS = {
    "random reads, header and image": (">=", 5.0),
    "records MXNet reads back equal": ("==", 1.0),
}
Ask = Callable[[str], object]


def main() -> None:
    """Run both parts and report."""
    python = mxnet_python()
    ratios = random_reads(python)
    with tempfile.TemporaryDirectory() as folder:
        ratios["records MXNet reads back equal"] = read_back(python, Path(folder))
    report("recordio", ratios, BARS)


def mxnet_python() -> Path:
    """The interpreter of MXNet's environment, which is created if it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = cache / "gkd-benchmarks" / "mxnet-1.9.1"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        base = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
        if base is None:
            sys.exit("MXNet 1.9.1 needs python3.11: expected it on PATH, found none; install it")
        subprocess.run([base, "-m", "venv", "--clear", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        (home / "ready").touch()
    return python


@contextmanager
def mxnet_reader(python: Path, pack: Path, keys: npt.NDArray[np.int64]) -> Iterator[Ask]:
    """A process that reads ``keys`` of ``pack`` with MXNet, asked by the name of a command."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, keys)
        file.flush()
        child = Path(__file__).with_name("mxnet_child.py")
        with subprocess.Popen(
            [python, child, pack, file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            inlet, outlet = process.stdin, process.stdout

            def ask(command: str) -> object:
                print(command, file=inlet, flush=True)
                return json.loads(outlet.readline())

            yield ask
            inlet.close()


def random_reads(python: Path) -> dict[str, float]:
    """Seconds of MXNet / ours for the same random reads, each the best of alternating rounds."""
    path = SHARED_DATA / "lfw" / "train.rec"
    records = open_records(path)
    rows = np.random.default_rng(0).integers(0, len(records), READS)
    keys = np.array([int(records.key(row)) for row in rows])
    indexed, places = (column.tolist() for column in read_index(path.with_suffix(".idx")))
    offset_of = dict(zip(indexed, places, strict=True))
    offsets = [offset_of[key] for key in keys.tolist()]
    reader = RecordReader(path)
    ours: dict[str, tuple[Callable[[], float], str]] = {
        "random reads, header and image": (
            lambda: copied_seconds(records, rows.tolist()),
            "unpacked",
        ),
        "random reads, without the copy": (
            lambda: view_seconds(records, rows.tolist()),
            "unpacked",
        ),
        "random reads, framing only": (lambda: framing_seconds(reader, offsets), "raw"),
    }
    ratios = {}
    with mxnet_reader(python, path, keys) as ask:
        for what, (run, command) in ours.items():
            rounds = [(float(str(ask(command))), run()) for _ in range(ROUNDS)]
            theirs, own = (min(seconds) for seconds in zip(*rounds, strict=True))
            ratios[what] = theirs / own
            print(f"{what}: MXNet {theirs / READS * 1e6:.2f} us, gkd {own / READS * 1e6:.2f} us")
    return ratios


def copied_seconds(records: Records, rows: list[int]) -> float:
    """Seconds for label and image of ``rows``, the image copied."""
    began = time.perf_counter()
    for row in rows:
        _ = records.labels[row], bytes(records.encoded(row))
    return time.perf_counter() - began


def view_seconds(records: Records, rows: list[int]) -> float:
    """Seconds for label and image of ``rows``, the image as a view of the map."""
    began = time.perf_counter()
    for row in rows:
        _ = records.labels[row], records.encoded(row)
    return time.perf_counter() - began


def framing_seconds(reader: RecordReader, offsets: list[int]) -> float:
    """Seconds for the records' whole data, copied."""
    began = time.perf_counter()
    for offset in offsets:
        bytes(reader.payload(offset))
    return time.perf_counter() - began


def read_back(python: Path, folder: Path) -> float:
    """Share of the records written by gkd that MXNet reads back as they were given."""
    equal = total = 0
    for path in (packed_lfw(folder), packed_magics(folder)):
        keys, offsets = read_index(path.with_suffix(".idx"))
        reader = RecordReader(path)
        with mxnet_reader(python, path, keys) as ask:
            theirs = ask("dump")
        assert isinstance(theirs, dict)
        for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True):
            record = reader.read(offset)
            body = hashlib.sha256(record.body).hexdigest()
            ours = [record.flag, record.labels.tolist(), record.id, record.id2, body]
            equal += theirs[str(key)] == ours
        total += len(keys)
    return equal / total


def packed_lfw(folder: Path) -> Path:
    """LFW as an image folder, packed by gkd; the images are compared with the pack they came of."""
    records = open_records(SHARED_DATA / "lfw")
    for row in range(len(records)):
        path = folder / "faces" / str(records.labels[row]) / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(records.encoded(row))
    pack(folder / "faces", folder / "pack", workers=2)
    packed = open_records(folder / "pack")
    assert packed.fingerprint == records.fingerprint
    return folder / "pack" / "train.rec"


def packed_magics(folder: Path) -> Path:
    """Two thousand records full of magics, whole and cut, at every alignment."""
    rng = np.random.default_rng(0)
    magic = struct.pack("<I", MAGIC)
    pieces = [magic, magic[:1], magic[1:], b"abcd", b"x", bytes(4)]
    with record_writer(folder / "magics.rec") as write:
        for key in rng.permutation(2000).tolist():
            body = b"".join(pieces[at] for at in rng.integers(0, len(pieces), rng.integers(0, 30)))
            label = [float(key), 1.0, 2.0][: key % 4] or float(key)
            write(key, encode_record(label, body, id=key, id2=2 * key))
    return folder / "magics.rec"


if __name__ == "__main__":
    main()
