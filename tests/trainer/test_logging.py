"""The log of a training, without TensorBoard or beside one that does not work."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gkd.storage.errors import ConfigError
from gkd.trainer.distributed import ALONE
from gkd.trainer.logging import METRICS, RunLog
from gkd.trainer.run_dir import locked

BROKEN = {
    "another protobuf": 'raise TypeError("Descriptors cannot be created directly.\\nIf this call")',
    "without distutils": "raise AttributeError(\"module 'distutils' has no attribute 'version'\")",
    "half installed": "raise ImportError('cannot import name builder')",
    "a numpy of its own": "raise SystemError('initialization of _pywrap_checkpoint_reader failed')",
    "old": "",
}


def tensorboards() -> list[str]:
    """The modules that were imported of it."""
    start = ("tensorboard", "tensorboard.", "torch.utils.tensorboard")
    return [name for name in sys.modules if name == start[0] or name.startswith(start[1:])]


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in tensorboards():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in tensorboards():
        del sys.modules[name]


def logged(out: Path) -> list[int]:
    """The steps of a log of two lines."""
    out.mkdir()
    with RunLog(out, step=0) as log:
        for step in (1, 2):
            log.write(step, {"loss": 1.5}, group="train")
    return [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("fault", BROKEN)
def test_a_tensorboard_that_does_not_work_is_told_once(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = tmp_path / "site/tensorboard"
    (package / "compat").mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = '{'1.14' if fault == 'old' else '2.8'}'")
    (package / "compat/__init__.py").write_text(BROKEN[fault])
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert logged(tmp_path / "out") == [1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no TensorBoard scalars: tensorboard does not work here (")
    assert "install -U '.[tensorboard]'" in line


@pytest.mark.usefixtures("forgotten")
def test_without_tensorboard_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert logged(tmp_path / "out") == [1, 2]
    assert capsys.readouterr().err.count("pip install '.[tensorboard]'") == 1
    assert not (tmp_path / "out/tensorboard").exists()


def test_a_tensorboard_that_fails_later_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("bad argument type for built-in operation")

    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    monkeypatch.setattr(writer, "add_scalar", fail)
    assert logged(tmp_path / "out") == [1, 2]
    assert capsys.readouterr().err.count("no TensorBoard scalars: ") == 1


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", METRICS, "config.toml"])
def test_a_run_folder_does_not_write_through_links(name: str, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "run.json").write_text("{}")
    (out / name).symlink_to(elsewhere)
    with (
        pytest.raises(ConfigError, match=rf"{name}: expected a run folder without links"),
        locked(out, ALONE),
    ):
        pass
    assert not list(elsewhere.iterdir())


def test_a_run_folder_that_is_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "unmounted")
    with (
        pytest.raises(ConfigError, match="got a link that leads nowhere; name another"),
        locked(tmp_path / "out", ALONE),
    ):
        pass
