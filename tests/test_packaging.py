"""The wheel: built, installed in another environment, run from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import ROOT


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
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
    # Templates, styles and scripts are read at run time.
    files = [path for folder in ("storage", "trainer") for path in (ROOT / folder).rglob("*.*")]
    pages = {path.relative_to(ROOT) for path in files if path.suffix in (".html", ".css", ".js")}
    assert pages
    assert {f"gkd/{path}" for path in pages} <= set(names)


def require_gkd(environment: Path, wheel: Path, elsewhere: Path) -> None:
    """Run what is installed there, from a folder that holds nothing."""
    elsewhere.mkdir()
    assert "cache-teacher" in run(environment / "bin" / "gkd", "--help", cwd=elsewhere)
    version = run(environment / "bin" / "gkd", "--version", cwd=elsewhere)
    assert wheel.name.split("-")[1] in version
    everything = "import gkd.pipeline.run, gkd.trainer.loop, gkd.storage.cache.reader as reader"
    loaded = run(
        environment / "bin" / "python", "-c", f"{everything}; print(reader.__file__)", cwd=elsewhere
    )
    assert loaded.startswith(str(environment))


def test_the_installed_wheel_runs_gkd(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--ignore-installed", wheel, cwd=tmp_path)
    require_gkd(environment, wheel, tmp_path / "elsewhere")


@pytest.mark.nightly
def test_an_empty_environment_runs_gkd(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies that the wheel asks for."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = (environment / "bin" / "python", "-m", "pip")
    constraints = ROOT / "constraints.txt"
    run(*pip, "install", "--quiet", "-c", constraints, wheel, cwd=tmp_path)
    require_gkd(environment, wheel, tmp_path / "elsewhere")
