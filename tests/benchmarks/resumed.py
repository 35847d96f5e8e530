"""Trainings killed at random steps and resumed: they must end in the bits of an uninterrupted one.

``python -m tests.benchmarks.resumed [KILLS]`` kills one process again and again, then two ranks at
as many steps, each time by ``kill -9``, and starts the same command again.
"""

import random
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness import Bar, report
from tests.processes import finished
from tests.trainer.faces import make
from tests.trainer.runs import assert_same_end, losses, ranks_training, wait_for_step

KILLS, STEPS = 10, 120  # FAST has three steps an epoch


def wrong_ends(faces: Path, folder: Path, ranks: int, kills: int) -> int:
    """Kill a training so many times; 1 where its end differs from an unbroken one's."""
    settings = f"train.epochs={STEPS // 3}", "data.workers=1"
    folder.mkdir()
    with ranks_training(faces, folder / "unbroken", ranks, *settings) as processes:
        finished(processes)
    dice = random.Random(ranks)
    for step in sorted(dice.sample(range(4, STEPS - 4), kills)):
        with ranks_training(faces, folder / "killed", ranks, *settings) as processes:
            wait_for_step(processes[0], folder / "killed", step)
        print(f"{ranks} ranks killed about step {step}", file=sys.stderr)
    with ranks_training(faces, folder / "killed", ranks, *settings) as processes:
        finished(processes)
    try:
        assert_same_end(folder / "killed", folder / "unbroken")
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    return int(losses(folder / "killed") != losses(folder / "unbroken"))


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    ratios: dict[str, float] = {}
    bars: dict[str, Bar] = {}
    with tempfile.TemporaryDirectory() as temporary:
        faces = Path(temporary) / "faces"
        make(faces)
        for ranks in (1, 2):
            what = f"ends that differ after {kills} kills of {ranks} ranks"
            ratios[what] = wrong_ends(faces, Path(temporary) / str(ranks), ranks, kills)
            bars[what] = ("==", 0)
    report("resumed", ratios, bars)


if __name__ == "__main__":
    main()
