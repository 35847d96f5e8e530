"""Class centres in the checkpoints of each training code, with its file names and keys."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import save_file

from gkd.pipeline.centers.files import METADATA, read_center_files, read_npy
from gkd.pipeline.centers.load import describe_centers, load_centers, open_centers
from gkd.storage.errors import ConfigError, SpecMismatchError
from gkd.storage.records.open import open_records
from tests.pipeline.faces import EMBEDDING_DIM, PixelEmbedder, write_folder

C, D = 27, 8
RAW = np.random.default_rng(0).normal(size=(C, D)).astype(np.float32) * 3
UNIT = RAW / np.linalg.norm(RAW.astype(np.float64), axis=1, keepdims=True)


def tensor(array: npt.NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def shards(raw: npt.NDArray[np.float32], ranks: int) -> list[npt.NDArray[np.float32]]:
    """Parts of C // W + (r < C % W) classes, as arcface_torch and TFace split them."""
    sizes = [len(raw) // ranks + (rank < len(raw) % ranks) for rank in range(ranks)]
    return np.split(raw, np.cumsum(sizes)[:-1])


def padded(raw: npt.NDArray[np.float32], ranks: int) -> list[npt.NDArray[np.float32]]:
    """Parts of equal size, as CVLface splits them: the last is padded with noise."""
    extra = -len(raw) % ranks
    noise = np.random.default_rng(9).normal(size=(extra, raw.shape[1])).astype(np.float32)
    return np.split(np.concatenate([raw, noise]), ranks)


def network(dim: int = D) -> dict[str, torch.Tensor]:
    """Other tensors of a checkpoint, among them matrices with a side of length D."""
    return {
        "conv1.weight": torch.ones(4, 3, 3, 3),
        "fc.weight": torch.ones(dim, 40),
        "other.weight": torch.ones(40, dim),
    }


def momentum(part: npt.NDArray[np.float32]) -> dict[str, Any]:
    state = {0: {"momentum_buffer": torch.ones(4, 3)}, 1: {"momentum_buffer": tensor(part) * 0 + 1}}
    return {"state": state, "param_groups": [{"lr": 0.02, "params": [0, 1]}]}


def checkpoint_gpu(part: npt.NDArray[np.float32]) -> Any:
    return {
        "epoch": 20,
        "global_step": 1000,
        "state_dict_backbone": {f"module.{k}": v for k, v in network(part.shape[1]).items()},
        "state_optimizer": momentum(part),
        "state_lr_scheduler": {"base_lrs": [0.1], "last_epoch": 1000},
        "state_dict_softmax_fc": {"weight": tensor(part)},
    }


def adaface(raw: npt.NDArray[np.float32]) -> Any:
    """A whole Lightning checkpoint."""
    head = {
        "head.kernel": tensor(raw.T),
        "head.t": torch.zeros(1),
        "head.batch_mean": torch.ones(1),
    }
    inside = {f"model.{key}": value for key, value in network(raw.shape[1]).items()}
    return {
        "epoch": 25,
        "state_dict": inside | head,
        "optimizer_states": [momentum(raw.T)],
        "hyper_parameters": {"args": argparse.Namespace(arch="ir_101")},
    }


def facex_zoo(raw: npt.NDArray[np.float32]) -> Any:
    inside = {f"backbone.{key}": value for key, value in network(raw.shape[1]).items()}
    return {"state_dict": inside | {"head.weight": tensor(raw.T)}, "epoch": 17, "batch_id": 0}


Kind = tuple[str, Callable[..., Any], int, bool, str]
# File name of a part, its content, number of parts, whether stored as [D, C], source.
KINDS: dict[str, Kind] = {
    "now": ("checkpoint_gpu_{}.pt", checkpoint_gpu, 12, False, "arcface_torch"),
    "mid": ("softmax_fc_gpu_{}.pt", lambda p: {"weight": tensor(p)}, 12, False, "arcface_torch"),
    "2021": ("rank_{}_softmax_weight.pt", tensor, 12, False, "arcface_torch"),
    "cvlface": (
        "classifier_rank{}.pt",
        lambda p: {"partial_fc.weight": tensor(p), "partial_fc.batch_mean": torch.ones(1)},
        *(12, False, "CVLface"),
    ),
    "tface": (
        "HEAD_Epoch_18_Split_{}_checkpoint.pth",
        lambda p: {"MS1MV2": {"weight": tensor(p.T)}},
        *(12, True, "TFace"),
    ),
    "adaface": ("last.ckpt", adaface, 1, True, "AdaFace"),
    "adadistill": ("295672header.pth", lambda r: {"kernel": tensor(r.T)}, 1, True, "AdaDistill"),
    "facex": ("Epoch_17.pt", facex_zoo, 1, True, "FaceX-Zoo"),
    "evolve": (
        "Head_ArcFace_Epoch_120_Batch_1_checkpoint.pth",
        lambda r: {"weight": tensor(r)},
        *(1, False, "face.evoLVe"),
    ),
}


def write(folder: Path, kind: str, raw: npt.NDArray[np.float32] = RAW) -> list[Path]:
    name, content, ranks, _, _ = KINDS[kind]
    folder.mkdir(exist_ok=True)
    parts = padded(raw, ranks) if kind == "cvlface" else shards(raw, ranks)
    paths = [folder / name.format(rank) for rank in range(ranks)]
    for path, part in zip(paths, parts, strict=True):
        torch.save(content(part), path)
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_centres_of_every_source_are_found_and_joined_by_rank(tmp_path: Path, kind: str) -> None:
    paths = write(tmp_path, kind)
    for order in (paths, paths[::-1], sorted(paths)):
        np.testing.assert_allclose(load_centers(order, C, D), UNIT, atol=1e-6)
    files = read_center_files(paths[::-1], D)
    assert [file.path for file in files] == paths
    assert {(file.layout.source, file.transposed) for file in files} == {
        (KINDS[kind][4], KINDS[kind][3])
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_decides_the_orientation_of_a_square_matrix(tmp_path: Path, kind: str) -> None:
    """With C = D the shape does not show the orientation."""
    name, content, _, _, _ = KINDS[kind]
    raw = RAW[:D]
    path = tmp_path / name.format(0)
    torch.save(content(raw), path)
    np.testing.assert_allclose(load_centers(path, D, D), UNIT[:D], atol=1e-6)


def test_a_folder_or_a_pattern_gives_all_parts(tmp_path: Path) -> None:
    write(tmp_path / "run", "now")
    (tmp_path / "run/training.log").write_text("done")
    torch.save(network(), tmp_path / "run/model.pt")
    np.testing.assert_allclose(load_centers(tmp_path / "run", C, D), UNIT, atol=1e-6)
    pattern = tmp_path / "run/checkpoint_gpu_*.pt"
    np.testing.assert_allclose(load_centers(pattern, C, D), UNIT, atol=1e-6)
    with pytest.raises(ConfigError, match="expected a folder of parts of class centres, such as"):
        load_centers(tmp_path, C, D)
    with pytest.raises(ConfigError, match="no file name matches"):
        load_centers(tmp_path / "run/softmax_*.pt", C, D)


def test_padding_is_dropped_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, "cvlface")
    load_centers(paths, C, D)
    logged = capsys.readouterr().err
    assert "classifier_rank11.pt: dropped the last 9 of 36 centres: CVLface pads them" in logged
    with pytest.raises(SpecMismatchError, match=r"36 centres, .* 24 identities .*padded"):
        load_centers(paths, 24, D)  # a surplus of as many rows as ranks cannot be padding
    others = write(tmp_path / "mid", "mid")
    with pytest.raises(SpecMismatchError, match=r"27 centres, .* 26 identities"):
        load_centers(others, 26, D)  # arcface_torch does not pad


def test_published_shards_with_another_number_of_classes_are_refused(tmp_path: Path) -> None:
    raw = np.ones((91_180, 2), np.float32)
    paths = write(tmp_path, "mid", raw)
    message = r"91,180 centres, but the records have 93,431 identities .*published MS1MV3 shards"
    with pytest.raises(SpecMismatchError, match=message):
        load_centers(paths, 93_431, 2)


@pytest.mark.parametrize("kind", ["now", "mid", "2021", "cvlface", "tface"])
def test_missing_and_repeated_parts_are_named(tmp_path: Path, kind: str) -> None:
    paths = write(tmp_path / "a", kind)
    with pytest.raises(
        ConfigError, match=r"got 10 of 12 or more: rank 2, 7 is missing; give all parts"
    ):
        load_centers([p for i, p in enumerate(paths) if i not in (2, 7)], C, D)
    twin = write(tmp_path / "b", kind)[3]
    with pytest.raises(ConfigError, match=r"got several of rank 3; give all parts"):
        load_centers([*paths, twin], C, D)
    # Only the number of classes shows that the last parts are missing.
    with pytest.raises(SpecMismatchError, match="a shard of another rank may be missing"):
        load_centers(paths[:-4], C, D)


def test_parts_of_several_checkpoints_are_not_joined(tmp_path: Path) -> None:
    mixed = [*write(tmp_path, "tface")[:6], tmp_path / "HEAD_Epoch_17_Split_6_checkpoint.pth"]
    message = r"got those of 2 checkpoints: HEAD_Epoch_17_Split_\*_check.*, HEAD_Epoch_18_Split_\*_"
    with pytest.raises(ConfigError, match=message):
        load_centers(mixed, C, D)
    np.save(tmp_path / "more.npy", RAW)
    with pytest.raises(ConfigError, match=r"got more\.npy, which has no rank in its name"):
        load_centers([*mixed[:6], tmp_path / "more.npy"], C, D)


def without(content: Any, dotted: str) -> Any:
    key, _, rest = dotted.partition(".")
    if key in content and rest:
        return {**content, key: without(content[key], rest)}
    return {k: v for k, v in content.items() if k != dotted}


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        (
            "now",
            "state_dict_softmax_fc.weight",
            r"at state_dict_softmax_fc\.weight, where arcface_torch stores them, got 0 matrices",
        ),
        ("mid", "weight", r"expected class centres at weight, where arcface_torch .*no array"),
        (
            "cvlface",
            "partial_fc.weight",
            r"exactly one matrix .*got 0 such matrices: partial_fc.batch_mean \[1\]",
        ),
        ("tface", "MS1MV2.weight", r"where TFace stores them, got 0 matrices there"),
        (
            "adaface",
            "state_dict.head.kernel",
            r"expected class centres under a key of .*AdaFace, .*got a network: ",
        ),
        (
            "facex",
            "state_dict.head.weight",
            r"expected class centres under a key of .*AdaFace, .*got a network: ",
        ),
        ("adadistill", "kernel", r"exactly one matrix .*got 0 such matrices: no array"),
        ("evolve", "weight", r"exactly one matrix .*got 0 such matrices: no array"),
    ],
)
def test_a_file_without_its_key_is_refused(
    tmp_path: Path, kind: str, key: str, message: str
) -> None:
    name, content, _, _, _ = KINDS[kind]
    path = tmp_path / name.format(0)
    torch.save(without(content(RAW), key), path)
    with pytest.raises(ConfigError, match=message):
        load_centers(path, C, D)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("kind", KINDS)
