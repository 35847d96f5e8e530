"""The report of a run: numbers of the log, no requests, and no trust in names."""

import base64
import json
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import torch

from gkd.storage.analysis.stats import stats
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.errors import ConfigError
from gkd.storage.records.base import Subset
from gkd.storage.records.open import open_records
from gkd.trainer.data.dataset import join_targets
from gkd.trainer.evaluation.bin_file import load_verification_set
from gkd.trainer.evaluation.embed import evaluate, module_embed
from gkd.trainer.final_metrics import FinalMetrics, read_final_metrics, write_final_metrics
from gkd.trainer.identity_cosines import IdentityCosineStatistics, summarise
from gkd.trainer.loop import train
from gkd.trainer.report.page import write_report
from gkd.trainer.state import RunState
from tests.trainer.faces import load, run, small_config

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "<script>alert(1)</script>\"'&$\\frac$ </td></table>\x07\udce9 名"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tables by id as lists of rows, headings, plain text, images, and every attribute."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._table: list[list[str]] = []
        self.feed(content.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["id"] or "", [])
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self._table[-1][-1] += data
        if self._open and self._open[-1] != "style":
            self.text += data

    def columns(self, table: str) -> dict[str, list[str]]:
        head, *rows = self.tables[table]
        return {name: [row[column] for row in rows] for column, name in enumerate(head)}

    def images(self) -> list[bytes]:
        start = "data:image/svg+xml;base64,"
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(source.startswith(start) for source in sources)
        return [base64.b64decode(source.removeprefix(start)) for source in sources]


@pytest.fixture(scope="module")
def finished(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    run(faces, out, f'evaluation.sets=["{faces}/pairs.bin"]')
    return out


def parsed(run: Path) -> Page:
    return Page((run / "report.html").read_bytes())


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_epochs_are_means_of_the_log(finished: Path) -> None:
    columns = parsed(finished).columns("epochs")
    lines = [line for line in logged(finished) if "loss" in line]
    assert columns["Epoch"] == ["1", "2", "3"]
    for name, title in (("loss", "Loss"), ("ce", "CE"), ("primary", "Primary")):
        for epoch in range(3):
            mean = fmean(line[name] for line in lines[5 * epoch : 5 * epoch + 5])
            assert float(columns[title][epoch]) == pytest.approx(mean, rel=1e-3)
    assert float(columns["Learning rate"][-1]) == pytest.approx(2.5e-7)
    waits = [line["data_wait"] for line in lines[5:10]]
    assert columns["Data wait"][1] == f"{fmean(waits):.1%}"


def test_verification_uses_the_last_weights(faces: Path, finished: Path) -> None:
    page = parsed(finished)
    records, targets = load(faces)
    config = small_config(f'evaluation.sets=["{faces}/pairs.bin"]')
    state = RunState(config, records, targets)
    last = finished / "checkpoints/last.pt"
    state.restore(torch.load(last, weights_only=True), last)
    embed = module_embed(state.model.eval(), preprocess_preset("arcface"), state.device)
    expected = evaluate(embed, load_verification_set(faces / "pairs.bin"))
    columns = page.columns("verification")
    assert columns["Set"] == ["pairs"]
    assert columns["Pairs"] == ["40"]
    assert columns["Accuracy"] == [f"{expected.accuracy:.2%}"]
    assert columns["AUC"] == [f"{expected.auc:.4f}"]
    assert columns["TAR@1e-01"] == [f"{expected.tar_at_far[0.1]:.2%}"]
    assert "TAR@1e-03" not in columns  # thirty impostor pairs are too few to measure it
    accuracies = [line["accuracy"]["pairs"] for line in logged(finished) if "accuracy" in line]
    assert page.columns("accuracies")["pairs"] == [f"{accuracy:.2%}" for accuracy in accuracies]
    found = read_final_metrics(finished)
    assert found is not None
    for far, tar in found.sets[0].roc:
        below = expected.tar[expected.far <= far + 1e-9]
        assert tar == pytest.approx(below.max())


def test_groups_are_those_of_the_cache(faces: Path, finished: Path) -> None:
    expected = {view.view: view for view in stats(Cache.open(faces / "targets.gkd")).views}
    found = read_final_metrics(finished)
    assert found is not None
    assert {view: dict(sizes) for view, sizes in found.groups.items()} == {
        view: dict(counts.histogram) for view, counts in expected.items()
    }
    columns = parsed(finished).columns("groups")
    for name, view in expected.items():
        counts = [int(number) for number in columns[name]]
        assert sum(counts) == view.samples
        assert counts[0] == dict(view.histogram).get(1, 0)


def test_groups_are_the_same_read_in_blocks(faces: Path, tmp_path: Path, finished: Path) -> None:
    records = open_records(faces / "faces")
    cache = Cache.open(faces / "targets.gkd")
    records, targets = join_targets(records, cache, workers=1, folder=tmp_path, order="blocks")
    config = small_config("data.order=blocks", "train.epochs=1")
    train(config, records, targets, tmp_path / "out")
    ours, theirs = read_final_metrics(tmp_path / "out"), read_final_metrics(finished)
    assert ours is not None
    assert theirs is not None
    assert ours.groups == theirs.groups


def test_identities_are_ranked_by_their_mean_cosine(faces: Path, tmp_path: Path) -> None:
    records = Subset(open_records(faces / "faces"), np.arange(40))
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-1, 1, 40)
    fit = IdentityCosineStatistics(40)
    order = rng.permutation(40)[:38]
    for rows in np.array_split(order, 5):
        fit.add(torch.from_numpy(rows), torch.from_numpy(cosines[rows]))
    summary = fit.summary(records)
    means = {
        label: cosines[[row for row in order if records.labels[row] == label]].mean()
        for label in range(6)
    }
    assert summary is not None
    assert (summary.images, summary.of) == (38, 40)
    assert summary.mean == pytest.approx(cosines[order].mean())
    assert [identity.number for identity in summary.worst] == sorted(means, key=means.__getitem__)
    for identity in summary.worst:
        assert identity.mean == pytest.approx(means[identity.number], abs=1e-5)
        own_rows = [row for row in order if records.labels[row] == identity.number]
        assert identity.images == len(own_rows)
        worst = sorted(own_rows, key=lambda row: cosines[row])[:3]
        assert [key for key, _ in identity.worst] == [records.key(row) for row in worst]


