"""The schema of `model.speculator.*`, and how a command line becomes a resolved configuration."""

from __future__ import annotations

import dataclasses
import math
import re
import runpy
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import Field

from helpers.training_runs import ROOT
from verl_speculator.config.families import FAMILIES
from verl_speculator.config.hydra import common_overrides, compose, load_run_config, load_settings, quote_dims
from verl_speculator.config.objective import Objective
from verl_speculator.config.schema import (
    Count,
    PositiveNumber,
    SpeculatorConfig,
    SpeculatorSettings,
    SpeculatorTraining,
    check_value,
    describe_values,
    ignored_settings,
    known_settings,
    parse_dims,
    setting_families,
)
from verl_speculator.utils.settings import UserError


def test_config_defaults_are_those_of_the_training_guide():
    config = SpeculatorConfig()
    assert config.to_dict() == {
        "method": "sum_rnn",
        "n_predict": 5,
        "inner_dim": 1024,
        "emb_dim": 1024,
        "proj_dim": 1024,
        "scale_input": False,
        "tie_weights": True,
    }
    assert SpeculatorConfig(method="sum_lstm").to_dict() == config.to_dict() | {
        "method": "sum_lstm",
        "tie_lstm_embs": False,
    }
    assert SpeculatorConfig(method="medusa").to_dict() == {
        "method": "medusa",
        "n_predict": 5,
        "num_layers": 1,
        "head": "copy",
        "hidden_state": "post_norm",
        "inner_dim": None,
    }


def test_config_unread_settings_are_ignored():
    given = {"method": "medusa", "emb_dim": "not even a width", "tie_weights": False, "num_layers": 2}
    assert SpeculatorConfig(**given) == SpeculatorConfig(method="medusa", num_layers=2)
    assert ignored_settings(given) == [
        "model.speculator.emb_dim=not even a width",
        "model.speculator.tie_weights=False",
    ]
    assert ignored_settings({"num_layers": 2}) == ["model.speculator.num_layers=2"]
    assert not ignored_settings({"method": "sum_lstm", "tie_lstm_embs": True, "num_layers": 1})


def training_of(**settings):
    return SpeculatorSettings.parse(settings).training


def test_init_unset_is_the_default_of_the_family():
    init = {method: training_of(method=method, exit_layer=0).init for method in FAMILIES}
    mlp = {"sum_rnn": "random", "sum_lstm": "random"}
    # eagle3 starts as the base model's tables, which `embedding` and `head` say.
    assert init == mlp | {"medusa": "base", "early_exit": "base", "eagle3": None}
    assert training_of(method="medusa", init="random").init == "random"
    assert training_of(init="base").init == "base"


def test_lk_eta_unset_is_the_default_of_the_family():
    """arXiv 2602.23881: 3 for speculators that read tokens, 10 for Medusa's heads, which do not."""
    eta = {method: training_of(method=method, exit_layer=0).objective.lk_eta for method in FAMILIES}
    assert eta == {"sum_rnn": 3.0, "sum_lstm": 3.0, "medusa": 10.0, "early_exit": 3.0, "eagle3": 3.0}
    assert training_of(method="medusa", lk_eta=3).objective.lk_eta == 3
    overrides = ["trainer.default_local_dir=x", "model.speculator.method=medusa"]
    assert load_settings(overrides).model.speculator.lk_eta == 10
    assert load_settings([*overrides, "model.speculator.lk_eta=2.5"]).model.speculator.lk_eta == 2.5
    with pytest.raises(UserError, match=r"model\.speculator\.lk_eta=0: expected a number > 0"):
        training_of(method="medusa", lk_eta=0)


def test_objective_holds_the_four_settings_of_the_loss():
    training = training_of(loss={"kl": 2, "ce": 0}, kl_temperature=2.0, lk_eta=4, depth_weights=[1, 1, 1, 1, 0])
    assert training.objective == Objective((("kl", 2.0),), 2.0, 4, (1.0, 1.0, 1.0, 1.0, 0.0))
    assert training_of(depth_weights="gain").objective.pair_weights == "gain"
    changed = dataclasses.replace(training, loss="tv")
    assert changed.objective.weights == (("tv", 1.0),) and training.objective.weights == (("kl", 2.0),)


def test_settings_parsed_and_written_back_are_equal():
    """Launcher and workers parse the same keys: a worker reads those that the launcher has resolved."""
    for method in FAMILIES:
        settings = SpeculatorSettings.parse({"method": method, "exit_layer": 1, "loss": {"lk": 1}, "lr": 3})
        assert SpeculatorSettings.parse(settings.to_dict()) == settings
    run = load_run_config(["trainer.default_local_dir=x", "model.speculator.inner_dim=8.16"])
    assert OmegaConf.to_container(run.tree.model.speculator) == run.speculator.to_dict()
    assert run.speculator.config.inner_dims == (8, 16)


