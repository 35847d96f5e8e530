"""The commands as a user types them: the whole way, and every mistake as one message."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from gkd.commands.shared import emit
from gkd.storage import layout
from gkd.storage.metadata import read_commit, read_spec
from gkd.storage.records import open_records
from gkd.storage.synthetic import draw_faces, draw_pairs
from gkd.trainer.backbones import build_backbone
from gkd.trainer.verification_set import write_verification_set
from tests.commands import TINY, fails, gkd, works
from tests.storage.test_forms import write_form


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of eight people, a verification set, a teacher, a cache and a student of it."""
    home = tmp_path_factory.mktemp("home")
    known, unknown = range(8), range(8, 14)
    draw_faces(home / "faces", identities=known, images_each=4, seed=0, workers=1)
    draw_faces(home / "others", identities=unknown, images_each=4, seed=0, workers=1)
    paths, issame = draw_pairs(home / "others", identities=unknown, images_each=4, pairs=40, seed=0)
    write_verification_set(home / "others.bin", [path.read_bytes() for path in paths], issame)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(teacher.state_dict(), home / "teacher.pt")
    return home


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
    told = fails(*making[:-6], "--draw-temperature", "3")
    assert "--draw-temperature: expected one of --temperatures, which are 1,2,4, got 3;" in told


def test_centres_are_made_described_and_used(home: Path, tmp_path: Path) -> None:
    made, teacher = tmp_path / "made.safetensors", ("--teacher", home / "teacher.pt")
    told = json.loads(
        works("centers", "build", home / "faces", made, *teacher, "--refine", 2, "--json")
    )
    assert (told["kind"], told["centers"], told["images"]) == ("refined", 8, 32)
    assert told["refined"]["loss"] < told["class_mean"]["loss"]
    described = works("centers", "info", made, "--records", home / "faces")
    assert re.search(r"kind +refined\n", described)
    assert re.search(r"orientation +C x D\n", described)
    out = tmp_path / "targets.gkd"
    works("cache-teacher", home / "faces", out, *teacher, "--centers", made)
    assert "refined by a margin head" in (out / "README.md").read_text()
    against = ("--against", home / "faces", *teacher, "--centers", made, "--json")
    assert json.loads(works("targets", "verify", out, *against))["ok"]
    told_wrong = fails(
        *("cache-teacher", home / "faces", tmp_path / "b.gkd", *teacher),
        *("--bgr", "--centers", made),
    )
    assert "preprocess: of the centres" in told_wrong
    assert "is there already" in fails("centers", "build", home / "faces", made, *teacher)
    assert "8 centres, but the records have 6" in fails(
        "centers", "info", made, "--records", home / "others"
    )


def test_help_names_every_command() -> None:
    listed = works("--help")
    for command in ("cache-teacher", "train-student", "evaluate", "report", "export", "demo"):
        assert command in listed
    assert "verify" in works("targets", "--help")
    assert "pack" in works("records", "--help")
    assert "build" in works("centers", "--help")


def test_help_needs_no_heavy_import() -> None:
    script = "import sys, gkd.cli; print(sorted({'torch', 'zarr', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_records_are_packed_described_and_verified(home: Path, tmp_path: Path) -> None:
    packed = json.loads(works("records", "pack", home / "faces", tmp_path / "pack", "--json"))
    assert (packed["images"], packed["identities"]) == (32, 8)
    info = json.loads(works("records", "info", tmp_path / "pack", "--json"))
    assert (info["images"], info["identities"], info["layout"]) == (32, 8, "insightface")
    assert "32" in works("records", "info", tmp_path / "pack")
    assert "32 images, 8 identities, 0 faults" in works("records", "verify", tmp_path / "pack")


def test_published_forms_are_described_cached_and_trained_on(home: Path, tmp_path: Path) -> None:
    faces = open_records(home / "faces")
    parquet = write_form("parquets", faces, tmp_path / "hub")
    tar = write_form("tar", faces, tmp_path / "shards")
    for path, form in ((parquet, "parquet"), (tar, "webdataset")):
        info = json.loads(works("records", "info", path, "--json"))
        assert (info["images"], info["identities"], info["layout"]) == (32, 8, form)
        assert "32 images, 8 identities, 0 faults" in works("records", "verify", path)
    out, teacher = tmp_path / "targets.gkd", ("--teacher", home / "teacher.pt")
    works("cache-teacher", parquet, out, *teacher, "--centers", "class-mean")
    against = json.loads(works("targets", "verify", out, "--against", tar, *teacher, "--json"))
    assert against["ok"]
    works("records", "pack", parquet, tmp_path / "pack")
    for source in (tar, tmp_path / "pack"):
        works("train-student", source, out, tmp_path / f"run-{source.name}", *TINY)
    told = gkd("train-student", parquet, out, tmp_path / "run", *TINY, "--dry-run")
    assert told.exit_code == 0
    assert "decodes up to 7 images beside its own; `gkd records pack" in told.stderr


