"""Built class centres: their values, and that interruptions do not change them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import torch
import torch.nn.functional as F

from gkd.pipeline.build_centers import BuildSummary, build_centers
from gkd.pipeline.centers import refine as module
from gkd.pipeline.centers.load import open_centers
from gkd.pipeline.centers.means import centers_path
from gkd.pipeline.centers.refine import measure, refine, refine_settings
from gkd.pipeline.embedding_store import work_path
from gkd.pipeline.run import cache_teacher
from gkd.storage.cache.card import card_text
from gkd.storage.cache.reader import Cache
from gkd.storage.cache.spec import CentersKind, preprocess_preset
from gkd.storage.cache.verify import verify
from gkd.storage.errors import ConfigError, CorruptRecordError, SpecMismatchError
from gkd.storage.records.open import open_records
from tests.pipeline.faces import SETTINGS, PixelEmbedder, make, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("faces") / "set", identities=9, images=4)


def build(folder: Path, out: Path, epochs: int = 0, seed: int = 0, **options: Any) -> BuildSummary:
    settings = refine_settings(epochs, seed) if epochs else None
    embedder = options.pop("embedder", PixelEmbedder())
    return build_centers(
        open_records(folder), out, embedder, settings=settings, batch_size=4, **options
    )


def array_of(path: Path) -> npt.NDArray[np.float32]:
    with safetensors.safe_open(path, framework="numpy") as file:
        array: npt.NDArray[np.float32] = file.get_tensor("centers")
        return array


def test_class_means_equal_those_of_a_cache(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path / "cache.gkd", class_mean=True)
    summary = build(folder, tmp_path / "means.safetensors")
    expected = np.load(centers_path(tmp_path / "cache.gkd"))
    np.testing.assert_array_equal(array_of(tmp_path / "means.safetensors"), expected)
    assert summary.sha256 == Cache.open(tmp_path / "cache.gkd").spec.centers.sha256
    assert (summary.kind, summary.centers, summary.images, summary.refined) == (
        "class-mean",
        9,
        36,
        None,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache.centers.npy",
        "cache.gkd",
        "means.safetensors",
    ]


@pytest.mark.parametrize(("epochs", "kind"), [(0, "class-mean"), (2, "refined")])
def test_a_cache_records_the_kind_of_its_centres(
    folder: Path, tmp_path: Path, epochs: int, kind: CentersKind
) -> None:
    out, records = tmp_path / "made.safetensors", open_records(folder)
    summary = build(folder, out, epochs)
    given = open_centers([out], records, PixelEmbedder())
    assert given.kind == summary.kind == kind
    cache_teacher(records, tmp_path / "cache.gkd", PixelEmbedder(), given, SETTINGS)
    spec = Cache.open(tmp_path / "cache.gkd").spec
    assert (spec.centers.kind, spec.centers.name) == (kind, "made.safetensors")
    assert spec.centers.sha256 == summary.sha256
    assert not verify(tmp_path / "cache.gkd").faults
    words = "refined by a margin head over frozen embeddings"
    assert (words in (tmp_path / "cache.gkd/README.md").read_text()) == (kind == "refined")
    assert (words in card_text(spec, [])) == (kind == "refined")


def test_centres_of_another_origin_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made.safetensors"
    build(folder, out)
    capsys.readouterr()
    other = PixelEmbedder()
    other.sha256, other.preprocess = "1" * 64, preprocess_preset("raw")
    with pytest.raises(SpecMismatchError) as caught:
        open_centers([out], open_records(folder, sort="plain"), other)
    for line in (
        f"teacher's sha256: expected {'0' * 64}, got {'1' * 64}",
        "preprocess.name: expected arcface, got raw",
        "label order: expected natural, got plain",
    ):
        assert line in str(caught.value)
    more = write_folder(tmp_path / "more", identities=10, images=4)
    with pytest.raises(SpecMismatchError, match="identities: expected 9, got 10"):
        open_centers([out], open_records(more), PixelEmbedder())
    assert not capsys.readouterr().err
    shutil.rmtree(more / "id9")
    (more / "id3/2.png").unlink()
    open_centers([out], open_records(more), PixelEmbedder())
    assert "made from 36 images of set, not from exactly these" in capsys.readouterr().err


class Interrupted(PixelEmbedder):
    """Raises KeyboardInterrupt after a number of images."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if self.images >= self.after:
            raise KeyboardInterrupt
        return super().__call__(images)


