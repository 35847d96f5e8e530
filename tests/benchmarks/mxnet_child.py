"""Runs under MXNet 1.9.1's own Python, for recordio.py: reads packs as MXNet reads them.

Arguments: a pack's .rec path and a .npy file of keys. Then, for every line on stdin, one JSON
answer: ``raw`` and ``unpacked`` give the seconds of reading the keys in order, without and with
taking the record apart; ``dump`` gives each key's flag, labels, ids and the body's sha256.
"""

import hashlib
import importlib
import json
import sys
import time
from typing import Any

import numpy as np


def mxnet_recordio() -> Any:
    """By name: type checkers and test runners run where MXNet cannot be installed."""
    return importlib.import_module("mxnet.recordio")


def main(path: str, keys_path: str) -> None:
    recordio = mxnet_recordio()
    reader = recordio.MXIndexedRecordIO(path[: -len(".rec")] + ".idx", path, "r")
    keys = np.load(keys_path).tolist()
    for line in sys.stdin:
        print(json.dumps(COMMANDS[line.strip()](reader, keys)), flush=True)


def raw(reader: Any, keys: list[int]) -> float:
    began = time.perf_counter()
    for key in keys:
        reader.read_idx(key)
    return time.perf_counter() - began


def unpacked(reader: Any, keys: list[int]) -> float:
    recordio = mxnet_recordio()
    began = time.perf_counter()
    for key in keys:
        recordio.unpack(reader.read_idx(key))
    return time.perf_counter() - began


def dump(reader: Any, keys: list[int]) -> dict[int, list[object]]:
    recordio = mxnet_recordio()
    found: dict[int, list[object]] = {}
    for key in keys:
        header, body = recordio.unpack(reader.read_idx(key))
        labels = np.atleast_1d(header.label).tolist()
        found[key] = [header.flag, labels, header.id, header.id2, hashlib.sha256(body).hexdigest()]
    return found


COMMANDS: dict[str, Any] = {"raw": raw, "unpacked": unpacked, "dump": dump}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
