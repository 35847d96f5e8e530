"""Identification: ranks by hand and by naive loops, the layout of TinyFace, damaged sets."""

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.demo.synthetic import draw_faces
from gkd.storage.errors import ConfigError, CorruptRecordError
from gkd.trainer.evaluation.embed import evaluate
from gkd.trainer.evaluation.identification import (
    NOBODY,
    first_ranks,
    is_identification,
    load_identification_set,
)
from tests.trainer.evaluation.networks import grid_embed


def unit(*degrees: float) -> npt.NDArray[np.float32]:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_ranks_by_hand() -> None:
    # Persons 1 and 2 with two faces each and a distractor, by their angles.
    gallery = unit(0, 60, 20, 90, 35)
    people = np.array([1, 1, 2, 2, NOBODY])
    # 5 is closest to 0 (person 1). 50 to 60, then 35, 20: person 2 is third. 33 to 35 (nobody),
    # then 20: person 2 is second, person 1 third. Person 3 is absent.
    probes = unit(5, 50, 33, 33, 5)
    sought = np.array([1, 2, 2, 1, 3])
    assert first_ranks(gallery, people, probes, sought).tolist() == [1, 3, 2, 3, 0]


def test_another_persons_face_at_the_same_distance_ranks_first() -> None:
    gallery = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    ranks = first_ranks(gallery, np.array([1, 2, NOBODY]), gallery[:1], np.array([1]))
    assert ranks.tolist() == [2]


@given(st.integers(0, 2**32 - 1))
def test_ranks_agree_with_naive_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gallery = rng.normal(size=(30, 4)).astype(np.float32)
    probes = rng.normal(size=(300, 4)).astype(np.float32)
    people, sought = rng.integers(-1, 8, 30), rng.integers(0, 9, 300)
    expected = []
    for probe, person in zip(probes, sought, strict=True):
        order = np.argsort(-(gallery @ probe))
        ranks = [rank for rank, row in enumerate(order, 1) if people[row] == person]
        expected.append(min(ranks, default=0))
    assert first_ranks(gallery, people, probes, sought).tolist() == expected


@pytest.fixture(scope="module")
def tinyface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five people, three of them probed: two faces in the gallery and two probes each."""
    home = tmp_path_factory.mktemp("tiny")
    draw_faces(home / "drawn", identities=range(5), images_each=4, seed=7, workers=1)
    folder = home / "tinyface/Testing_Set"
    for name in ("Gallery_Match", "Probe", "Gallery_Distractor"):
        (folder / name).mkdir(parents=True)
    for person, images in enumerate(sorted((home / "drawn").iterdir())):
        for number, image in enumerate(sorted(images.iterdir())):
            if person >= 3:
                name = f"Gallery_Distractor/{person}{number}.jpg"
            else:
                name = f"{('Gallery_Match', 'Probe')[number // 2]}/{person + 10}_{number}.jpg"
            shutil.copyfile(image, folder / name)
    return home / "tinyface"


@pytest.mark.parametrize("inner", ["", "Testing_Set"])
def test_from_images_to_rates(tinyface: Path, inner: str) -> None:
    assert is_identification(tinyface / inner)
    loaded = load_identification_set(tinyface / inner)
    assert loaded.name == "tinyface"
    assert loaded.gallery == 6 + 8
    assert loaded.identities.tolist() == [
        *(10, 10, 11, 11, 12, 12),
        *[NOBODY] * 8,
        *(10, 10, 11, 11, 12, 12),
    ]
    result = evaluate(grid_embed, loaded, batch_size=7)
    sums = []
    for number in range(20):
        image = loaded.face(number)
        sums.append(grid_embed(image[None])[0] + grid_embed(image[None, :, ::-1])[0])
    vectors = np.array([vector / np.linalg.norm(vector) for vector in sums])
    ranks = []
    for probe, person in enumerate((10, 10, 11, 11, 12, 12), 14):
        order = np.argsort(-(vectors[:14] @ vectors[probe]))
        ranks.append(1 + next(i for i, row in enumerate(order) if loaded.identities[row] == person))
    assert result.cmc.tolist() == [np.mean([r <= k for r in ranks]) for k in range(1, 51)]
    assert result.rates == {1: result.cmc[0], 5: result.cmc[4], 20: 1.0}
    builtins = result.to_builtins()
    assert (builtins["gallery"], builtins["distractors"], builtins["probes"]) == (6, 8, 6)
    assert builtins["rank"]["20"] == 1.0


def test_probes_without_a_mate_are_left_out_and_counted(tinyface: Path, tmp_path: Path) -> None:
    shutil.copytree(tinyface, tmp_path / "set")
    probes = tmp_path / "set/Testing_Set/Probe"
    shutil.copyfile(probes / "10_2.jpg", probes / "99_1.jpg")
    shutil.rmtree(tmp_path / "set/Testing_Set/Gallery_Distractor")
    result = evaluate(grid_embed, load_identification_set(tmp_path / "set"))
    assert (result.probes, result.without_mate, result.distractors) == (6, 1, 0)
    assert "1 probes have no mate" in result.warning


def test_damaged_sets_are_refused(tinyface: Path, tmp_path: Path) -> None:
    shutil.copytree(tinyface / "Testing_Set", tmp_path / "set")
    folder = tmp_path / "set"
    probe = folder / "Probe/10_2.jpg"
    probe.rename(folder / "Probe/ten.jpg")
    with pytest.raises(ConfigError, match=r"Probe/ten.jpg: expected a name that begins with its"):
        load_identification_set(folder)
    (folder / "Probe/ten.jpg").write_bytes(b"junk")
    (folder / "Probe/ten.jpg").rename(probe)
    with pytest.raises(CorruptRecordError, match=r"Probe/10_2.jpg: expected an encoded image"):
        evaluate(grid_embed, load_identification_set(folder))
    shutil.rmtree(folder / "Gallery_Match")
    with pytest.raises(ConfigError, match="expected a folder Gallery_Match in it, got none"):
        load_identification_set(folder)
    (folder / "Gallery_Match").mkdir()
    with pytest.raises(ConfigError, match="Gallery_Match: expected images, got none"):
        load_identification_set(folder)
    shutil.copyfile(tinyface / "Testing_Set/Probe/10_2.jpg", folder / "Gallery_Match/77_1.jpg")
    with pytest.raises(ConfigError, match="got none in common"):
        load_identification_set(folder)
