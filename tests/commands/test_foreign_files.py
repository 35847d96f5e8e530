"""Whatever stands in place of a file that a command reads, the file is named, and what it is."""

import gzip
import os
from pathlib import Path

import pytest

from gkd.storage.records.recordio import encode_record, record_writer
from tests.commands.running import fails

CONTENTS = {
    "a Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "an HTML page": b"\n <!doctype HTML><html lang=en><title>403</title></html>",
    "error message": b'<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code></Error>',
    "a gzip file": gzip.compress(b"x" * 99),
    "a named pipe": None,
}
FILES = (
    *("train.rec", "train.idx", "property", "a.rec", "a.tar", "a.parquet"),
    *("a.onnx", "a.pt", "a.pth", "a.safetensors", "a.npy", "centres.safetensors"),
    *("a.bin", "a.toml"),
)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_kind_is_named(file: str, home: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    if file in ("train.idx", "property"):  # which are read after a pack that is whole
        with record_writer(packed / "train.rec") as write:
            write(0, encode_record(0.0, b"image", id=0))
    path = packed / file
    cache = ("cache-teacher", home / "faces", tmp_path / "o.gkd")
    mean = ("--centers", "class-mean")
    command: tuple[object, ...] = ("records", "info", packed if "." not in file else path)
    if file == "train.idx":
        command = ("records", "info", packed)
    elif file in ("a.npy", "centres.safetensors"):
        command = (*cache, "--teacher", home / "teacher.pt", "--centers", path)
    elif file in ("a.onnx", "a.pt", "a.pth", "a.safetensors"):
        command = (*cache, "--teacher", path, *mean)
    elif file == "a.bin":
        command = ("evaluate", home / "teacher.pt", path)
    elif file == "a.toml":
        command = ("train-student", packed, tmp_path / "run", "--without-kd", "--config", path)
    for kind, content in CONTENTS.items():
        path.unlink(missing_ok=True)
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
        message = fails(*command)
        assert str(path) in message
        assert f"got {kind}" in message or f"the {kind}" in message, message
        assert "; " in message  # what to do