def test_centres_of_another_width_and_foreign_code_are_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, _, _, _ = KINDS[kind]
    path = tmp_path / name.format(0)
    torch.save(content(RAW), path)
    message = r"expected class centres \[C, 10\] .* length 10; these are the centres of another"
    with pytest.raises(ConfigError, match=message):
        load_centers(path, C, 10)
    torch.save({"extra": Payload(), "content": content(RAW)}, path)
    with pytest.raises(ConfigError, match=r"none that would run code, got one that names .*alone"):
        load_centers(path, C, D)
    assert not Path("ran").exists()


def test_other_wrong_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": tensor(RAW)}, tmp_path / "rank_0_softmax_weight.pt")
    with pytest.raises(ConfigError, match="expected class centres at the top level, where arcf"):
        load_centers(tmp_path / "rank_0_softmax_weight.pt", C, D)
    torch.save(tensor(RAW), tmp_path / "rank_0_softmax_weight_mom.pt")
    with pytest.raises(ConfigError, match=r"momentum, .* they are in rank_0_softmax_weight\.pt be"):
        load_centers(tmp_path / "rank_0_softmax_weight_mom.pt", C, D)
    heads = {"MS1M": {"weight": tensor(RAW.T)}, "Glint": {"weight": tensor(RAW.T)}}
    torch.save(heads, tmp_path / "HEAD_Epoch_18_Split_0_checkpoint.pth")
    with pytest.raises(ConfigError, match="where TFace stores them, got 2 matrices there"):
        load_centers(tmp_path / "HEAD_Epoch_18_Split_0_checkpoint.pth", C, D)
    save_file({"centers": RAW}, tmp_path / "c.safetensors", {METADATA: "{}"})
    with pytest.raises(ConfigError, match="expected metadata as `gkd centers build` writes it"):
        load_centers(tmp_path / "c.safetensors", C, D)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_described_as_stored(tmp_path: Path, kind: str) -> None:
    info = describe_centers(read_center_files(write(tmp_path, kind)), None)
    lengths = np.linalg.norm(RAW, axis=1)
    assert (info.kind, info.source) == ("file", KINDS[kind][4])
    assert info.orientation == ("D x C" if KINDS[kind][3] else "C x D")
    assert info.embedding_dim == D
    if kind != "cvlface":
        assert info.centers == C
        expected = lengths.min(), np.median(lengths), lengths.max()
        np.testing.assert_allclose((info.shortest, info.median, info.longest), expected, rtol=1e-6)


