"""A student of the LFW pack with and without cached targets, three seeds, on unseen identities.

    python -m tests.benchmarks.lfw_student [FOLDER]

Runs the public commands: one cache from the shared teacher with groups of about two thousand
classes, then the student of lfw_student.toml with the targets and `--without-kd`, each with seeds
0, 1 and 2, each judged on lfw_fold9.bin after its last epoch. FOLDER keeps the cache and the
runs, and what is finished there is not run again.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

from tests.benchmarks.harness import report
from tests.paths import SHARED_DATA

RECORDS = SHARED_DATA / "lfw"
PAIRS = RECORDS / "lfw_fold9.bin"
TEACHER = SHARED_DATA / "teachers" / "mobilefacenet.onnx"
CONFIG = Path(__file__).with_suffix(".toml")
SEEDS = (0, 1, 2)
GROUPS = ("--group-temperature", "4", "--threshold", "0.93", "--max-group", "4859")


def main() -> None:
    """Cache once, train six students, report the gain over the spread of the seeds."""
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder))


def run(folder: Path) -> None:
    """The whole measurement in ``folder``."""
    targets = folder / "lfw.gkd"
    teacher = ("--teacher", TEACHER, "--preprocess", "imagenet", "--centers", "class-mean")
    gkd("cache-teacher", RECORDS, targets, *teacher, *GROUPS)
    accuracies = {
        kind: [accuracy(folder / f"{kind}-{seed}", targets, seed, *flags) for seed in SEEDS]
        for kind, flags in (("gkd", ()), ("without-kd", ("--without-kd",)))
    }
    for kind, values in accuracies.items():
        listed = ", ".join(f"{value:.2%}" for value in values)
        print(f"{kind}: {listed}; mean {mean(values):.2%}, deviation {stdev(values):.2%}")
    gain = mean(accuracies["gkd"]) - mean(accuracies["without-kd"])
    spread = max(max(values) - min(values) for values in accuracies.values())
    report(
        "lfw_student",
        {
            "gain / spread of the seeds": gain / spread,
            "accuracy with gkd": mean(accuracies["gkd"]),
            "accuracy without": mean(accuracies["without-kd"]),
        },
        {"gain / spread of the seeds": (">=", 1.0)},
    )


def accuracy(out: Path, targets: Path, seed: int, *flags: str) -> float:
    """Train one student to its end and verify it."""
    settings = ("--config", CONFIG, "--set", f"train.seed={seed}")
    gkd("train-student", RECORDS, targets, out, *settings, *flags)
    (result,) = json.loads(gkd("evaluate", out / "checkpoints" / "last.pt", PAIRS, "--json"))
    return float(result["accuracy"])


def gkd(*arguments: object) -> str:
    """Run a command of gkd and return what it prints; its progress goes to our stderr."""
    command = [sys.executable, "-m", "gkd.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