def test_every_fault_of_records_is_listed(home: Path, tmp_path: Path) -> None:
    works("records", "pack", home / "faces", tmp_path / "pack")
    spoil(tmp_path / "pack" / "train.rec", row=3)
    result = gkd("records", "verify", tmp_path / "pack")
    assert result.exit_code == 1
    assert re.search(r"train\.rec, key 4, offset \d+: ", result.stdout)
    assert "32 images, 8 identities, 1 faults" in result.stdout
    report = json.loads(gkd("records", "verify", tmp_path / "pack", "--json").stdout)
    assert len(report["faults"]) == 1


def spoil(pack: Path, *, row: int) -> None:
    """Overwrite the start of one encoded image."""
    records = open_records(pack)
    content = bytearray(pack.read_bytes())
    start = content.index(bytes(records.encoded(row)))
    content[start : start + 64] = bytes(64)
    pack.write_bytes(content)


def test_a_cache_is_described_verified_and_drawn(targets: Path, tmp_path: Path) -> None:
    info = json.loads(works("targets", "info", targets, "--json"))
    assert (info["num_samples"], info["num_classes"], info["shards"]) == (32, 8, 1)
    assert info["centers"]["kind"] == "class-mean"
    assert targets.with_name("targets.centers.npy").exists()
    assert "group temperature  1" in works("targets", "info", targets)
    told = works("targets", "verify", targets)
    assert "bytes in shards" in told
    assert ", 0 faults" in told
    assert json.loads(works("targets", "verify", targets, "--json"))["ok"]
    figures = json.loads(works("targets", "stats", targets, "--json"))
    assert [view["view"] for view in figures["views"]] == ["original", "flipped"]
    assert "bytes per sample" in works("targets", "stats", targets, "--plot", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_check_is_quick_or_deep(targets: Path) -> None:
    result = gkd("targets", "verify", targets, "--quick", "--deep")
    assert result.exit_code == 2
    assert "--quick and --deep exclude each other" in result.stderr


def test_a_damaged_cache_is_told_by_file(home: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("level", ["--quick", "--deep"])
def test_a_cache_is_looked_at_more_or_less_closely(targets: Path, level: str) -> None:
    report = json.loads(works("targets", "verify", targets, level, "--json"))
    assert (report["level"], report["ok"]) == (level.removeprefix("--"), True)
    assert json.loads(works("targets", "verify", targets, "--json"))["level"] == "hashes"


def test_a_finished_cache_is_not_made_again(home: Path, targets: Path) -> None:
    teacher = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    again = json.loads(works("cache-teacher", home / "faces", targets, *teacher, "--json"))
    assert again["images"] == 0
    other = fails("cache-teacher", home / "faces", targets, *teacher, "--threshold", "0.5")
    assert "threshold: the cache has 0.93, this run 0.5" in other


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


def test_corrupt_records_end_a_run_or_are_left_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path / "materialised"))
    pack, out = tmp_path / "pack", tmp_path / "targets.gkd"
    works("records", "pack", home / "faces", pack)
    spoil(pack / "train.rec", row=3)
    teacher = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    message = fails("cache-teacher", pack, out, *teacher)
    assert "train.rec, key 4, offset" in message
    assert "--skip-corrupt" in message

    summary = json.loads(works("cache-teacher", pack, out, *teacher, "--skip-corrupt", "--json"))
    assert summary["skipped"] == 1
    skipped = json.loads(works("targets", "info", out, "--json"))["skipped"]
    assert list(skipped) == ["4"]
    assert "expected an encoded image" in skipped["4"]
    assert ", 0 faults" in works("targets", "verify", out)
    for flag in ((), ("--without-kd",)):
        works("train-student", pack, out, tmp_path / f"run{len(flag)}", *TINY, *flag)


def test_a_student_is_judged_exported_and_judged_again(
    home: Path, run: Path, tmp_path: Path
) -> None:
    (result,) = json.loads(works("evaluate", run, home / "others.bin", "--json"))
    table = works("evaluate", run, home / "others.bin", "--plot", tmp_path / "roc.png")
    assert f"{result['accuracy']:.2%}".rstrip("%") in table
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    exported = json.loads(works("export", run, tmp_path / "student.onnx", "--json"))
    assert exported["bytes"] == (tmp_path / "student.onnx").stat().st_size
    told = works("export", run, tmp_path / "student.safetensors", "--licence", "Ours.")
    assert f"described in {tmp_path / 'student.safetensors.md'}" in told
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


