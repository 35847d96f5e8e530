"""What benchmarks share: alternating measurements, and the JSON object at the end."""

import gc
import json
import operator
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.paths import ROOT

RESULTS = ROOT / "benchmarks"
COMPARE = {"<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}
Bar = tuple[str, float]


def in_turns(
    works: Sequence[Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> npt.NDArray[np.float64]:
    """Seconds [rounds, n] of each work, measured turn by turn, every other one from the last on."""
    turns = np.empty((rounds, len(works)))
    for number, seconds in enumerate(turns):
        for place in range(len(works))[:: -1 if number % 2 else 1]:
            gc.collect()
            began = clock()
            works[place]()
            seconds[place] = clock() - began
    return turns


def machine() -> str:
    """The machine in words: processor, usable cores, memory, system and Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}"
    )


def report(
    name: str, ratios: Mapping[str, float], bars: Mapping[str, Bar], *, accelerator: str = ""
) -> None:
    """Say which bars hold, then print the result as one JSON line and write it to RESULTS.

    ``ratios`` is {what: value}, ``bars`` {what: (op, bound)} over the same names; a ratio
    without a bar is only reported. ``accelerator`` names one. Exits with 1 if a bar is missed,
    after the line is printed.
    """
    missed = []
    for what, (op, bound) in bars.items():
        holds = COMPARE[op](ratios[what], bound)
        verdict = "holds" if holds else "MISSED"
        print(f"{what}: {ratios[what]:.4g}, bar {op} {bound:g}: {verdict}", file=sys.stderr)
        if not holds:
            missed.append(what)
    where = f"{accelerator}, {machine()}" if accelerator else machine()
    line = json.dumps({"name": name, "machine": where, "ratios": dict(ratios), "bars": dict(bars)})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(line + "\n")
    print(line, flush=True)
    if missed:
        sys.exit(1)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
