"""``gkd evaluate`` and ``gkd export`` as a user types them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result

from gkd.demo.synthetic import draw_faces, draw_pairs
from gkd.trainer.backbones import build_backbone
from gkd.trainer.evaluation.bin_file import write_verification_set
from tests.commands.running import fails, gkd
from tests.trainer.evaluation.ijb_folder import write_ijb

PEOPLE, EACH = range(6), 4


def works(*arguments: object) -> Result:
    result = gkd(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept" / "embeddings"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and the same faces as a .bin, as an IJB-B folder and as TinyFace's."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    network = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(network.state_dict(), home / "network.pt")
    draw_faces(home / "drawn", identities=PEOPLE, images_each=EACH, seed=2, workers=1)
    paths, issame = draw_pairs(
        home / "drawn", identities=PEOPLE, images_each=EACH, pairs=40, seed=0
    )
    write_verification_set(home / "pairs.bin", [path.read_bytes() for path in paths], issame)
    faces = sorted((home / "drawn").rglob("*.jpg"))
    # Two templates a person, of two images each, which are one video or two media.
    templates = [number // 2 for number in range(len(faces))]
    write_ijb(
        home / "IJBB",
        faces,
        templates=templates,
        media=[number // 2 if number % 3 else 100 + number for number in range(len(faces))],
        scores=[0.5 + number / 50 for number in range(len(faces))],
        pairs=[(a, b, int(a // 2 == b // 2)) for a in set(templates) for b in range(a)],
        name="ijbb",
    )
    for name in ("Gallery_Match", "Probe", "Gallery_Distractor"):
        (home / "tiny" / name).mkdir(parents=True)
    for number, face in enumerate(faces):
        person, image = divmod(number, EACH)
        folder = "Gallery_Distractor" if person > 3 else ("Gallery_Match", "Probe")[image // 2]
        shutil.copyfile(face, home / "tiny" / folder / f"{person}_{image}.jpg")
    return home


def test_every_protocol_in_one_call(home: Path, tmp_path: Path) -> None:
    sets = (home / "pairs.bin", home / "IJBB", home / "tiny")
    results = json.loads(works("evaluate", home / "network.pt", *sets, "--json").stdout)
    pairs, templates, tiny = results
    assert [each["protocol"] for each in results] == ["pairs", "templates", "identification"]
    assert (templates["name"], templates["images"], templates["templates"]) == ("ijbb", 24, 12)
    assert (templates["genuine_pairs"], templates["impostor_pairs"]) == (6, 60)
    assert (tiny["gallery"], tiny["distractors"], tiny["probes"]) == (8, 8, 8)
    assert tiny["cmc"] == sorted(tiny["cmc"])
    table = works("evaluate", home / "network.pt", *sets, "--plot", tmp_path / "roc.png").stdout
    assert f"{templates['tar_at_far']['1e-01']:.2%}" in table
    assert f"{templates['auc']:.4f}" in table
    assert f"{templates['eer']:.2%}" in table
    assert f"{tiny['rank']['1']:.2%}" in table
    assert f"{pairs['accuracy']:.2%}" in table
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["pairs.bin", "IJBB", "tiny"])
def test_the_network_runs_once_for_a_model_and_a_set(home: Path, kept: Path, name: str) -> None:
    evaluate = ("evaluate", home / "network.pt", home / name, "--json")
    first = works(*evaluate)
    assert "Evaluating" in first.stderr
    assert len(list(kept.iterdir())) == 1
    again = works(*evaluate)
    assert "Evaluating" not in again.stderr
    fresh = works(*evaluate, "--no-cache")
    assert "Evaluating" in fresh.stderr
    assert first.stdout == again.stdout == fresh.stdout
    assert "Evaluating" in works(*evaluate, "--bgr").stderr
    assert len(list(kept.iterdir())) == 2


def test_embeddings_are_kept_in_the_given_folder(home: Path, kept: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", home / "network.pt", home / "tiny", "--cache", tmp_path / "here")
    works(*evaluate)
    assert not kept.exists()
    assert "Evaluating" not in works(*evaluate).stderr
    assert "exclude each other" in fails(*evaluate, "--no-cache", code=2)


def test_a_result_is_printed_if_embeddings_cannot_be_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = ("evaluate", home / "network.pt", home / "tiny", "--json")
    expected = works(*evaluate, "--no-cache").stdout
    monkeypatch.setenv("GKD_CACHE_DIR", "/proc/c")
    result = works(*evaluate)
    assert result.stdout == expected
    assert "/proc/c/embeddings: the embeddings cannot be saved (" in result.stderr
    file = works(*evaluate, "--cache", home / "network.pt")
    assert file.stdout == expected
    assert "network.pt: the embeddings cannot be saved (" in file.stderr


def test_a_mistake_ends_in_one_message(home: Path, tmp_path: Path) -> None:
    model = ("evaluate", home / "network.pt")
    assert "got neither; pairs are a .bin file" in fails(*model, home / "drawn")
    plot = ("--plot", tmp_path / "roc.png")
    assert "got identification alone; leave --plot out" in fails(*model, home / "tiny", *plot)
    broken = tmp_path / "IJBB"
    shutil.copytree(home / "IJBB", broken)
    (broken / "meta/ijbb_template_pair_label.txt").write_text("0 1 1\n0 77 0\n")
    stderr = fails(*model, broken)
    assert "ijbb_template_pair_label.txt, line 2: expected two templates that have faces" in stderr