def test_a_run_is_told_on_a_page_that_can_be_made_again(run: Path) -> None:
    page = (run / "report.html").read_bytes()
    assert b"others" in page
    (run / "report.html").unlink()
    assert works("report", run).strip() == str(run / "report.html")
    assert (run / "report.html").read_bytes() == page
    assert "expected the folder of a run" in fails("report", run / "checkpoints")


@pytest.mark.parametrize("flags", [(), ("--without-kd",)])
def test_a_dry_run_tells_and_leaves_nothing(
    home: Path, targets: Path, cache_dir: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    before = sorted(cache_dir.rglob("*"))
    train = ("train-student", home / "faces", targets, tmp_path / "run", *TINY, *flags, "--dry-run")
    told = json.loads(works(*train, "--json"))
    assert told["total_steps"] == 8
    assert told["parameters"]["head"] == 8 * 16
    assert (told["targets_bytes"] > 0) == (not flags)
    words = works(*train)
    assert "8: 2 epochs of 4" in words
    assert f"{told['parameters']['backbone']:,}" in words
    assert f"{told['memory_total'] / 2**20:,.1f} MiB" in words
    assert not (tmp_path / "run").exists()
    assert sorted(cache_dir.rglob("*")) == before
    wrong = fails(*train, "--set", "train.batch_size=64")
    assert "fewer than one batch of 64" in wrong


def test_a_run_without_distillation_needs_no_targets(home: Path, tmp_path: Path) -> None:
    works("train-student", home / "faces", "-", tmp_path / "run", *TINY, "--without-kd")
    message = fails("train-student", home / "faces", "-", tmp_path / "other", *TINY)
    assert "--without-kd" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train-student", "faces", "-", "r", "--set", "train.epoch=3"), "did you mean train.epoc"),
        (("train-student", "faces", "-", "r", "--student", "resnet"), "iresnet50"),
        (("train-student", "nowhere", "-", "r"), "nowhere: expected a folder with train.rec"),
        (("train-student", "faces", "faces", "r"), "expected a cache of targets"),
        (("records", "verify", "teacher.pt"), "expected a folder with train.rec"),
        (("targets", "verify", "faces"), "expected a cache of targets"),
        (("evaluate", "nothing.pt", "others.bin"), "nothing.pt"),
        (("evaluate", "teacher.pt", "teacher.pt"), "teacher.pt"),
        (("evaluate", "teacher.pt", "others.bin", "--arch", "iresnet50"), "fit iresnet50"),
        (("export", "nowhere", "out.onnx"), "nowhere"),
        (("export", "faces", "out.pt"), "expected a name that ends in .onnx or .safetensors, got"),
        (("export", "faces", "out.onnx"), "faces: expected the folder of a run"),
        (("evaluate", "teacher.pt", "others.bin", "--plot", "no/x.png"), "there is no folder no"),
        (("evaluate", "teacher.pt", "others.bin", "--plot", "faces"), "got a folder; name a file"),
        (("targets", "stats", "targets.gkd", "--plot", "no/x.png"), "there is no folder no"),
    ],
)
def test_a_mistake_ends_in_one_message(
    home: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(home)
    told = fails(*arguments)
    assert told.startswith("Error: ")
    assert message in told


def test_weights_and_checkpoints_that_are_cut_off_are_named(
    home: Path, run: Path, targets: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "teacher.pt"
    cut.write_bytes((home / "teacher.pt").read_bytes()[:5000])
    told = fails("evaluate", cut, home / "others.bin")
    assert "teacher.pt: cannot be read as weights" in told
    assert "cut off after 5,000 bytes" in told
    shutil.copytree(run, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    sets = ("--set", f"evaluation.sets=['{home / 'others.bin'}']")
    told = fails("train-student", home / "faces", targets, tmp_path / "run", *TINY, *sets)
    assert "last.pt: cannot be read as weights" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "2"), "threshold: expected from 0 to 1, got 2"),
        (("--views", "flopped"), "views: expected original, flipped"),
        (("--centers", "nothing.npy"), "nothing.npy"),
        (("--device", "abacus"), "device: expected auto, cpu"),
        (("--teacher", "nothing.onnx"), "nothing.onnx"),
        (("--teacher", "."), ".: expected the folder of a run of `gkd train-student`"),
    ],
)
def test_a_wrong_option_of_cache_teacher_is_explained(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(home)
    given = {"--teacher": "teacher.pt", "--centers": "class-mean"} | {options[0]: options[1]}
    told = fails(
        "cache-teacher", "faces", "out.gkd", *(word for pair in given.items() for word in pair)
    )
    assert message in told
    assert not (home / "out.gkd").exists()


@pytest.mark.parametrize(
    "option", [("--compile",), ("--precision", "bfloat16"), ("--arch", "iresnet50")], ids=str
)
def test_what_an_onnx_teacher_cannot_follow_is_refused(
    home: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    teacher = ("--teacher", home / "teacher.onnx", "--centers", "class-mean", *option)
    told = fails("cache-teacher", home / "faces", tmp_path / "c.gkd", *teacher)
    named = " ".join(option)
    assert f"teacher.onnx: {named}: expected weights for a network of torch, got an ONNX" in told


def test_code_that_a_cache_names_is_not_run(targets: Path, home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gkd"
    shutil.copytree(targets, copy)
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["teacher"]["arch"] = "tests.commands:fails"
    rewrite(copy, root)
    against = ("--against", home / "faces", "--teacher", home / "teacher.pt")
    told = fails("targets", "verify", copy, *against)
    assert (
        "names the code tests.commands:fails as its teacher's network, and no code is run" in told
    )
    chosen = fails("targets", "verify", copy, *against, "--arch", "iresnet18")
    assert "names the code" not in chosen


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


def test_memory_that_ran_out_is_no_traceback(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = ("--teacher", home / "teacher.pt", "--centers", "class-mean")
    for error in (
        MemoryError("Unable to allocate 3 TiB"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 3 TiB"),
    ):
        monkeypatch.setattr("gkd.pipeline.run.cache_teacher", Mock(side_effect=error))
        told = fails("cache-teacher", home / "faces", tmp_path / "c.gkd", *huge)
        assert "memory ran out" in told
        assert "take a smaller batch (--batch-size" in told
    monkeypatch.setattr("gkd.pipeline.run.cache_teacher", Mock(side_effect=RuntimeError("a bug")))
    assert isinstance(
        gkd("cache-teacher", home / "faces", tmp_path / "c.gkd", *huge).exception, RuntimeError
    )


def test_centres_are_class_means_or_files(home: Path) -> None:
    both = ("--centers", "class-mean", "--centers", "x.npy", "--teacher", home / "teacher.pt")
    told = fails("cache-teacher", home / "faces", home / "out.gkd", *both)
    assert "--centers: expected either class-mean alone or files, got class-mean x.npy" in told


def test_a_plot_that_cannot_be_drawn_is_told_before_the_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = fails("evaluate", "no.pt", home / "others.bin", "--plot", tmp_path / "x.png")
    assert "pip install '.[plot]'" in told


def test_wrong_usage_is_exit_code_2(home: Path) -> None:
    assert "Missing option '--teacher'" in fails("cache-teacher", "a", "b", code=2)
    numbers = ("--teacher", "t", "--centers", "class-mean", "--temperatures", "one")
    assert "expected numbers such as 1,2,4" in fails("cache-teacher", "a", "b", *numbers, code=2)
    numbers = ("--teacher", "t", "--centers", "class-mean", "--shard-samples", "many")
    assert "--draw-from says how classes are drawn; give --draws too, above 0" in fails(
        *("cache-teacher", "a", "b", "--teacher", "t", "--centers", "class-mean"),
        *("--draws", "0", "--draw-from", "all"),
        code=2,
    )
    assert "expected auto or a whole number" in fails("cache-teacher", "a", "b", *numbers, code=2)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on(
    home: Path, targets: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    command = [sys.executable, "-m", "gkd.cli", "train-student", home / "faces", "-"]
    command += [tmp_path / "run", *TINY, "--without-kd", "--set", "train.epochs=500"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "epoch 3/500" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(sent)
        assert "run the same command again to go on" in process.stderr.read()
    assert process.returncode == 1
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_names_of_strangers_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = {"key\x1b[2J": "why\nnot"}
    emit({"teacher": "r50\x1b[2J\x07", "names": ["a\x1b]0;b"], "skipped": skipped}, False)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3
    assert "r50" in printed
    assert all(letter.isprintable() or letter == "\n" for letter in printed)


def test_an_error_that_names_what_a_stranger_wrote_does_not_either(tmp_path: Path) -> None:
    told = fails("targets", "info", tmp_path / "x\x1b[2J\x07.gkd")
    assert "expected a cache of targets" in told
    assert all(letter.isprintable() or letter == "\n" for letter in told)


def test_json_is_json_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"gap": math.inf, "of": [math.nan, 1.5]}, True)
    assert capsys.readouterr().out == '{"gap":null,"of":[null,1.5]}\n'
