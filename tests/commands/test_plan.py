"""``gkd plan`` as a user types it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gkd.commands.builders import cache_settings
from gkd.commands.cache_teacher import cache_teacher
from gkd.demo.synthetic import draw_faces
from gkd.pipeline.settings import DRAWS, CacheSettings, PartitionSettings
from gkd.trainer.backbones import build_backbone
from tests.commands.running import fails, gkd

GRID = ("--group-temperatures", "1,4", "--thresholds", "0.93")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of six people, a network, and centres for it."""
    home = tmp_path_factory.mktemp("home")
    draw_faces(home / "faces", identities=range(6), images_each=3, seed=0, workers=1)
    torch.manual_seed(0)
    network = build_backbone("iresnet18", embedding_dim=16, width=0.125, input_size=28)
    torch.save(network.state_dict(), home / "teacher.pt")
    np.save(home / "centers.npy", np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32))
    return home


def test_a_plan_is_a_table_a_plot_and_json(home: Path, tmp_path: Path) -> None:
    plan = ("plan", home / "faces", "--teacher", home / "teacher.pt", *GRID)
    shown = gkd(*plan, "--centers", "class-mean", "--plot", tmp_path / "grid.png")
    assert shown.exit_code == 0, shown.output
    assert "18 images of 6 identities" in shown.stdout
    assert "with these options (group temperature 1, threshold 0.93)" in shown.stdout
    assert "64 draws per image and view" in shown.stdout
    elsewhere = gkd(*plan, "--centers", home / "centers.npy", "--threshold", "0.5")
    assert "with these options" not in elsewhere.stdout, "the plan has no such threshold"
    table, basis, _ = shown.stdout.partition("class means of all 18 images")
    assert basis
    assert max(map(len, table.splitlines())) <= 80, "fits any terminal"
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert not list(home.glob("*.centers.npy")), "nothing is kept"

    centers = ("--centers", home / "centers.npy", "--draws", "4", "--samples", "10")
    result = json.loads(gkd(*plan, *centers, "--json").stdout)
    assert (result["sampled"], result["embedded"], result["images"]) == (10, 10, 18)
    grid = [(point["group_temperature"], point["threshold"]) for point in result["points"]]
    assert grid == [(1.0, 0.93), (4.0, 0.93)]
    known = ("--centers", home / "centers.npy", "--draws", "0")
    plain = json.loads(gkd(*plan, *known, "--json").stdout)
    # Four classes and their probabilities take six bytes each, in two views, packed.
    for drawn, without in zip(result["points"], plain["points"], strict=True):
        assert drawn["bytes"] > without["bytes"]
    assert result["points"][0]["hours"]["1"] == pytest.approx(result["points"][0]["seconds"] / 3600)


def test_mistakes_are_one_message(home: Path, tmp_path: Path) -> None:
    plan = ("plan", home / "faces", "--teacher", home / "teacher.pt", "--centers")
    assert "either class-mean alone or files" in fails(*plan, "class-mean", "--centers", "a.npy")
    assert "--samples: expected 1 or more" in fails(*plan, "class-mean", "--samples", "0")
    assert "--thresholds: expected" in fails(*plan, "class-mean", "--thresholds", "0.9,0.9")
    assert "expected numbers such as" in fails(*plan, "class-mean", "--thresholds", "x", code=2)
    missing = tmp_path / "none" / "grid.png"
    assert f"there is no folder {missing.parent}" in fails(*plan, "class-mean", "--plot", missing)


def test_the_command_line_and_the_code_have_one_set_of_defaults() -> None:
    words = ["faces", "out.gkd", "--teacher", "t.onnx", "--centers", "class-mean"]
    with cache_teacher.make_context("cache-teacher", words) as context:
        asked = cache_settings(context.params)
    partition = PartitionSettings(draws=DRAWS)
    assert asked == CacheSettings(partition=partition, workers=asked.workers)