def test_yaml_and_docs_are_those_generated_from_the_schema():
    """`make docs-tables` writes them."""
    for file, content in runpy.run_path(str(ROOT / "docs" / "settings_tables.py"))["generated_files"]().items():
        assert file.read_text() == content, f"{file} differs from the schema: run `make docs-tables`"


def test_yaml_holds_every_setting_with_its_default():
    written = OmegaConf.to_container(compose(["trainer.default_local_dir=x"]).model.speculator)
    assert written == known_settings()


def test_usage_names_every_setting():
    usage = common_overrides()
    for name, default in known_settings().items():
        assert f"  {name}={'null' if default is None else str(default).lower()}" in usage


def test_setting_families_are_those_whose_row_reads_it():
    assert setting_families("n_predict") == setting_families("loss") == tuple(FAMILIES)
    assert setting_families("inner_dim") == ("sum_rnn", "sum_lstm", "medusa")
    assert setting_families("exit_layer") == ("early_exit",)


@pytest.mark.parametrize(
    ("annotation", "words", "accepted", "refused"),
    [
        (bool, "true or false", [True], [1, None, "true"]),
        (bool | None, "true, false or null", [False, None], [0]),
        (Count, "an integer of at least 1", [1], [0, True, 1.0, "1", None]),
        (Count | None, "an integer of at least 1, or null", [None, 7], [0, True]),
        (PositiveNumber, "a number > 0", [1, 0.5], [0, math.nan, math.inf, True, "1"]),
        (Annotated[float, Field(ge=0, le=1)], "a number of at least 0 and at most 1", [0, 1], [-0.1, 2, math.nan]),
        (Literal["a", "b"] | None, "one of a, b, null", ["a", None], ["c", ["a"], {}]),
        (Count | Literal["all"], "an integer of at least 1, or all", [1, "all"], [0, "al"]),
    ],
)
def test_check_value_accepts_what_describe_values_says(annotation, words, accepted, refused):
    assert describe_values(annotation) == words
    for value in accepted:
        check_value("x", value, annotation)
    for value in refused:
        with pytest.raises(UserError, match=re.escape(f": expected {words}")):
            check_value("x", value, annotation)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpeculatorConfig().n_predict = 3


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4))
def test_parse_dims_of_joined_widths_returns_them(dims):
    assert parse_dims("x", ".".join(map(str, dims))) == tuple(dims)


@pytest.mark.parametrize("value", [0, -1, "0", "-4", "1024.", ".5", "a.b", "", "1..2", 1024.256, True, "1024.0", [1]])
def test_config_invalid_width_refused(value):
    with pytest.raises(UserError, match=r"model\.speculator\.inner_dim="):
        SpeculatorConfig(inner_dim=value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_predict": 0}, "n_predict=0: expected an integer of at least 1"),
        ({"n_predict": 2.5}, "n_predict=2.5"),
        ({"n_predict": True}, "n_predict=true: expected an integer of at least 1"),
        ({"method": "sum_rn"}, "did you mean 'sum_rnn'"),
        ({"method": "sum_lstm", "tie_weights": False}, "needs model.speculator.tie_weights=true"),
        ({"emb_dim": "8.16", "proj_dim": 8}, "must end in the same width"),
        ({"tie_weights": 1}, "tie_weights=1: expected true or false"),
        ({"n_predct": 3}, "did you mean 'n_predict'"),
        ({"detach_hidden": "yes"}, "detach_hidden=yes: expected true or false"),
        ({"init": "bases"}, "model.speculator.init=bases: expected one of random, base, null (did you mean 'base'?)"),
        (
            {"method": "medusa", "head": "shard"},
            "model.speculator.head=shard: expected one of copy, shared, frozen_shared (did you mean 'shared'?)",
        ),
        (
            {"method": "medusa", "hidden_state": "prenorm"},
            "model.speculator.hidden_state=prenorm: expected one of post_norm, pre_norm (did you mean 'pre_norm'?)",
        ),
        ({"method": "medusa", "num_layers": 0}, "model.speculator.num_layers=0: expected an integer of at least 1"),
        (
            {"method": "medusa", "inner_dim": "64.64"},
            "model.speculator.inner_dim=64.64: model.speculator.method=medusa has a single width there",
        ),
        (
            {"method": "medusa", "head": "frozen_shared", "init": "random"},
            "model.speculator.init=random: model.speculator.head=frozen_shared never learns; expected "
            "model.speculator.init=base",
        ),
        ({"loss": "kll"}, "model.speculator.loss=kll: kll is no loss (did you mean 'kl'?)"),
        ({"loss": {"ce": -1}}, "model.speculator.loss.ce=-1: expected a weight ≥ 0"),
        ({"loss": {"ce": 0}}, "all weights are 0"),
        ({"kl_temperature": 0}, "model.speculator.kl_temperature=0: expected a number > 0"),
        (
            {"depth_weights": [1, 2]},
            "model.speculator.depth_weights=[1.0, 2.0]: expected 5 numbers, one for each depth",
        ),
        (
            {"depth_weights": 3},
            "model.speculator.depth_weights=3: expected numbers ≥ 0, one of them above, or reach or gain",
        ),
        ({"loss_chunk_rows": 0}, "model.speculator.loss_chunk_rows=0: expected an integer of at least 1, or null"),
    ],
)
def test_settings_invalid_value_refused_in_one_line(settings, words):
    with pytest.raises(UserError) as error:
        SpeculatorSettings.parse(settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_config_differences_name_each_setting():
    one, other = SpeculatorConfig(n_predict=3), SpeculatorConfig(n_predict=4, inner_dim="8.9")
    assert one.differences(other) == ["n_predict (3, 4)", "inner_dim (1024, 8.9)"]
    assert SpeculatorTraining().path is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1024.2048", "1024.2048"),
        ("1024.2560", "1024.2560"),
        ('"1024.2560"', "1024.2560"),
        ("'1024.2560'", "1024.2560"),
        ("1024", 1024),
        ("1e3", None),
        ("1024.", None),
    ],
)
def test_load_settings_widths_keep_every_digit(given, expected):
    overrides = [
        "trainer.default_local_dir=x",
        *(f"model.speculator.{d}_dim={given}" for d in ("inner", "emb", "proj")),
    ]
    if expected is None:
        with pytest.raises(UserError, match="is no width"):
            load_settings(overrides)
        return
    speculator = load_settings(overrides).model.speculator
    assert (speculator.inner_dim, speculator.emb_dim, speculator.proj_dim) == (expected,) * 3


