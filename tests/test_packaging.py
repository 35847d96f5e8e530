"""The wheel stands alone: built, installed in an empty environment, run from another folder."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("gkd-*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"gkd"}
    assert {"gkd/cli.py", "gkd/storage/cache/spec.py", "gkd/storage/FORMAT.md"} <= set(names)


def test_an_empty_environment_runs_gkd(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "cache-teacher" in run(environment / "bin" / "gkd", "--help", cwd=elsewhere)
    version = run(environment / "bin" / "gkd", "--version", cwd=elsewhere)
    assert wheel.name.split("-")[1] in version
    everything = "import gkd.pipeline.run, gkd.trainer.loop, gkd.storage.cache.reader"
    run(python, "-c", everything, cwd=elsewhere)
