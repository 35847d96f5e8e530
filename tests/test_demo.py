"""The demo at its smallest: the whole way through the public commands, and going on."""

import json
from pathlib import Path
from typing import Any

import pytest

from gkd import demo
from gkd.demo import Settings, run_demo
from gkd.storage.cache import Cache
from gkd.storage.errors import ConfigError, GkdError
from gkd.trainer.verification_set import load_verification_set

SMALL = (
    "student.name=iresnet18",
    "student.width=0.125",
    "student.input_size=28",
    "student.embedding_dim=16",
    "train.epochs=2",
    "train.batch_size=16",
    "schedule.warmup_epochs=1",
    "data.workers=0",
)
TINY = Settings(
    identities=12,
    images_each=6,
    held_out=6,
    held_out_images_each=3,
    pairs=20,
    teacher=SMALL,
    student=SMALL,
)


def test_whole_way_then_again_without_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    run_demo(out, TINY)
    shown = capfd.readouterr().out
    for heading in (
        "1/7  Draw people",
        "7/7  Judge all three",
        "student with gkd",
        "bytes a sample",
    ):
        assert heading in shown
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert Cache.open(out / "targets.gkd").spec.num_samples == 72
    assert len(load_verification_set(out / "held_out.bin")) == 20
    # Alone and with gkd: one configuration but for the distillation.
    configs = [(out / run / "config.toml").read_text().splitlines() for run in ("alone", "gkd")]
    assert {line for line in configs[0] if line not in configs[1]} == {"enabled = false"}

    state = json.loads((out / "demo.json").read_text())
    assert list(state["seconds"]) == [
        "draw",
        "pack",
        "teacher",
        "cache",
        "alone",
        "gkd",
        "evaluate",
    ]

    def no_command(*arguments: Any, **options: Any) -> str:
        raise AssertionError(arguments)

    monkeypatch.setattr(demo, "_gkd", no_command)
    run_demo(out, TINY)
    again = capfd.readouterr().out
    assert again.count("(done before)") == 7
    assert again[again.index("Verification of") :] == shown[shown.index("Verification of") :]


def test_failed_command_ends_the_demo_and_the_next_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    broken = Settings(**{**settings_of(TINY), "teacher": ("train.epochs=0",)})
    with pytest.raises(GkdError, match=r"`gkd train-student` ended with exit code 1, .*go on"):
        run_demo(out, broken)
    assert "train.epochs: expected" in capfd.readouterr().err
    assert list(json.loads((out / "demo.json").read_text())["seconds"]) == ["draw", "pack"]


def settings_of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"expected a new folder, .* name another folder"):
        run_demo(tmp_path, TINY)
    with pytest.raises(ConfigError, match="expected a new folder"):
        run_demo(tmp_path / "thesis.tex", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"settings": {"seed": 5}, "seconds": {}}', "a demo with other settings began here"),
        ('{"settings": {"speed": 5}, "seconds": {}}', "not written by this version's demo"),
        ("", "not written by this version's demo"),
    ],
)
def test_demo_of_another_kind_is_refused(tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "demo.json").write_text(state)
    with pytest.raises(ConfigError, match=message) as caught:
        run_demo(tmp_path, TINY)
    assert str(tmp_path) in str(caught.value)