def test_descriptions_are_checked_against_records(tmp_path: Path) -> None:
    records = open_records(write_folder(tmp_path / "set", identities=7, images=1))
    raw = np.random.default_rng(1).normal(size=(7, EMBEDDING_DIM)).astype(np.float32)
    paths = write(tmp_path, "cvlface", raw)
    info = describe_centers(read_center_files(paths), records)
    assert (info.centers, info.padding) == (12, 5)
    np.save(tmp_path / "c.npy", raw[:6].T)
    with pytest.raises(SpecMismatchError, match="6 centres, but the records have 7 identities"):
        describe_centers(read_center_files([tmp_path / "c.npy"], EMBEDDING_DIM), records)
    np.save(tmp_path / "d.npy", np.ones((20, 16), np.float32))
    np.save(tmp_path / "e.npy", np.ones((20, 5), np.float32))
    files: Sequence[Path] = [tmp_path / "d.npy", tmp_path / "e.npy"]
    with pytest.raises(ConfigError, match="got lengths of 5, 16; join parts of one checkpoint"):
        describe_centers(read_center_files(files), None)
    given = open_centers(paths, records, PixelEmbedder())
    assert given.kind == "file"
    assert given.name.startswith("classifier_rank0.pt classifier_rank1.pt")


def test_unusable_centres_are_counted(tmp_path: Path) -> None:
    array = np.full((30, EMBEDDING_DIM), 0.5, np.float32)
    array[3], array[5, 2] = 0, np.nan
    np.save(tmp_path / "c.npy", array)
    info = describe_centers(read_center_files([tmp_path / "c.npy"]), None)
    assert (info.centers, info.unusable) == (30, 2)
    assert info.shortest == info.longest == pytest.approx(0.5 * EMBEDDING_DIM**0.5)
    np.save(tmp_path / "c.npy", np.zeros_like(array))
    with pytest.raises(ConfigError, match="all of 30 centres are zero or not finite"):
        describe_centers(read_center_files([tmp_path / "c.npy"]), None)


def test_big_endian_centers_are_converted(tmp_path: Path) -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    np.save(tmp_path / "c.npy", array)
    read = read_npy(tmp_path / "c.npy")
    assert read.dtype == np.float32
    assert read.tolist() == array.tolist()


@pytest.mark.parametrize("rows", [10**7, 10**12, 2**63])
def test_a_header_that_claims_more_than_its_file_is_refused(tmp_path: Path, rows: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 512)}
    with (tmp_path / "c.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ConfigError, match=r"c\.npy: expected a \.npy array of numbers"):
        read_npy(tmp_path / "c.npy")


def test_extended_floats_are_refused_with_what_to_write(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.ones((3, 4), np.longdouble))
    with pytest.raises(ConfigError, match=r"at most 64 bits.*np\.float32"):
        read_npy(tmp_path / "c.npy")
