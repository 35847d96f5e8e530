"""Class centres from files of every format, with the message of every refusal."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gkd.pipeline.centers.load import Centers, load_centers
from gkd.storage.errors import ConfigError, SpecMismatchError

C, D = 12, 8
RAW = np.random.default_rng(0).normal(size=(C, D)).astype(np.float32) * 3
UNIT = RAW / np.linalg.norm(RAW.astype(np.float64), axis=1, keepdims=True)


def save(path: Path, value: Any) -> Path:
    match path.suffix:
        case ".npy":
            np.save(path, value)
        case ".safetensors":
            save_file(value, path)
        case _:
            torch.save(value, path)
    return path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("c.npy", RAW),
        ("c.npy", RAW.astype(np.float64)),
        ("c.npy", np.asfortranarray(RAW)),
        ("c.npy", RAW.T),
        ("c.pt", torch.from_numpy(RAW)),
        ("c.pt", torch.from_numpy(RAW).requires_grad_()),
        ("c.pth", {"epoch": 3, "weight": torch.from_numpy(RAW), "bias": torch.zeros(C)}),
        ("c.pt", {"state_dict_softmax_fc": {"weight": torch.from_numpy(RAW)}, "lr": 0.1}),
        ("c.pt", {"kernel": torch.from_numpy(RAW.T.copy())}),
        ("c.safetensors", {"weight": torch.from_numpy(RAW)}),
    ],
)
def test_centres_are_found_and_normalised(tmp_path: Path, name: str, value: Any) -> None:
    centers = load_centers(save(tmp_path / name, value), C, D)
    assert centers.dtype == np.float32
    assert centers.flags.c_contiguous
    np.testing.assert_allclose(centers, UNIT, atol=1e-6)


def test_half_precision_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", torch.from_numpy(RAW).bfloat16())
    np.testing.assert_allclose(load_centers(path, C, D), UNIT, atol=1e-2)


def test_several_files_are_joined_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a.npy", RAW[:7]), save(tmp_path / "b.pt", torch.from_numpy(RAW[7:]))]
    np.testing.assert_allclose(load_centers(paths, C, D), UNIT, atol=1e-6)


def test_normalised_centres_keep_their_digest(tmp_path: Path) -> None:
    first = load_centers(save(tmp_path / "a.npy", RAW), C, D)
    again = load_centers(save(tmp_path / "b.npy", first), C, D)
    np.testing.assert_array_equal(first, again)
    assert Centers(first, "file", "a.npy").spec.sha256 == Centers(again, "file", "b").spec.sha256


def test_too_few_centres_are_refused_with_both_counts_and_the_reason(tmp_path: Path) -> None:
    parts = [np.ones((45_590, 2), np.float32)] * 2
    paths = [save(tmp_path / f"{i}.npy", part) for i, part in enumerate(parts)]
    message = (
        r"91,180 centres, but the records have 93,431 identities \(files of 45,590, 45,590\); "
        r"a shard of another rank may be missing.*--centers class-mean"
    )
    with pytest.raises(SpecMismatchError, match=message):
        load_centers(paths, 93_431, 2)


def test_too_many_centres_are_refused_with_padding_as_a_reason(tmp_path: Path) -> None:
    path = save(tmp_path / "c.npy", RAW)
    with pytest.raises(SpecMismatchError, match=r"12 centres, .* 10 identities; .*padded"):
        load_centers(path, 10, D)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.bin", b"x", r"c\.bin: expected class centres as \.npy, \.pt, .*, got '\.bin'"),
        ("c.npy", b"x", r"c\.npy: expected a \.npy array of numbers, got"),
        ("c.npy", np.arange(9), r"c\.npy: expected a \.npy array of floats, got int64"),
        ("c.npy", np.array([{}]), r"c\.npy: expected a \.npy array of numbers, got "),
        ("c.npy", RAW[:, :5], r"one matrix \[C, 8\], got 0 such matrices: an array \[12, 5\]"),
        (
            "c.pt",
            b"x",
            r"c\.pt: cannot be read as class centres: .*got 1 bytes starting 78; get it",
        ),
        (
            "c.pt",
            b"",
            r"c\.pt: cannot be read as class centres: .*got an empty file; .*or save the cent",
        ),
        (
            "c.pt",
            {"x": Path("p")},
            r"c\.pt: .*none that would run code, got one that names pathlib",
        ),
        (
            "c.pt",
            {"a": torch.ones(3, D), "b": torch.ones(D, 5)},
            r"exactly one matrix .*, got 2 such matrices: a \[3, 8\], b \[8, 5\]",
        ),
        ("c.pt", {"epoch": 3}, r"got 0 such matrices: no array"),
        ("c.safetensors", b"x", r"c\.safetensors: expected a safetensors file, got"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with pytest.raises(ConfigError, match=message):
        load_centers(path, C, D)


@pytest.mark.parametrize("share", [0.0, 0.005, 0.1, 0.5, 0.9999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_torch_file_is_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    path = tmp_path / "c.pt"
    torch.save(torch.ones(5000, D), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ConfigError, match=r"c\.pt: cannot be read as class centres: .*; get it again"
    ) as caught:
        load_centers(path, C, D)
    assert "weights_only" not in str(caught.value)
    assert "()" not in str(caught.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols_raise_no_warning(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "c.pt"
    torch.save(torch.from_numpy(RAW), path, pickle_protocol=protocol)
    with contextlib.suppress(ConfigError):  # a UserWarning is an error in tests
        load_centers(path, C, D)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no\.npy: expected a file of class centres, but there is no such"
    ):
        load_centers(tmp_path / "no.npy", C, D)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_centre_without_direction_is_refused(tmp_path: Path, value: float) -> None:
    broken = RAW.copy()
    broken[4] = value
    message = r"1 of 12 centres are zero or not finite, the first of class 4"
    with pytest.raises(ConfigError, match=message):
        load_centers(save(tmp_path / "c.npy", broken), C, D)