def test_an_interrupted_build_resumes_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkd.pipeline.build_centers.PART_SAMPLES", 8)
    reference, broken = tmp_path / "reference.safetensors", tmp_path / "broken.safetensors"
    expected = build(folder, reference, 2)
    with pytest.raises(KeyboardInterrupt):
        build(folder, broken, 2, embedder=Interrupted(40))
    assert not broken.exists()
    kept = sorted(path.name for path in work_path(broken).glob("*.npz"))
    assert kept == ["000000.npz", "000001.npz"]
    resuming = PixelEmbedder()
    summary = build(folder, broken, 2, embedder=resuming)
    assert resuming.images == 2 * (36 - 16)  # both views of the remaining images
    assert summary.sha256 == expected.sha256
    assert broken.read_bytes() == reference.read_bytes()
    other = PixelEmbedder()
    other.sha256 = "1" * 64
    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "b.safetensors", embedder=Interrupted(40))
    with pytest.raises(SpecMismatchError, match="keeps embeddings of another run"):
        build(folder, tmp_path / "b.safetensors", embedder=other)


def test_the_result_depends_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    digests = [
        build(folder, tmp_path / f"{i}.safetensors", 2, seed).sha256
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def problem(classes: int = 40, dim: int = 12) -> tuple[npt.NDArray[Any], ...]:
    """Embeddings of classes of different spread, their labels and class means."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(classes, dim))
    labels = rng.integers(0, classes, 600)
    embeddings = base[labels] + rng.normal(size=(600, dim)) * rng.uniform(0.2, 2, (600, 1))
    embeddings = embeddings.astype(np.float32)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = np.stack([unit[labels == c].sum(0) for c in range(classes)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return embeddings, labels, means.astype(np.float32)


def dense_refinement(
    centers: npt.NDArray[np.float32],
    embeddings: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    epochs: int,
) -> npt.NDArray[np.float64]:
    """The same by autograd in float64, with dense logits and the loss as defined."""
    settings = refine_settings(epochs)
    weight, done = torch.from_numpy(centers).double(), 0
    for epoch in range(epochs):
        rng = np.random.default_rng([settings.seed, epoch])
        assert rng.permutation(1).tolist() == [0]
        order = rng.permutation(len(labels))
        for at in range(0, len(order), settings.batch_size):
            rows = order[at : at + settings.batch_size]
            unit = F.normalize(torch.from_numpy(embeddings[rows]).double())
            own = torch.from_numpy(labels[rows])
            leaf = weight.clone().requires_grad_()
            cosines = unit @ F.normalize(leaf).T
            logits = settings.scale * (
                cosines - settings.margin * F.one_hot(own, len(weight)).double()
            )
            F.cross_entropy(logits, own, reduction="sum").backward()
            assert leaf.grad is not None
            rate = settings.learning_rate * (1 - done / (epochs * len(labels)))
            weight = F.normalize(weight - rate * leaf.grad / settings.scale)
            done += len(rows)
    return weight.numpy()


@pytest.fixture(params=[1 << 24, 256 * 7])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All classes in one chunk, and seven to a chunk."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", request.param)


@pytest.mark.usefixtures("chunk")
def test_refinement_matches_autograd() -> None:
    embeddings, labels, means = problem()
    got = refine(means, 1, lambda _: (embeddings, labels), refine_settings(3), images=600)
    expected = dense_refinement(means, embeddings, labels, 3)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    moved = float(np.abs(expected - means).max())
    assert moved > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * moved)


@pytest.mark.usefixtures("chunk")
def test_fit_matches_dense_logits_and_refinement_improves_it() -> None:
    embeddings, labels, means = problem()
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    refined = refine(means, 1, lambda _: (embeddings, labels), refine_settings(4), images=600)
    fits = []
    for centers in (means, refined):
        cosines = unit @ centers.astype(np.float64).T
        own = np.eye(len(means), dtype=bool)[labels]
        logits = 64 * (cosines - 0.4 * own)
        loss = np.log(np.exp(logits).sum(1)) - logits[own]
        nearest = np.where(own, -np.inf, cosines).max(1)
        expected = (cosines[own] > nearest).mean(), cosines[own].mean(), nearest.mean(), loss.mean()
        fit = measure(centers, embeddings, labels)
        measured = fit.accuracy, fit.own, fit.nearest, fit.loss
        np.testing.assert_allclose(measured, expected, rtol=1e-5)
        fits.append(fit)
    assert fits[1].loss < fits[0].loss - 1
    assert fits[1].accuracy > fits[0].accuracy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.npy", r"out\.npy: expected a file name with the suffix \.safetensors"),
        ("existing.safetensors", r"existing\.safetensors: exists already; choose another name"),
        ("no/out.safetensors", r"there is no folder .*no; create it"),
    ],
)
def test_unusable_output_paths_are_refused(
    folder: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "existing.safetensors").touch()
    with pytest.raises(ConfigError, match=message):
        build(folder, tmp_path / name)


def test_unreadable_images_are_skipped_on_request(tmp_path: Path) -> None:
    records = write_folder(tmp_path / "set", identities=3, images=3)
    (records / "id1/2.png").write_bytes(b"no image")
    with pytest.raises(CorruptRecordError, match="--skip-corrupt leaves them out"):
        build(records, tmp_path / "a.safetensors")
    summary = build(records, tmp_path / "a.safetensors", skip_corrupt=True)
    assert (summary.images, summary.skipped, summary.measured) == (8, 1, 8)
