"""Backbones: sizes, files of every kind, messages."""

import errno
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gkd.storage.errors import ConfigError
from gkd.storage.util.torch_files import read_torch_file
from gkd.trainer.backbones import build_backbone, load_backbone

EXPECTED = "expected a file that torch.save wrote, of tensors only"


def test_mobilefacenet_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build_backbone("mobilefacenet").parameters())
    assert round(count / 1e6, 2) == 2.06


@pytest.mark.parametrize("input_size", [112, 56, 28])
@pytest.mark.parametrize(("name", "width"), [("iresnet18", 0.125), ("mobilefacenet", 0.25)])
def test_every_input_size_accepts_112_pixel_images(
    name: str, width: float, input_size: int
) -> None:
    backbone = build_backbone(name, width=width, input_size=input_size, embedding_dim=24).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(2, 3, 112, 112)).shape == (2, 24)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_embedding_scale_is_frozen(name: str) -> None:
    backbone = build_backbone(name, width=0.25, embedding_dim=8)
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    assert [p.tolist() for p in frozen] == [[1.0] * 8]


def randomised(name: str, **options: float) -> nn.Module:
    backbone = build_backbone(name, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for key, value in backbone.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) * 0.1 + ("running_var" in key))
    return backbone.eval()


def save_nested(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


@pytest.mark.parametrize(
    ("name", "options", "how", "asked"),
    [
        ("iresnet18", {"width": 0.25, "input_size": 56, "embedding_dim": 64}, "bare", "auto"),
        ("iresnet18", {"width": 0.125, "input_size": 28}, "nested", "given"),
        ("mobilefacenet", {"width": 1.0, "embedding_dim": 128}, "safetensors", "auto"),
        ("mobilefacenet", {"width": 0.5, "input_size": 28}, "nested", "auto"),
    ],
)
def test_saved_weights_of_any_size_load(
    name: str, options: dict[str, float], how: str, asked: str, tmp_path: Path
) -> None:
    backbone = randomised(name, **options)
    path = tmp_path / ("weights.safetensors" if how == "safetensors" else "weights.pth")
    match how:
        case "bare":
            torch.save(backbone.state_dict(), path)
        case "nested":
            save_nested(backbone.state_dict(), path)
        case "safetensors":
            save_file(backbone.state_dict(), path)
    loaded = load_backbone("auto" if asked == "auto" else name, path)
    assert loaded.name == name
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), backbone(images), rtol=0, atol=0)


def test_missing_batch_counters_are_accepted(tmp_path: Path) -> None:
    state = build_backbone("mobilefacenet", width=0.25).state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.pt")
    load_backbone("mobilefacenet", tmp_path / "w.pt")


def test_message_names_every_key_that_does_not_fit(tmp_path: Path) -> None:
    state = build_backbone("iresnet18", width=0.25).state_dict()
    del state["bn2.bias"]
    state["head.kernel"] = torch.zeros(1)
    state["layer1.0.prelu.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as error:
        load_backbone("iresnet18", tmp_path / "w.pt")
    assert "w.pt: its keys do not fit iresnet18" in str(error.value)
    assert "missing: bn2.bias" in str(error.value)
    assert "unexpected: head.kernel" in str(error.value)
    assert "layer1.0.prelu.weight (expected [16], got [3])" in str(error.value)


def test_message_names_what_the_file_looks_like(tmp_path: Path) -> None:
    torch.save(build_backbone("iresnet34", width=0.25).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"do not fit iresnet18.*looks like iresnet34"):
        load_backbone("iresnet18", tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"not mobilefacenet: .* no such key; .* iresnet34"):
        load_backbone("mobilefacenet", tmp_path / "w.pt")


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    torch.save({"input_layer.0.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(
        ConfigError, match=r"match no backbone of gkd .*begin: input_layer\.0\.weight"
    ):
        load_backbone("auto", tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="matches no backbone of gkd"):
        load_backbone("iresnet18", tmp_path / "w.pt")


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Payload()}, "w.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("w.pt", "plain.pt"):
        with pytest.raises(ConfigError, match="none that would run code") as error:
            load_backbone("auto", Path(name))
        # torch's own advice is to run the code.
        assert "weights_only" not in str(error.value)
    assert not Path("ran").exists()


def test_a_refused_global_is_named(tmp_path: Path) -> None:
    torch.save(build_backbone("iresnet18", width=1 / 8, embedding_dim=8), tmp_path / "pickled.pt")
    with pytest.raises(ConfigError, match=r"one that names gkd\.trainer.*\.IResNet; .*state_dict"):
        load_backbone("auto", tmp_path / "pickled.pt")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_weights_are_named(share: float, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = build_backbone("iresnet18", width=1 / 8, embedding_dim=8).state_dict()
    torch.save(state, path)
    size = int(path.stat().st_size * share)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError) as error:
        load_backbone("auto", path)
    assert f"w.pt: cannot be read as weights: {EXPECTED}" in str(error.value)
    assert f"got one that is cut off after {size:,} bytes; get it again" in str(error.value)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_bit_is_found_if_there_are_checksums(checksums: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "w.pt", torch.arange(7.0, 1007.0)
    state = build_backbone("iresnet18", width=1 / 8, embedding_dim=8).state_dict()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save({"epoch": 3, "state_dict": state, "mark": mark}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    load_backbone("iresnet18", path)
    content = bytearray(path.read_bytes())
    content[content.index(mark.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(content)
    if checksums:
        message = (
            r"w\.pt: its bytes are not .* checksum of \w+/data/\d+ does not match; get it again"
        )
        with pytest.raises(ConfigError, match=message):
            load_backbone("iresnet18", path)
    else:
        load_backbone("iresnet18", path)


def test_another_archive_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    with pytest.raises(ConfigError, match="got another zip archive, or a damaged one"):
        load_backbone("auto", tmp_path / "w.pt")


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError):
        read_torch_file(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"not weights at all"])
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"{name}: (cannot be read as|not a complete|expected a safe)"
    ):
        load_backbone("auto", tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2), "expected a state dict of tensors, got Tensor"),
        ({"epoch": 3}, "got int at key 'epoch'"),
    ],
)
def test_files_of_something_else_are_named(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=message):
        load_backbone("auto", tmp_path / "w.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.pt: expected a weights file"):
        load_backbone("auto", tmp_path / "gone.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "iresnet19"}, r"got 'iresnet19'; did you mean iresnet18\?"),
        ({"name": "iresnet18", "width": 0.3}, "64 channels times 0.3 is 19.2"),
        ({"name": "iresnet18", "width": 0.0}, "expected a whole number"),
        ({"name": "ir_18", "width": 0.0625}, "64 .* is 4, .* at least 8; take a multiple of 0.125"),
        ({"name": "mobilefacenet", "input_size": 96}, "expected one of 112, 56, 28, got 96"),
    ],
)
def test_impossible_backbones_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(**options)  # type: ignore[arg-type]
