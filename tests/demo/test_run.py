"""The demo at its smallest: all of it through the public commands, and resuming."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gkd.demo import run as demo
from gkd.demo.run import Settings, State, run_demo
from gkd.demo.synthetic import draw_faces
from gkd.storage.cache.reader import Cache
from gkd.storage.errors import ConfigError, GkdError
from gkd.storage.records.open import open_records
from gkd.storage.records.write_pack import pack
from gkd.trainer.evaluation.bin_file import load_verification_set

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

QUICK = msgspec.structs.replace(
    TINY, teacher=(*SMALL, "train.epochs=1", "schedule.warmup_epochs=0")
)


def test_a_demo_runs_to_its_end_and_repeats_no_finished_stage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    run_demo(out, TINY)
    shown = capfd.readouterr().out
    for heading in (
        "1/7  Draw people",
        "7/7  Evaluate all three",
        "student with gkd",
        "bytes per sample",
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


def with_faces(out: Path) -> None:
    """A demo that has drawn its people, too few of them to train a teacher on."""
    out.mkdir()
    draw_faces(out / "faces", identities=range(3), images_each=2, seed=0, workers=1)
    (out / "demo.json").write_bytes(msgspec.json.encode(State(TINY, {"draw": 1.0})))


def done(out: Path) -> list[str]:
    return list(json.loads((out / "demo.json").read_text())["seconds"])


def test_a_failed_command_ends_the_demo_and_the_next_run_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my demo"
    with_faces(out)
    (out / "pack").write_text("in the way")
    advice = re.escape(f"run `gkd demo '{out}'` again to resume")
    with pytest.raises(GkdError, match=rf"`gkd records` ended with exit code 1, .*{advice}"):
        run_demo(out, TINY)
    assert "pack: exists already" in capfd.readouterr().err
    assert done(out) == ["draw"]
    (out / "pack").unlink()
    with pytest.raises(GkdError, match=rf"`gkd train-student` ended with exit code 1, .*{advice}"):
        run_demo(out, TINY)
    shown = capfd.readouterr()
    assert "fewer than one batch of 16" in shown.err
    assert shown.out.count("(done before)") == 1
    assert done(out) == ["draw", "pack"]
    assert len(open_records(out / "pack")) == 6


def test_a_demo_that_was_killed_after_packing_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Killed before demo.json recorded the pack."""
    out = tmp_path / "demo"
    with_faces(out)
    pack(out / "faces", out / "pack")
    with pytest.raises(GkdError, match="`gkd train-student` ended with exit code 1"):
        run_demo(out, TINY)
    assert "$ gkd records pack" not in capfd.readouterr().out
    assert done(out) == ["draw", "pack"]


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"expected a new folder, .* choose another folder"):
        run_demo(tmp_path, TINY)
    with pytest.raises(ConfigError, match="expected a new folder"):
        run_demo(tmp_path / "thesis.tex", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ('{"settings": {"seed": 5}, "seconds": {}}', "holds a demo with other settings"),
        ('{"settings": {"speed": 5}, "seconds": {}}', "not written by this version's demo"),
        ("", "not written by this version's demo"),
    ],
)
def test_a_demo_with_other_settings_is_refused(tmp_path: Path, state: str, message: str) -> None:
    (tmp_path / "demo.json").write_text(state)
    with pytest.raises(ConfigError, match=message) as caught:
        run_demo(tmp_path, TINY)
    assert str(tmp_path) in str(caught.value)
