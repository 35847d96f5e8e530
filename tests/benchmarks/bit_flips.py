"""Single bits flipped all over a cache: verify must name the file each time, training must refuse.

python -m tests.benchmarks.bit_flips [FLIPS]
"""

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness import report
from tests.storage.cache.flips import make_small_cache, unnoticed_flips

FLIPS = 200


def main() -> None:
    """Flip bits and report how many went unnoticed."""
    flips = int(sys.argv[1]) if len(sys.argv) > 1 else FLIPS
    with tempfile.TemporaryDirectory() as folder:
        cache = make_small_cache(Path(folder) / "faces.gkd")
        unnoticed = unnoticed_flips(cache, Path(folder) / "work", flips=flips, seed=1)
    for each in unnoticed:
        print(each, file=sys.stderr)
    found, most = "bit flips found and refused / bits flipped", "bits flipped"
    ratios = {found: 1 - len(unnoticed) / flips, most: float(flips)}
    report("bit_flips", ratios, {found: ("==", 1.0), most: (">=", FLIPS)})


if __name__ == "__main__":
    main()
