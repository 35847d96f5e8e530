"""The commands as a user types them, from faces to a student that is evaluated and exported."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gkd.commands.builders import note_older_pixels
from gkd.commands.output import emit
from gkd.storage.cache import layout
from gkd.storage.cache.metadata import read_commit, read_spec
from gkd.storage.cache.reader import Cache
from gkd.trainer.backbones import build_backbone
from tests.commands.running import TINY, fails, gkd, works
from tests.processes import run_command, running


@pytest.fixture(scope="module")
def targets(home: Path) -> Path:
    out = home / "targets.gkd"
    teacher = (
        "--teacher",
        home / "teacher.pt",
        "--centers",
        "class-mean",
        "--shard-samples",
        "auto",
    )
    summary = json.loads(works("cache-teacher", home / "faces", out, *teacher, "--json"))
    assert summary["samples"] == 32
    assert summary["images"] == 32
    return out


@pytest.fixture(scope="module")
def run(home: Path, targets: Path) -> Path:
    sets = ("--set", f"evaluation.sets=['{home / 'others.bin'}']")
    works("train-student", home / "faces", targets, home / "run", *TINY, *sets)
    return home / "run"


@pytest.fixture(scope="module", autouse=True)
def cache_dir(home: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKD_CACHE_DIR", str(home / "materialised"))
        yield home / "materialised"


def test_draws_are_cached_verified_and_cut(home: Path, tmp_path: Path) -> None:
    out, teacher = tmp_path / "drawn.gkd", ("--teacher", home / "teacher.pt")
    drawn = ("--draws", "8", "--draw-temperature", "2", "--draw-from", "primary", "--seed", "7")
    making = ("cache-teacher", home / "faces", out, *teacher, "--centers", "class-mean", *drawn)
    works(*making)
    info = json.loads(works("targets", "info", out, "--json"))
    assert info["draws"] == {"count": 8, "temperature": 2.0, "source": "primary", "seed": 7}
    stats = json.loads(works("targets", "stats", out, "--json"))
    assert 1 <= stats["views"][0]["draws"]["mean_classes"] <= 8
    assert "0 faults" in works("targets", "verify", out, "--deep")
    against = ("--against", home / "faces", *teacher, "--json")
    report = json.loads(works("targets", "verify", out, *against))
    assert report["ok"]
    assert report["drawn"]["draws"] == 2 * 32 * 8
    works("targets", "retarget", out, tmp_path / "fewer.gkd", "--draws", "3")
    assert "0 faults" in works("targets", "verify", tmp_path / "fewer.gkd", "--deep")
    # Elsewhere, as after push and pull: no file of class means is beside it.
    pulled = tmp_path / "elsewhere" / "pulled.gkd"
    works("targets", "pull", tmp_path / "fewer.gkd", pulled)
    shown = gkd("targets", "verify", pulled, *against[:-1])
    assert shown.exit_code == 0, shown.output
    assert f"{pulled}: no file beside it holds its class means" in shown.stderr
    assert re.search(r"drawn +192 draws agree with the teacher \(p-value .*fault\)", shown.stdout)
    stderr = fails(*making[:-6], "--draw-temperature", "3")
    assert "--draw-temperature: expected one of --temperatures, which are 1,2,4, got 3;" in stderr


def test_centres_are_made_described_and_used(home: Path, tmp_path: Path) -> None:
    made, teacher = tmp_path / "made.safetensors", ("--teacher", home / "teacher.pt")
    result = json.loads(
        works("centers", "build", home / "faces", made, *teacher, "--refine", 2, "--json")
    )
    assert (result["kind"], result["centers"], result["images"]) == ("refined", 8, 32)
    assert result["refined"]["loss"] < result["class_mean"]["loss"]
    described = works("centers", "info", made, "--records", home / "faces")
    assert re.search(r"kind +refined\n", described)
    assert re.search(r"orientation +C x D\n", described)
    out = tmp_path / "targets.gkd"
    works("cache-teacher", home / "faces", out, *teacher, "--centers", made)
    assert "refined by a margin head" in (out / "README.md").read_text()
    against = ("--against", home / "faces", *teacher, "--centers", made, "--json")
    assert json.loads(works("targets", "verify", out, *against))["ok"]
    wrong_preprocessing = fails(
        *("cache-teacher", home / "faces", tmp_path / "b.gkd", *teacher),
        *("--bgr", "--centers", made),
    )
    assert "preprocess.bgr: " in wrong_preprocessing
    assert "exists already" in fails("centers", "build", home / "faces", made, *teacher)
    assert "8 centres, but the records have 6" in fails(
        "centers", "info", made, "--records", home / "others"
    )


def test_help_needs_no_heavy_import() -> None:
    script = "import sys, gkd.cli; print(sorted({'torch', 'zarr', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_cache_is_described_verified_and_drawn(targets: Path, tmp_path: Path) -> None:
    info = json.loads(works("targets", "info", targets, "--json"))
    assert (info["num_samples"], info["num_classes"], info["shards"]) == (32, 8, 1)
    assert info["centers"]["kind"] == "class-mean"
    assert targets.with_name("targets.centers.npy").exists()
    assert "group temperature  1" in works("targets", "info", targets)
    output = works("targets", "verify", targets)
    assert "bytes in shards" in output
    assert ", 0 faults" in output
    assert json.loads(works("targets", "verify", targets, "--json"))["ok"]
    figures = json.loads(works("targets", "stats", targets, "--json"))
    assert [view["view"] for view in figures["views"]] == ["original", "flipped"]
    assert "bytes per sample" in works("targets", "stats", targets, "--plot", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_quick_and_deep_exclude_each_other(targets: Path) -> None:
    result = gkd("targets", "verify", targets, "--quick", "--deep")
    assert result.exit_code == 2
    assert "--quick and --deep exclude each other" in result.stderr


def test_verify_names_the_damaged_file(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "targets.gkd"
    teacher = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    works("cache-teacher", home / "faces", out, *teacher)
    damaged = out / "original" / "sizes" / "c" / "0" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    result = gkd("targets", "verify", out)
    assert result.exit_code == 1
    assert "original/sizes/c/0/0: " in result.stdout


def test_a_cache_is_recomputed_by_its_teacher(home: Path, targets: Path, tmp_path: Path) -> None:
    against = ("--against", home / "faces", "--teacher", home / "teacher.pt", "--sample", 5)
    report = json.loads(works("targets", "verify", targets, *against, "--json"))
    assert report["ok"]
    assert (report["images"], report["targets"], report["wrong"]) == (5, 10, 0)
    assert report["found"]["log_probs"] < report["allowed"]["log_probs"]
    assert "wrong         0" in works("targets", "verify", targets, *against)

    torch.manual_seed(1)
    other = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    wrong = ("--against", home / "faces", "--teacher", tmp_path / "other.pt")
    assert "teacher's sha256" in fails("targets", "verify", targets, *wrong)
    for half in (against[:2], against[2:4], (*against, "--deep")):
        assert "go together" in fails("targets", "verify", targets, *half, code=2)


def test_a_cache_of_the_older_rule_of_pixels_says_so(
    targets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note_older_pixels(Cache.open(targets))
    assert capsys.readouterr().err == ""
    golden = Path(__file__).parents[1] / "golden" / "format1.gkd"
    note_older_pixels(Cache.open(golden))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"{golden}: made by an older version, which ignored the EXIF orientation"
    )


@pytest.mark.parametrize("level", ["--quick", "--deep"])
def test_a_cache_is_verified_at_every_level(targets: Path, level: str) -> None:
    report = json.loads(works("targets", "verify", targets, level, "--json"))
    assert (report["level"], report["ok"]) == (level.removeprefix("--"), True)
    assert json.loads(works("targets", "verify", targets, "--json"))["level"] == "hashes"


def test_a_finished_cache_is_not_made_again(home: Path, targets: Path) -> None:
    teacher = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    again = json.loads(works("cache-teacher", home / "faces", targets, *teacher, "--json"))
    assert again["images"] == 0
    other = fails("cache-teacher", home / "faces", targets, *teacher, "--threshold", "0.5")
    assert "threshold: the cache has 0.93, this run has 0.5" in other


def test_a_cache_names_the_backbone_that_was_recognised(home: Path, targets: Path) -> None:
    info = json.loads(works("targets", "info", targets, "--json"))
    assert info["teacher"]["arch"] == "iresnet18"
    teacher = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    named = ("--arch", "iresnet18", "--json")
    again = json.loads(works("cache-teacher", home / "faces", targets, *teacher, *named))
    assert again["images"] == 0


def test_centres_come_from_files(home: Path, targets: Path, tmp_path: Path) -> None:
    teacher = ("--teacher", home / "teacher.pt", "--arch", "iresnet18")
    centers = ("--centers", targets.with_name("targets.centers.npy"))
    works("cache-teacher", home / "faces", tmp_path / "other.gkd", *teacher, *centers)
    info = json.loads(works("targets", "info", tmp_path / "other.gkd", "--json"))
    assert info["centers"]["kind"] == "file"
    assert info["centers"]["name"] == "targets.centers.npy"


def test_a_student_is_evaluated_exported_and_evaluated_again(
    home: Path, run: Path, tmp_path: Path
) -> None:
    (result,) = json.loads(works("evaluate", run, home / "others.bin", "--json"))
    table = works("evaluate", run, home / "others.bin", "--plot", tmp_path / "roc.png")
    assert f"{result['accuracy']:.2%}".rstrip("%") in table
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    exported = json.loads(works("export", run, tmp_path / "student.onnx", "--json"))
    assert exported["bytes"] == (tmp_path / "student.onnx").stat().st_size
    output = works("export", run, tmp_path / "student.safetensors", "--licence", "Ours.")
    assert f"model card {tmp_path / 'student.safetensors.md'}" in output
    for name in ("student.onnx", "student.safetensors"):
        (again,) = json.loads(works("evaluate", tmp_path / name, home / "others.bin", "--json"))
        assert again["auc"] == pytest.approx(result["auc"], abs=1e-6)
    card = (tmp_path / "student.safetensors.md").read_text()
    teacher = hashlib.sha256((home / "teacher.pt").read_bytes()).hexdigest()
    assert f"sha256 of its weights `{teacher}`" in card
    assert "Ours." in card
    assert f"| `others` | {result['accuracy']:.2%} |" in card
    assert str(home) not in card


def test_a_finished_run_is_not_trained_again(home: Path, targets: Path, run: Path) -> None:
    weights = (run / "checkpoints" / "last.pt").read_bytes()
    sets = ("--set", f"evaluation.sets=['{home / 'others.bin'}']")
    assert "steps" in works("train-student", home / "faces", targets, run, *TINY, *sets)
    again = works("train-student", home / "faces", targets, run, *TINY, *sets, "--json")
    assert json.loads(again)["steps"] == 8
    assert (run / "checkpoints" / "last.pt").read_bytes() == weights


def test_a_report_is_written_and_can_be_written_again(run: Path) -> None:
    page = (run / "report.html").read_bytes()
    assert b"others" in page
    (run / "report.html").unlink()
    assert works("report", run).strip() == str(run / "report.html")
    assert (run / "report.html").read_bytes() == page
    assert "not a gkd run folder" in fails("report", run / "checkpoints")


@pytest.mark.parametrize("flags", [(), ("--without-kd",)])
def test_a_dry_run_prints_the_cost_and_writes_nothing(
    home: Path, targets: Path, cache_dir: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    before = sorted(cache_dir.rglob("*"))
    train = ("train-student", home / "faces", targets, tmp_path / "run", *TINY, *flags, "--dry-run")
    result = json.loads(works(*train, "--json"))
    assert result["total_steps"] == 8
    assert result["parameters"]["head"] == 8 * 16
    assert (result["targets_bytes"] > 0) == (not flags)
    words = works(*train)
    assert "8: 2 epochs of 4" in words
    assert f"{result['parameters']['backbone']:,}" in words
    assert f"{result['memory_total'] / 2**20:,.1f} MiB" in words
    assert not (tmp_path / "run").exists()
    assert sorted(cache_dir.rglob("*")) == before
    wrong = fails(*train, "--set", "train.batch_size=64")
    assert "fewer than one batch of 64" in wrong


def test_only_the_agreed_cache_is_trained_from(
    home: Path, targets: Path, cache_dir: Path, tmp_path: Path
) -> None:
    before = sorted(cache_dir.rglob("*"))
    agreed = json.loads(works("targets", "info", targets, "--json"))["id"]
    train = ("train-student", home / "faces", targets, tmp_path / "run", *TINY)
    works(*train, "--cache-id", agreed, "--dry-run")
    (tmp_path / "run.toml").write_text(f'[data]\ncache_id = "{"0" * 64}"')
    for other in (
        ("--cache-id", agreed[:-1]),
        ("--cache-id", "latest", "--without-kd"),
        ("--config", tmp_path / "run.toml"),
    ):
        message = fails(*train, *other)
        assert "another cache than the one that was agreed on" in message
        assert agreed in message
    assert "is a shell variable unset?" in fails(*train, "--cache-id", "", code=2)
    assert not (tmp_path / "run").exists()
    assert sorted(cache_dir.rglob("*")) == before


def test_a_run_without_distillation_needs_no_targets(home: Path, tmp_path: Path) -> None:
    works("train-student", home / "faces", tmp_path / "run", *TINY, "--without-kd")
    message = fails("train-student", home / "faces", tmp_path / "other", *TINY, code=2)
    assert "--without-kd" in message


def test_weights_and_checkpoints_that_are_cut_off_are_named(
    home: Path, run: Path, targets: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "teacher.pt"
    cut.write_bytes((home / "teacher.pt").read_bytes()[:5000])
    stderr = fails("evaluate", cut, home / "others.bin")
    assert "teacher.pt: cannot be read as weights" in stderr
    assert "cut off after 5,000 bytes" in stderr
    shutil.copytree(run, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    sets = ("--set", f"evaluation.sets=['{home / 'others.bin'}']")
    stderr = fails("train-student", home / "faces", targets, tmp_path / "run", *TINY, *sets)
    assert "last.pt: cannot be read as weights" in stderr


def test_code_that_a_cache_names_is_not_run(targets: Path, home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gkd"
    shutil.copytree(targets, copy)
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["teacher"]["arch"] = "tests.commands.running:fails"
    rewrite(copy, root)
    against = ("--against", home / "faces", "--teacher", home / "teacher.pt")
    stderr = fails("targets", "verify", copy, *against)
    assert (
        "names the code tests.commands.running:fails as its teacher's network, and code is "
        "never run" in stderr
    )
    chosen = gkd("targets", "verify", copy, *against, "--arch", "iresnet18")
    assert "names the code" not in chosen.output


def rewrite(cache: Path, root: dict[str, Any]) -> None:
    """Give a cache other attributes, and a manifest that vouches for them."""
    (cache / "zarr.json").write_bytes(layout.encode_json(root))
    spec = read_spec(cache)
    names = [name for name, _ in layout.metadata_files(spec)]
    files = {name: layout.file_record(cache / name) for name in names}
    commits = [
        (read_commit(cache, spec, k), layout.file_record(cache / layout.commit_file(k)))
        for k in range(spec.num_shards)
    ]
    content = layout.manifest_content(spec, files, commits)
    (cache / layout.MANIFEST).write_bytes(content)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_says_how_to_resume(
    home: Path, targets: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    options = (*TINY, "--without-kd", "--set", "train.epochs=500")
    command = ("train-student", home / "faces", tmp_path / "run", *options)
    with running(run_command, *command) as process:
        while "epoch 3/500" not in process.err:
            assert process.poll() is None, process.err
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait() == 1
    assert "run the same command again to resume" in process.err
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_control_characters_in_names_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {"key\x1b[2J": "why\nnot"}
    emit({"teacher": "r50\x1b[2J\x07", "names": ["a\x1b]0;b"], "skipped": skipped}, False)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3
    assert "r50" in printed
    assert all(letter.isprintable() or letter == "\n" for letter in printed)


def test_control_characters_in_errors_are_not_printed(tmp_path: Path) -> None:
    stderr = fails("targets", "info", tmp_path / "x\x1b[2J\x07.gkd")
    assert "expected a cache of targets" in stderr
    assert all(letter.isprintable() or letter == "\n" for letter in stderr)


def test_json_is_valid_if_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"gap": math.inf, "of": [math.nan, 1.5]}, True)
    assert capsys.readouterr().out == '{"gap":null,"of":[null,1.5]}\n'
