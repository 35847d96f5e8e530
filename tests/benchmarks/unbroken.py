"""Rounds of ``kill -9`` at random instants, 1 to 3 ranks: bytes must be those of an unbroken run.

python -m tests.benchmarks.unbroken [ROUNDS]
"""

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness import report
from tests.pipeline.faces import write_folder
from tests.pipeline.rounds import kill_and_resume

ROUNDS = 50


def main() -> None:
    """Kill, resume, compare."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory() as folder:
        faces = write_folder(Path(folder) / "faces")
        tally = kill_and_resume(faces, Path(folder) / "work", kills=rounds, seed=1)
    for each in tally.wrong:
        print(each, file=sys.stderr)
    killed = "kill -9 rounds with 1 to 3 ranks"
    resumed = "caches resumed after a kill"
    wrong = "caches that differ from an unbroken run"
    ratios = {killed: tally.kills, resumed: tally.resumed, wrong: len(tally.wrong)}
    report("unbroken", ratios, {killed: (">=", ROUNDS), wrong: ("==", 0)})


if __name__ == "__main__":
    main()
