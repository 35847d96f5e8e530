"""The configuration: what is read, what is refused and in which words."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from gkd.storage.errors import ConfigError
from gkd.trainer.config import RunConfig, differences, load_config, to_toml
from gkd.trainer.head.margin import Margin


def test_without_a_file_it_is_the_published_recipe() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.student.name, config.student.embedding_dim) == ("mobilefacenet", 512)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 5e-4)
    assert (config.train.epochs, config.schedule.warmup_epochs) == (20, 4.0)
    assert (config.schedule.final_lr, config.kd.temperature) == (2.5e-7, 4.0)
    assert config.head.margins == Margin(1.0, 0.0, 0.4)


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nepochs = 7\nbatch_size = 32\n[kd]\nw_primary = 8\n")
    config = load_config(path, ["train.epochs=9", "train.epochs=11", "student.name=iresnet18"])
    assert (config.train.epochs, config.train.batch_size) == (11, 32)
    assert config.kd.w_primary == 8.0
    assert config.student.name == "iresnet18"


@pytest.mark.parametrize("quotes", ["", '"'])
def test_lists_are_toml(quotes: str) -> None:
    overrides = ['evaluation.sets=["a.bin", "b.bin"]', f"student.name={quotes}iresnet50{quotes}"]
    config = load_config(None, overrides)
    assert config.evaluation.sets == ("a.bin", "b.bin")
    assert config.student.name == "iresnet50"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.width=0.25", "head.kind=arcface", "head.margin=0.3"],
        ["head.kind=combined", "head.m1=0.9", "head.m2=0.4", "head.m3=0.15"],
        ['evaluation.sets=["sets/a \\"b\\" ä.bin"]', "schedule.milestones=[1, 2.5]"],
        ["optimizer.lr=1e-10", "schedule.final_lr=0", "kd.enabled=false"],
    ],
)
def test_what_is_saved_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(None, overrides)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("overrides", "margin"),
    [
        (["head.kind=cosface"], Margin(m3=0.4)),
        (["head.kind=arcface"], Margin(m2=0.5)),
        (["head.kind=arcface", "head.margin=0.3"], Margin(m2=0.3)),
        (["head.kind=combined", "head.m2=0.3", "head.m3=0.2"], Margin(1.0, 0.3, 0.2)),
    ],
)
def test_heads_mean_their_margins(overrides: list[str], margin: Margin) -> None:
    assert load_config(None, overrides).head.margins == margin


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "--set: unknown key train.epoch; did you mean train.epochs?"),
        ("traim.epochs=3", "--set: unknown section [traim]; did you mean train?"),
        ("train.epochs=0", "--set: train.epochs: expected int >= 1, got 0"),
        ("train.batch_size=0", "--set: train.batch_size: expected int >= 2, got 0"),
        ("train.batch_size=1", "--set: train.batch_size: expected int >= 2, got 1"),
        ("train.seed=9223372036854775808", "train.seed: expected int <= 9223372036854775807, got"),
        ("train.seed=18446744073709551616", "train.seed: expected int <= 9223372036854775807, got"),
        ("train.seed=-1", "--set: train.seed: expected int >= 0, got -1"),
        ("student.embedding_dim=1000000000000", "expected int <= 8192, got 1000000000000"),
        ("student.width=1e9", "--set: student.width: expected float <= 8.0, got 1000000000.0"),
        ('schedule.milestones=[1,"a"]', "schedule.milestones[1]: expected float, got 'a'"),
        ("train.epochs=ten", "--set: train.epochs: expected int, got 'ten'"),
        ("kd.temperature=0", "--set: kd.temperature: expected float > 0.0, got 0"),
        ("kd.ramp=1.5", "--set: kd.ramp: expected float <= 1.0, got 1.5"),
        ("optimizer.nesterov=1", "--set: optimizer.nesterov: expected bool, got 1"),
        ("student.input_size=57", "expected one of 112, 56, 28, got 57"),
        ("head.kind=sphere", "expected one of 'cosface', 'arcface', 'combined', got 'sphere'"),
        ("head.scale=1e30", "--set: head.scale: expected float <= 1024.0, got 1e+30"),
        ("checkpoint.every_epochs=1e308", "every_epochs: expected float <= 1000000.0, got 1e+308"),
        ("schedule.milestones=[1,inf]", "milestones[1]: expected float <= 1000000.0, got inf"),
        ("schedule.milestones=3", "expected a list, schedule.milestones=[3], got 3"),
        ("evaluation.sets=no.bin", """expected a list, evaluation.sets=["no.bin"], got 'no.bin'"""),
        ("evaluation.sets=[1]", "--set: evaluation.sets[0]: expected str, got 1"),
        ("epochs=3", "--set epochs=3: expected section.key=value, e.g. train.epochs=10"),
        ("train.epochs", "--set train.epochs: expected section.key=value"),
        ("head.m2=0.5", "head.m2: only head.kind combined takes it; cosface takes head.margin"),
        ("optimizer.momentum=0", "Nesterov needs optimizer.momentum above 0"),
        ("train.epochs=4", "schedule.warmup_epochs: expected less than train.epochs (4), got 4"),
        ("optimizer.lr=1e-8", "schedule.final_lr: expected at most optimizer.lr (1e-08)"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message in str(error.value)


def float_keys() -> list[str]:
    """Every key that takes a number with a fraction, told by its being one now or taking one."""
    content = msgspec.to_builtins(RunConfig())
    keys = []
    for section, names in content.items():
        for name in names:
            value = 1.5 if name != "milestones" else [1.5]
            try:
                msgspec.convert({section: {name: value}}, RunConfig)
            except msgspec.ValidationError as error:
                if "Expected `float`" not in str(error):
                    continue
            keys.append(f"{section}.{name}")
    return keys


def test_every_number_is_finite() -> None:
    keys = float_keys()
    assert {"head.margin", "optimizer.momentum", "kd.ramp", "student.width"} < set(keys)
    assert len(keys) == 21
    for key in keys:
        for number in ("inf", "-inf", "nan"):
            value = f"[1.0, {number}]" if key == "schedule.milestones" else number
            with pytest.raises(ConfigError) as error:
                load_config(None, [f"{key}={value}"])
            assert str(error.value).startswith(f"--set: {key}")
            assert str(error.value).endswith(f"got {number}")


def test_a_number_that_is_not_finite_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr: expected a finite number, got inf"):
        load_config(None, ["optimizer.lr=inf"])


def test_margin_of_a_combined_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set: head\.margin: head\.kind combined takes"):
        load_config(None, ["head.kind=combined", "head.margin=0.4"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train]\nepoch = 3", "run.toml: unknown key train.epoch; did you mean train.epochs?"),
        ("[train]\nepochs = 0", "run.toml: train.epochs: expected int >= 1, got 0"),
        ("train = 3", "run.toml: train: expected a section, got 3"),
        ("epochs = 3", "run.toml: unknown section [epochs]"),
        ("[train", "run.toml: not TOML"),
    ],
)
def test_mistakes_in_a_file_name_it(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)


def test_the_origin_of_a_bad_value_is_where_it_was_last_set(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nepochs = 30")
    with pytest.raises(ConfigError, match=r"^--set: train\.epochs"):
        load_config(path, ["train.epochs=0"])


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read \(No such file"):
        load_config(tmp_path / "gone.toml")


def test_the_greatest_seed_is_taken_by_torch_and_numpy() -> None:
    seed = load_config(None, ["train.seed=9223372036854775807"]).train.seed
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    np.random.default_rng([seed, 0])


def test_differences_name_the_keys_that_change_weights() -> None:
    ours = load_config(None, ["train.epochs=30"])
    theirs = load_config(None, ["train.epochs=40", "data.workers=0", "checkpoint.keep=3"])
    assert differences(ours, theirs) == ["train.epochs: 30, now 40"]
