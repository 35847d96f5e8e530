"""Saved embeddings: equal to new ones, used for their model and faces only, written atomically."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gkd.demo.synthetic import draw_faces
from gkd.storage.cache.spec import preprocess_preset
from gkd.storage.reading.gc import collect
from gkd.trainer.evaluation.bin_file import VerificationSet
from gkd.trainer.evaluation.embed import evaluate
from gkd.trainer.evaluation.embedding_cache import EmbeddingCache, default_embeddings
from gkd.trainer.evaluation.ijb import load_ijb
from tests.trainer.evaluation.ijb_folder import write_ijb
from tests.trainer.evaluation.networks import grid_embed
from tests.trainer.evaluation.test_bin_file import IMAGES, ISSAME

PAIRS = VerificationSet(Path("faces.bin"), tuple(IMAGES), ISSAME)
ARCFACE = preprocess_preset("arcface")


class Counting:
    """A network that counts the images it embeds."""

    seen = 0

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        self.seen += len(images)
        return grid_embed(images)


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "store", "a" * 64, ARCFACE, "float32")


def test_a_model_embeds_a_set_once(store: EmbeddingCache) -> None:
    network = Counting()
    first = evaluate(network, PAIRS, store=store)
    assert network.seen == 40
    again = evaluate(network, PAIRS, store=store, batch_size=3)
    assert network.seen == 40
    assert again.to_builtins() == first.to_builtins() == evaluate(network, PAIRS).to_builtins()
    assert len(list(store.folder.iterdir())) == 1


def test_everything_that_determines_an_embedding_is_in_its_key(store: EmbeddingCache) -> None:
    network = Counting()
    evaluate(network, PAIRS, store=store)
    for other in (
        replace(store, model="b" * 64),
        replace(store, preprocess=preprocess_preset("arcface", bgr=True)),
        replace(store, preprocess=preprocess_preset("raw")),
        replace(store, precision="bfloat16"),
    ):
        network.seen = 0
        evaluate(network, PAIRS, store=other)
        assert network.seen == 40
    network.seen = 0
    swapped = replace(PAIRS, images=(PAIRS.images[1], PAIRS.images[0], *PAIRS.images[2:]))
    evaluate(network, swapped, store=store)
    assert network.seen == 40
    # The truths of the pairs do not matter.
    network.seen = 0
    evaluate(network, replace(PAIRS, issame=~ISSAME), store=store)
    assert network.seen == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_reported_and_replaced(
    store: EmbeddingCache, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    network = Counting()
    first = evaluate(network, PAIRS, store=store)
    (path,) = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    damaged = {"flipped": bytes(content), "cut": bytes(content[:-100]), "empty": b""}[damage]
    path.write_bytes(damaged)
    again = evaluate(network, PAIRS, store=store)
    assert network.seen == 80
    assert f"{path}: damaged or unreadable (" in capsys.readouterr().err
    assert again.to_builtins() == first.to_builtins()
    evaluate(network, PAIRS, store=store)
    assert network.seen == 80


def test_a_failing_network_leaves_nothing(store: EmbeddingCache) -> None:
    def embed(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        evaluate(embed, PAIRS, store=store)
    assert not store.folder.exists()


def test_saved_embeddings_are_garbage_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_CACHE_DIR", str(tmp_path))
    store = EmbeddingCache(default_embeddings(), "a" * 64, ARCFACE, "float32")
    evaluate(grid_embed, PAIRS, store=store)
    (path,) = (tmp_path / "embeddings").iterdir()
    (path.parent / "mine.safetensors").touch()
    (found,) = collect(older_than=1)
    assert (found.path, found.removed) == (path, False)
    (found,) = collect()
    assert (found.path, found.removed) == (path, True)
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.safetensors"]


def test_the_landmarks_are_in_the_key(tmp_path: Path, store: EmbeddingCache) -> None:
    draw_faces(tmp_path / "drawn", identities=range(2), images_each=1, seed=0, workers=1)
    lists = {"templates": (0, 1), "media": (0, 1), "scores": (1, 1)}
    faces = sorted((tmp_path / "drawn").rglob("*.jpg"))
    write_ijb(tmp_path / "set", faces, pairs=((0, 1, 0), (0, 0, 1)), **lists)  # type: ignore[arg-type]
    network = Counting()
    evaluate(network, load_ijb(tmp_path / "set"), store=store)
    evaluate(network, load_ijb(tmp_path / "set"), store=store)
    assert network.seen == 4
    points = tmp_path / "set/meta/ijbc_name_5pts_score.txt"
    first, second = points.read_text().splitlines()
    words = first.split()
    # The detector's score only weighs embeddings; a landmark changes them.
    points.write_text("\n".join([" ".join([*words[:-1], "0.5"]), second]) + "\n")
    evaluate(network, load_ijb(tmp_path / "set"), store=store)
    assert network.seen == 4
    words[1] = str(float(words[1]) + 1)
    points.write_text("\n".join([" ".join(words), second]) + "\n")
    evaluate(network, load_ijb(tmp_path / "set"), store=store)
    assert network.seen == 8