@pytest.mark.parametrize(
    ("given", "steps", "ratio"), [("0", -1, 0.0), ("null", -1, 0.3), ("-1", -1, 0.3), ("7", 7, 0.3)]
)
def test_load_settings_warmup_steps_become_what_verl_reads(given, steps, ratio):
    """verl takes any number that is not positive for "by the ratio", and fails on null."""
    optim = load_settings(
        [
            *("trainer.default_local_dir=x", "trainer.device=cpu"),
            *("optim.lr_warmup_steps_ratio=0.3", f"optim.lr_warmup_steps={given}"),
        ]
    ).optim
    assert (optim.lr_warmup_steps, optim.lr_warmup_steps_ratio) == (steps, ratio)


def test_quote_dims_leaves_other_overrides_alone():
    assert quote_dims("optim.lr=1e-4") == "optim.lr=1e-4"
    assert quote_dims("++model.speculator.inner_dim=64.80") == "++model.speculator.inner_dim='64.80'"


def test_load_settings_path_and_partial_pretrain_are_one():
    for key in ("model.path", "model.partial_pretrain"):
        model = load_settings(["trainer.default_local_dir=x", f"{key}=some/base"]).model
        assert model.path == model.partial_pretrain == "some/base"
    with pytest.raises(UserError, match="name the same thing"):
        load_settings(["trainer.default_local_dir=x", "model.path=a/b", "model.partial_pretrain=c/d"])


def test_load_settings_dtypes_follow_device_and_freezing(monkeypatch):
    """A frozen base model computes in bf16 on a CPU that has it; one that is trained in fp32 on any CPU."""
    for has_bf16, frozen, dtype in (
        (1, "true", "bf16"),
        (0, "true", "fp32"),
        (1, "false", "fp32"),
        (0, "false", "fp32"),
    ):
        monkeypatch.setattr("verl_speculator.config.hydra.cpu_computes_bf16", lambda has_bf16=has_bf16: bool(has_bf16))
        config = load_settings(
            ["trainer.default_local_dir=x", "trainer.device=cpu", f"model.freeze_base_model={frozen}"]
        )
        assert (config.engine.mixed_precision.param_dtype, config.engine.model_dtype) == (dtype, dtype)
    config = load_settings(["trainer.default_local_dir=x", "trainer.device=cuda"])
    assert (config.engine.mixed_precision.param_dtype, config.engine.model_dtype) == ("bf16", "bf16")
    config = load_settings(["trainer.default_local_dir=x", "trainer.device=cuda", "model.freeze_base_model=false"])
    assert config.engine.model_dtype == "fp32"
    config = load_settings(
        ["trainer.default_local_dir=x", "trainer.device=cpu", "engine.mixed_precision.param_dtype=bf16"]
    )
    assert config.engine.model_dtype == "bf16"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.trian_files=x", "did you mean 'data.train_files'"),
        ("model.speculator.n_predct=3", "did you mean 'n_predict'"),
        ("+model.speculator.heads=3", "model.speculator.heads is not a setting"),
        ("nonsense", "expected key=value"),
        ("trainer.device=gpu", "expected auto, cuda, npu, cpu"),
    ],
)
def test_load_settings_unknown_key_refused_with_nearest(override, words):
    with pytest.raises(UserError) as error:
        load_settings(["trainer.default_local_dir=x", override])
    assert words in str(error.value)