def test_a_run_measures_its_last_epoch(faces: Path, finished: Path) -> None:
    found = read_final_metrics(finished)
    assert found is not None
    assert found.identity_cosines is not None
    cosines = found.identity_cosines
    assert (cosines.images, cosines.of) == (40, 42)  # an epoch is five batches of eight
    columns = parsed(finished).columns("identities")
    assert columns["Class"] == [str(identity.number) for identity in cosines.worst]
    assert columns["Mean cosine"] == [f"{identity.mean:.4f}" for identity in cosines.worst]
    keys = {f"person_{n}/{image}.jpg" for n in range(6) for image in range(7)}
    cells = columns["Images with the lowest cosine: record key (cosine)"]
    assert {part.split(" (")[0] for cell in cells for part in cell.split("), ")} <= keys


def test_it_describes_the_run(finished: Path) -> None:
    page = parsed(finished)
    described = json.loads((finished / "run.json").read_text())
    origin = dict(page.tables["origin"][1:])
    assert origin["Cache id"] == described["dataset"]["cache_id"]
    assert origin["Data set fingerprint"] == described["dataset"]["dataset"]
    assert f"torch {torch.__version__}" in origin["Versions"]
    assert "gkd test" in page.text
    assert (finished / "config.toml").read_text() in page.text


def test_it_requests_nothing(finished: Path) -> None:
    page = parsed(finished)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if (tag, name) != ("img", "src"):
            assert name not in ("src", "href", "srcset", "action", "background", "style"), tag
            assert "//" not in value
    content = (finished / "report.html").read_text()
    assert "@import" not in content
    assert "url(" not in content
    assert "http://" not in content
    assert "https://" not in content
    figures = page.images()
    assert len(figures) == 4
    for figure in figures:
        for element in ElementTree.fromstring(figure).iter():
            links = [value for name, value in element.items() if name.endswith("href")]
            assert all(link.startswith("#") for link in links)


