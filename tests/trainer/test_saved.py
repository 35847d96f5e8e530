"""A checkpoint that anybody may have edited: refused by the field, or without effect."""

import copy
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gkd.storage.errors import ConfigError, GkdError
from gkd.trainer.checkpoint import load_student, read_checkpoint, write_checkpoint
from gkd.trainer.state import RunState
from tests.trainer.faces import load, small_config
from tests.trainer.runs import LAST, last_centers

Edit = Callable[[dict[str, Any]], object]
NUMBERS = torch.zeros(3)


@pytest.fixture(scope="module")
def resuming(faces: Path, unbroken: Path) -> Callable[[dict[str, Any]], None]:
    records, targets = load(faces)
    state = RunState(small_config(f'evaluation.sets=["{faces}/pairs.bin"]'), records, targets)
    return lambda content: state.restore(content, unbroken / LAST)


@pytest.fixture(scope="module")
def written(unbroken: Path) -> dict[str, Any]:
    return read_checkpoint(unbroken / LAST)


def test_what_was_written_is_resumed(
    resuming: Callable[[dict[str, Any]], None], written: dict[str, Any]
) -> None:
    resuming(written)


ODD: list[object] = [None, "3", -7, math.nan, math.inf, [], {"a": "b"}, 10**30, NUMBERS, True]
FIELDS = [
    *("config", "data", "model", "step", "accuracy", "best", "best_step", "evaluated", "skipped"),
    *("divergence", "window", "fit", "rng", "optimizer", "centers_optimizer", "scaler", "centers"),
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind_is_refused_in_one_message(
    field: str, resuming: Callable[[dict[str, Any]], None], written: dict[str, Any]
) -> None:
    for odd in ODD:
        if odd is None and field in ("best", "fit"):  # as before an evaluation
            continue
        with pytest.raises(GkdError, match=r"last\.pt: "):
            resuming({**written, field: odd})
    with pytest.raises(ConfigError, match=rf"missing required field `{field}`"):
        resuming({name: value for name, value in written.items() if name != field})


def first(tensors: dict[str, Any]) -> str:
    return next(name for name, tensor in tensors.items() if tensor.dim() == 4)


def edit_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        name = first(content["model"])
        content["model"][name] = change(content["model"][name])

    return edit


def edit_momentum(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        held = content["optimizer"]["state"][0]
        held["momentum_buffer"] = change(held["momentum_buffer"])

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (edit_weight(lambda t: t.to(torch.int8)), "expected torch.float32 in a plain tensor"),
        (edit_weight(lambda t: t.to(torch.complex64)), "expected torch.float32"),
        (edit_weight(lambda t: t.to_sparse()), "expected torch.float32 in a plain tensor"),
        (edit_weight(lambda t: torch.empty_like(t, device="meta")), "in a plain tensor"),
        (edit_weight(lambda t: t * math.nan), "expected finite numbers"),
        (edit_weight(lambda t: t[:1]), r"expected \[\d+, .*\], got \[1, "),
        (lambda c: c["model"].pop(first(c["model"])), "Missing key"),
        (edit_momentum(lambda t: t.half()), "momentum_buffer of parameter 0: expected torch"),
        (edit_momentum(lambda t: t.flatten()), "momentum_buffer of parameter 0: expected "),
        (edit_momentum(lambda t: t + math.inf), "expected finite numbers"),
        (lambda c: c["optimizer"]["state"].update({999: {}}), "expected the state of"),
        (lambda c: c["optimizer"]["state"][0].clear() or c["optimizer"]["state"][0].update(
            {"exp_avg": torch.zeros(())}), "exp_avg"),
        (lambda c: c["centers"]["tensors"].append("exp_avg"), r"expected \['momentum_buffer'\]"),
        (lambda c: c["window"].update(taken=10**6), "step: expected at most 15"),
        (lambda c: c.update(step=16), "step: expected at most 15"),
        (lambda c: c["rng"].update(cpu=torch.zeros(8, dtype=torch.uint8)), "rng and scaler"),
        (lambda c: c["rng"].update(cpu=NUMBERS), "rng and scaler"),
        (lambda c: c.update(fit=torch.zeros(3)), "fit: expected "),
        (lambda c: c["config"]["train"].update(epochs=math.nan), "configuration is invalid"),
        (lambda c: c["config"].update({"nonsense": {"x": 1}}), "configuration is invalid"),
    ],
    ids=map(str, range(20)),
)  # fmt: skip
def test_what_does_not_fit_is_named(
    edit: Edit,
    named: str,
    resuming: Callable[[dict[str, Any]], None],
    written: dict[str, Any],
) -> None:
    content = copy.deepcopy(written)
    edit(content)
    with pytest.raises(ConfigError) as error:
        resuming(content)
    assert re.search(named, str(error.value)), error.value


def test_a_student_is_read_by_the_same_rules(written: dict[str, Any], tmp_path: Path) -> None:
    for field in ("config", "data", "model", "step", "accuracy"):
        write_checkpoint(tmp_path / "x.pt", {**written, field: math.nan})
        with pytest.raises(ConfigError, match=rf"x\.pt: expected a checkpoint .*\$\.{field}"):
            load_student(tmp_path / "x.pt")
    content = copy.deepcopy(written)
    edit_weight(lambda t: t.to(torch.int8))(content)
    write_checkpoint(tmp_path / "x.pt", content)
    with pytest.raises(ConfigError, match=r"x\.pt: its weights do not fit .* got torch.int8"):
        load_student(tmp_path / "x.pt")


def test_a_stray_file_beside_the_centres_is_not_read(
    faces: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    stray = last_centers(out) / "model.safetensors"
    shutil.copy(next(last_centers(out).iterdir()), stray)
    records, targets = load(faces)
    state = RunState(small_config(f'evaluation.sets=["{faces}/pairs.bin"]'), records, targets)
    with pytest.raises(GkdError, match=r"model\.safetensors: expected only files that the check"):
        state.restore(read_checkpoint(out / LAST), out / LAST)
