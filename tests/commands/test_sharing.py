"""Commands that share caches: push, pull, info and stats at an address, and mistakes."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from gkd.storage.cache.reader import Cache
from gkd.storage.cache.verify import verify
from gkd.trainer.backbones import build_backbone
from tests.caches import make_cache
from tests.commands.running import fails, works
from tests.pipeline.faces import write_folder
from tests.s3 import Bucket, S3Server, new_bucket


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("made") / "cache.gkd", skipped={41: "no image"})


@pytest.fixture(scope="module")
def bucket(cache: Cache, s3: S3Server) -> Iterator[Bucket]:
    """A bucket that holds ``cache``."""
    with new_bucket(s3) as bucket:
        works("targets", "push", cache.path, bucket.address)
        yield bucket


def test_a_cache_is_pushed_and_pulled(bucket: Bucket, cache: Cache, tmp_path: Path) -> None:
    again = json.loads(
        works("targets", "push", cache.path, bucket.address, "--read-back", "--json")
    )
    assert (again["id"], again["copied_files"]) == (cache.id, 0)
    output = works("targets", "pull", bucket.address, tmp_path / "back.gkd")
    assert cache.id in output
    assert Cache.open(tmp_path / "back.gkd").id == cache.id


def test_parts_are_pulled(bucket: Bucket, tmp_path: Path) -> None:
    part = ("targets", "pull", bucket.address, tmp_path / "part.gkd", "--json")
    assert not json.loads(works(*part, "--shards", "0-1,2", "--views", "original"))["whole"]
    info = json.loads(works("targets", "info", tmp_path / "part.gkd", "--json"))
    assert (info["id"], info["committed_shards"]) == ("not finished", 3)
    assert info["views"] == ["original"]
    assert json.loads(works(*part, "--views", "original"))["whole"]
    assert "expected one or more of 0 to 2, got 3" in fails(*part, "--shards", "1-3")
    assert "expected one or more of original, flipped" in fails(*part, "--views", "sideways")
    for wrong in ("1-", "x", "1,,2", "-3"):
        assert "expected shards such as 0-9,12" in fails(*part, "--shards", wrong, code=2)


def test_a_cache_at_an_address_is_described(bucket: Bucket, cache: Cache, tmp_path: Path) -> None:
    remote = json.loads(works("targets", "info", bucket.address, "--json"))
    local = json.loads(works("targets", "info", cache.path, "--json"))
    assert remote.pop("address") == bucket.address
    assert cache.manifest is not None
    assert remote.pop("bytes") == cache.manifest.bytes
    del local["path"], local["committed_shards"]
    assert remote == local
    assert remote["skipped"] == {"42": "no image"}

    figures = json.loads(works("targets", "stats", bucket.address, "--json"))
    assert [view["view"] for view in figures["views"]] == ["original", "flipped"]
    output = works("targets", "stats", bucket.address)
    assert "mean size" in output
    assert "Quantiles and masses need the arrays: `gkd targets pull`" in output
    plot = ("--plot", tmp_path / "plot.png")
    assert "a plot needs the arrays" in fails("targets", "stats", bucket.address, *plot)


def test_options_of_the_address_are_passed_on(
    bucket: Bucket, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(bucket.server.environment)
    names = {
        "key": "AWS_ACCESS_KEY_ID",
        "secret": "AWS_SECRET_ACCESS_KEY",
        "endpoint_url": "AWS_ENDPOINT_URL",
    }
    options = [f"{option}={given[name]}" for option, name in names.items()]
    options.append('client_kwargs={"region_name": "us-east-1"}')
    for name in names.values():
        monkeypatch.delenv(name)
    arguments = [word for option in options for word in ("--storage-option", option)]
    assert cache.id in works("targets", "info", bucket.address, *arguments)
    arguments[3] = "secret=anothersecretkey"
    assert "access refused" in fails("targets", "info", bucket.address, *arguments)
    assert "expected KEY=VALUE" in fails(
        "targets", "info", bucket.address, "--storage-option", "key", code=2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pull", "s3://faces/nothing", "out"), "got no zarr.json; check bucket"),
        (("info", "s3://voices/cache.gkd"), "got no zarr.json; check bucket"),
        (("info", "ftps3://faces"), "Protocol not known"),
        (("push", "nowhere", "s3://faces/cache.gkd"), "nowhere: expected a cache of targets"),
        (("pull", "nowhere", "out"), "nowhere: expected a target cache"),
    ],
)
def test_a_mistake_ends_in_one_message(
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    stderr = fails("targets", *arguments)
    assert stderr.startswith("Error: ")
    assert message in stderr
    assert not (tmp_path / "out").exists()


def test_a_cache_is_made_with_a_card(tmp_path: Path) -> None:
    write_folder(tmp_path / "faces", identities=3, images=2)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    make: tuple[object, ...] = ("cache-teacher", tmp_path / "faces", tmp_path / "faces.gkd")
    make += ("--teacher", tmp_path / "teacher.pt", "--centers", "class-mean", "--json")
    made = json.loads(works(*make, "--licence", "Research only", "--note", "Noise, no faces."))
    card = (tmp_path / "faces.gkd" / "README.md").read_text()
    assert card.startswith("# What `teacher` says of `faces`\n")
    assert "\nNoise, no faces.\n" in card
    assert "## Terms\n\nResearch only\n" in card
    assert verify(tmp_path / "faces.gkd").ok

    # A finished cache does not change.
    assert json.loads(works(*make, "--note", "Noise, no faces."))["cache_id"] == made["cache_id"]
    assert "README.md: the cache is finished and its id covers this card" in fails(
        *make, "--note", "Another note"
    )
    assert (tmp_path / "faces.gkd" / "README.md").read_text() == card


@pytest.mark.parametrize(
    "arguments",
    [
        ("targets", "push", "", "s3://faces/cache.gkd"),
        ("targets", "push", "faces.gkd", ""),
        ("targets", "pull", "", "faces.gkd"),
        ("targets", "pull", "s3://faces/cache.gkd", ""),
        ("targets", "info", ""),
        ("targets", "stats", ""),
        ("targets", "verify", ""),
        ("targets", "retarget", "", "out.gkd"),
        ("targets", "retarget", "faces.gkd", ""),
        ("targets", "merge", "", "a.gkd", "b.gkd"),
        ("targets", "merge", "out.gkd", "a.gkd", ""),
        ("cache-teacher", "", "out.gkd", "--teacher", "t.onnx", "--centers", "class-mean"),
        ("cache-teacher", "faces", "", "--teacher", "t.onnx", "--centers", "class-mean"),
        ("cache-teacher", "faces", "out.gkd", "--teacher", "", "--centers", "class-mean"),
        ("train-student", "", "faces.gkd", "run"),
        ("train-student", "faces", "", "run"),
        ("train-student", "faces", "faces.gkd", ""),
    ],
)
def test_an_empty_path_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    make_cache(tmp_path / "here", num_samples=3)
    # An empty path must not mean the current folder, which is a cache here.
    monkeypatch.chdir(tmp_path / "here")
    stderr = fails(*arguments, code=2)
    assert "expected a path, got an empty one" in stderr
    assert verify(tmp_path / "here").ok


def test_an_address_without_a_bucket_is_a_mistake(cache: Cache, tmp_path: Path) -> None:
    for address in ("s3://", "s3:///", "file://"):
        assert f"{address}: names no bucket" in fails("targets", "push", cache.path, address)
        assert f"{address}: names no bucket" in fails("targets", "pull", address, tmp_path / "c")
        assert f"{address}: names no bucket" in fails("targets", "info", address)


def test_other_files_in_a_bucket_are_left_alone(bucket: Bucket, cache: Cache) -> None:
    files = fsspec.filesystem("s3")
    files.pipe_file(f"{bucket.name}/mine/README.md", b"mine")
    message = fails("targets", "push", cache.path, f"s3://{bucket.name}/mine")
    assert f"s3://{bucket.name}/mine: expected an empty folder" in message
    assert "got README.md;" in message
    files.invalidate_cache()
    assert files.find(f"{bucket.name}/mine") == [f"{bucket.name}/mine/README.md"]
    assert files.cat_file(f"{bucket.name}/mine/README.md") == b"mine"
    works("targets", "push", cache.path, f"s3://{bucket.name}/mine/cache.gkd")