def with_hostile_text(run: Path, out: Path) -> Path:
    """A finished run with hostile text wherever a file has text."""
    shutil.copytree(run, out)
    described = json.loads((out / "run.json").read_text())
    described["command"] = ["gkd", HOSTILE]
    described["dataset"] |= {"name": HOSTILE, "path": HOSTILE}
    described["versions"] = {HOSTILE: HOSTILE}
    (out / "run.json").write_text(json.dumps(described).replace("\\udce9", "\\u00e9"))
    (out / "config.toml").write_text(f"# {HOSTILE}".replace("\udce9", "e"))
    lines = logged(run)
    for line in lines:
        if "accuracy" in line:
            line["accuracy"] = {HOSTILE: line["accuracy"]["pairs"]}
    skipped = {"step": 7, "not_finite": {HOSTILE: "nan"}, "records": [HOSTILE, "b"]}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, skipped])
    (out / "metrics.jsonl").write_text(text + '{"step": 16, "lo')
    found = read_final_metrics(run)
    assert found is not None
    assert found.identity_cosines is not None
    name = HOSTILE.replace("\udce9", "e")
    worst = replace(found.identity_cosines.worst[0], worst=((name, 0.5),))
    fit = replace(found.identity_cosines, worst=(worst,))
    sets = (msgspec.structs.replace(found.sets[0], name=name),)
    groups = {name: found.groups["original"]}
    write_final_metrics(out, FinalMetrics(15, sets, groups, fit))
    return out


def test_hostile_names_are_only_text(finished: Path, tmp_path: Path) -> None:
    out = with_hostile_text(finished, tmp_path / "<b>run & $x$")
    write_report(out)
    page = parsed(out)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tables.keys() == parsed(finished).tables.keys() | {"skipped"}
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert page.columns("skipped")["Step"] == ["7"]
    assert "<script>" in page.columns("verification")["Set"][0]
    assert len(page.images()) == 4
    assert b"<script" not in b"".join(page.images())


def test_without_matplotlib_it_has_no_figures(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = parsed(write_report(tmp_path / "run").parent)
    assert page.images() == []
    assert page.tables == parsed(finished).tables
    assert "pip install '.[plot]'" in page.text
    assert f"gkd report {tmp_path / 'run'}" in page.text


def test_the_same_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "a" / "run")
    first = (write_report(tmp_path / "a" / "run")).read_bytes()
    assert write_report(tmp_path / "a" / "run").read_bytes() == first
    names = {path.name for path in (tmp_path / "a/run").iterdir()}
    assert names == {path.name for path in finished.iterdir()}  # no temporary files


def test_a_run_without_sets_or_targets_says_so(faces: Path, tmp_path: Path) -> None:
    records = open_records(faces / "faces")
    config = small_config("kd.enabled=false", "train.epochs=1", "train.log_every=50")
    train(config, records, None, tmp_path / "out")
    page = parsed(tmp_path / "out")
    assert "Trained without distillation." in page.text
    assert "name verification sets in evaluation.sets" in page.text
    (line,) = logged(tmp_path / "out")
    assert line["step"] == 5
    assert page.tables.keys() == {"epochs", "identities", "origin"}


def test_an_unfinished_run_can_be_reported(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/report.json").unlink()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[:8]))
    page = parsed(write_report(tmp_path / "run").parent)
    assert "Step 7 of 15, not finished." in page.text
    assert page.columns("epochs")["Epoch"] == ["1", "2"]
    assert "Not measured" in page.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run.json", None, r"not a gkd run folder: .*run\.json cannot be read"),
        ("run.json", "[]", r"run\.json: expected a file of `gkd train-student`"),
        ("config.toml", "# caf\udce9", r"config\.toml: expected a file of `gkd train-student`"),
        ("report.json", '{"step": "x"}', r"report\.json: expected the metrics of a finished"),
        ("metrics.jsonl", '{"step": 1, "loss": 1}\n', r"metrics\.jsonl: line 1: not a line of"),
        ("metrics.jsonl", '{"step": 1}\nno json\n', r"metrics\.jsonl: line 2: expected a JSON"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    finished: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/report.html").read_bytes()
    (tmp_path / "run" / file).unlink()
    if content is not None:
        (tmp_path / "run" / file).write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        write_report(tmp_path / "run")
    assert (tmp_path / "run/report.html").read_bytes() == before


def test_only_the_worst_identities_are_listed() -> None:
    """Thirty of forty identities, those with the least cosines, ascending."""

    class Many(Subset):
        def __init__(self) -> None:
            self.labels = np.arange(40)
            self.num_classes = 41

        def key(self, row: int) -> str:
            return str(row)

    cosines = np.linspace(1, -1, 40, dtype=np.float32)
    summary = summarise(np.arange(40), cosines, Many())
    assert [each.number for each in summary.worst] == list(range(39, 9, -1))
