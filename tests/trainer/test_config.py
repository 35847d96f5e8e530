"""The configuration: what is read, what is refused, and the messages."""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from msgspec.inspect import type_info

from gkd.storage.errors import ConfigError
from gkd.trainer.config import RunConfig
from gkd.trainer.config_file import (
    KEYS,
    describe_type,
    load_config,
    stored_config,
    to_toml,
)
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


@pytest.mark.parametrize("quote", ["", '"'])
def test_words_need_no_quotes_in_lists_neither(quote: str) -> None:
    sets = f"[{quote}a.bin{quote}, {quote}b.bin{quote}]"
    config = load_config(None, [f"evaluation.sets={sets}", f"student.name={quote}iresnet50{quote}"])
    assert config.evaluation.sets == ("a.bin", "b.bin")
    assert config.student.name == "iresnet50"


@pytest.mark.parametrize(
    ("overrides", "warmup"),
    [
        ([], 4.0),
        (["train.epochs=5"], 4.0),
        (["train.epochs=4"], 0.8),
        (["train.epochs=1"], 0.2),
        (["train.epochs=4", "schedule.warmup_epochs=3"], 3.0),
    ],
)
def test_the_default_warm_up_fits_a_short_training(overrides: list[str], warmup: float) -> None:
    assert load_config(None, overrides).schedule.warmup_epochs == warmup


def test_former_names_of_keys_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[train]\ngradient_hook = "bfloat16"')
    assert load_config(path).train.allreduce_dtype == "bfloat16"
    old = msgspec.to_builtins(load_config(None, ["train.gradient_hook=float16", "train.seed=3"]))
    old["train"]["gradient_hook"] = old["train"].pop("allreduce_dtype")
    assert stored_config(old) == load_config(
        None, ["train.allreduce_dtype=float16", "train.seed=3"]
    )


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
def test_a_saved_configuration_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
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
def test_kinds_of_heads_have_margins(overrides: list[str], margin: Margin) -> None:
    assert load_config(None, overrides).head.margins == margin


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "--set: unknown key train.epoch; did you mean train.epochs?"),
        ("traim.epochs=3", "--set: unknown section [traim]; did you mean train?"),
        ("train.epochs=0", "--set: train.epochs: expected an integer >= 1, got 0"),
        ("train.batch_size=0", "--set: train.batch_size: expected an integer >= 2, got 0"),
        ("train.batch_size=1", "--set: train.batch_size: expected an integer >= 2, got 1"),
        (
            "train.seed=9223372036854775808",
            "expected an integer >= 0 and <= 9223372036854775807, got",
        ),
        ("train.seed=18446744073709551616", "an integer >= 0 and <= 9223372036854775807, got"),
        ("train.seed=-1", "an integer >= 0 and <= 9223372036854775807, got -1"),
        ("student.embedding_dim=1000000000000", "an integer >= 1 and <= 8192, got 1000000000000"),
        ("student.width=1e9", "--set: student.width: expected a number > 0 and <= 8, got 1000000"),
        ('schedule.milestones=[1,"a"]', "milestones[1]: expected a number > 0 and <= 1000000, got"),
        ("train.epochs=ten", "--set: train.epochs: expected an integer >= 1, got 'ten'"),
        ("kd.temperature=0", "--set: kd.temperature: expected a number > 0, got 0"),
        ("kd.ramp=1.5", "--set: kd.ramp: expected a number >= 0 and <= 1, got 1.5"),
        ("optimizer.nesterov=1", "--set: optimizer.nesterov: expected true or false, got 1"),
        ("student.input_size=57", "expected one of 28, 56, 112, got 57"),
        ("head.kind=sphere", "expected one of 'arcface', 'combined', 'cosface', got 'sphere'"),
        ("head.scale=1e30", "--set: head.scale: expected a number > 0 and <= 1024, got 1e+30"),
        ("checkpoint.every_epochs=1e308", "a number > 0 and <= 1000000, got 1e+308"),
        ("schedule.milestones=[1,inf]", "milestones[1]: expected a number > 0 and <= 1000000, got"),
        ("train.lr=0.1", "--set: unknown key train.lr; did you mean optimizer.lr?"),
        ("schedule.milestones=3", "expected a list, schedule.milestones=[3], got 3"),
        ("evaluation.sets=no.bin", """expected a list, evaluation.sets=["no.bin"], got 'no.bin'"""),
        ("evaluation.sets=[1]", "--set: evaluation.sets[0]: expected a string, got 1"),
        ("epochs=3", "--set epochs=3: expected section.key=value, e.g. train.epochs=10"),
        ("train.epochs", "--set train.epochs: expected section.key=value"),
        ("head.m2=0.5", "head.m2: only head.kind combined takes it; cosface takes head.margin"),
        ("optimizer.momentum=0", "Nesterov needs optimizer.momentum above 0"),
        ("schedule.warmup_epochs=20", "expected less than train.epochs (20), got 20"),
        ("optimizer.lr=1e-8", "schedule.final_lr: expected at most optimizer.lr (1e-08)"),
    ],
)
def test_mistakes_are_reported_with_key_and_expectation(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert message in str(error.value)


def test_every_number_is_finite() -> None:
    keys = [key for key, kind in KEYS.items() if "a number" in describe_type(type_info(kind))]
    assert {"head.margin", "optimizer.momentum", "kd.ramp", "student.width"} < set(keys)
    assert len(keys) == 21
    for key in keys:
        for number in ("inf", "-inf", "nan"):
            value = f"[1.0, {number}]" if key == "schedule.milestones" else number
            with pytest.raises(ConfigError) as error:
                load_config(None, [f"{key}={value}"])
            assert str(error.value).startswith(f"--set: {key}")
            assert str(error.value).endswith(f"got {number}")


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr: expected a finite number, got inf"):
        load_config(None, ["optimizer.lr=inf"])


def test_margin_of_a_combined_head_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--set: head\.margin: head\.kind combined takes"):
        load_config(None, ["head.kind=combined", "head.margin=0.4"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train]\nepoch = 3", "run.toml: unknown key train.epoch; did you mean train.epochs?"),
        ("[train]\nepochs = 0", "run.toml: train.epochs: expected an integer >= 1, got 0"),
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


def test_the_origin_of_a_bad_value_is_its_last_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nepochs = 30")
    with pytest.raises(ConfigError, match=r"^--set: train\.epochs"):
        load_config(path, ["train.epochs=0"])


def test_an_absent_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read \(No such file"):
        load_config(tmp_path / "gone.toml")


def test_torch_and_numpy_accept_the_largest_seed() -> None:
    seed = load_config(None, ["train.seed=9223372036854775807"]).train.seed
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    np.random.default_rng([seed, 0])


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "0x" + "f" * 5000, "[" * 100_000, "[" * 10_000 + "]" * 10_000, "[1," * 3000],
    ids=["digits", "hexadecimal", "open", "deep", "unfinished"],
)
@pytest.mark.parametrize("key", ["train.seed", "evaluation.sets"])
def test_values_beyond_any_sense_end_in_one_short_message(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set: {re.escape(key)}") as error:
        load_config(None, [f"{key}={value}"])
    assert len(str(error.value)) < 500


def test_a_list_in_quotes_is_shown_without_them() -> None:
    with pytest.raises(ConfigError, match=r'a list, evaluation\.sets=\["lfw\.bin"\], got'):
        load_config(None, ['evaluation.sets="[lfw.bin]"'])
