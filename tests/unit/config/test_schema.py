"""Settings: what is accepted, what is refused and with which words."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_speculator.config.families import FAMILIES
from verl_speculator.config.hydra import compose, load_settings, quote_dims
from verl_speculator.config.schema import (
    SpeculatorConfig,
    SpeculatorTraining,
    default_of,
    ignored_settings,
    known_settings,
    parse_dims,
    split_settings,
)
from verl_speculator.utils.errors import UserError


def test_defaults_of_the_guide():
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


def test_settings_that_a_family_does_not_read_change_nothing():
    given = {"method": "medusa", "emb_dim": "not even a width", "tie_weights": False, "num_layers": 2}
    assert SpeculatorConfig(**given) == SpeculatorConfig(method="medusa", num_layers=2)
    assert ignored_settings(given) == [
        "model.speculator.emb_dim=not even a width",
        "model.speculator.tie_weights=False",
    ]
    assert ignored_settings({"num_layers": 2}) == ["model.speculator.num_layers=2"]
    assert not ignored_settings({"method": "sum_lstm", "tie_lstm_embs": True, "num_layers": 1})


def test_the_start_is_the_familys_own_unless_it_is_named():
    assert [split_settings({"method": m})[1].init for m in ("sum_rnn", "sum_lstm", "medusa")] == ["random"] * 2 + [
        "base"
    ]
    assert split_settings({"method": "medusa", "init": "random"})[1].init == "random"
    assert split_settings({"init": "base"})[1].init == "base"


def test_lk_eta_unset_is_the_familys_own():
    """arXiv 2602.23881: 3 for speculators that read tokens, 10 for Medusa's heads, which do not."""
    eta = {m: split_settings({"method": m, "exit_layer": 0})[1].objective.lk_eta for m in FAMILIES}
    assert eta == {"sum_rnn": 3.0, "sum_lstm": 3.0, "medusa": 10.0, "early_exit": 3.0}
    assert split_settings({"method": "medusa", "lk_eta": 3})[1].objective.lk_eta == 3
    overrides = ["trainer.default_local_dir=x", "model.speculator.method=medusa"]
    assert load_settings(overrides).model.speculator.lk_eta == 10
    assert load_settings([*overrides, "model.speculator.lk_eta=2.5"]).model.speculator.lk_eta == 2.5
    with pytest.raises(UserError, match=r"model\.speculator\.lk_eta=0: expected a number > 0"):
        split_settings({"method": "medusa", "lk_eta": 0})


def test_yaml_and_dataclasses_agree():
    written = OmegaConf.to_container(compose(["trainer.default_local_dir=x"]).model.speculator)
    assert written == {name: default_of(setting) for name, setting in known_settings().items()}
    assert all(setting.metadata["help"] for setting in known_settings().values())


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpeculatorConfig().n_predict = 3


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4))
def test_dims_round_trip(dims):
    assert parse_dims("x", ".".join(map(str, dims))) == tuple(dims)


@pytest.mark.parametrize("value", [0, -1, "0", "-4", "1024.", ".5", "a.b", "", "1..2", 1024.256, True, "1024.0", [1]])
def test_dims_refused(value):
    with pytest.raises(UserError, match=r"model\.speculator\.inner_dim="):
        SpeculatorConfig(inner_dim=value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_predict": 0}, "n_predict=0: expected an integer of at least 1"),
        ({"n_predict": 2.5}, "n_predict=2.5"),
        ({"n_predict": True}, "n_predict=True"),
        ({"method": "sum_rn"}, "did you mean 'sum_rnn'"),
        ({"method": "sum_lstm", "tie_weights": False}, "needs model.speculator.tie_weights=true"),
        ({"emb_dim": "8.16", "proj_dim": 8}, "must end in the same width"),
        ({"tie_weights": 1}, "tie_weights=1: expected true or false"),
        ({"n_predct": 3}, "did you mean 'n_predict'"),
        ({"detach_hidden": "yes"}, "detach_hidden=yes: expected true or false"),
        ({"init": "bases"}, "model.speculator.init=bases: expected random, base or null (did you mean 'base'?)"),
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
        ({"depth_weights": 3}, "model.speculator.depth_weights=3: expected a list of numbers, reach, gain, or null"),
        ({"loss_chunk_rows": 0}, "model.speculator.loss_chunk_rows=0: expected an integer of at least 1, or null"),
    ],
)
def test_refusals_name_setting_and_value(settings, words):
    with pytest.raises(UserError) as error:
        split_settings(settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_differences_name_each_key():
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
def test_dims_mean_what_they_say(given, expected):
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
def test_warmup_steps_resolve_to_what_verl_reads(given, steps, ratio):
    """verl takes any number that is not positive for "by the ratio", and fails on null."""
    optim = load_settings(
        [
            *("trainer.default_local_dir=x", "trainer.device=cpu"),
            *("optim.lr_warmup_steps_ratio=0.3", f"optim.lr_warmup_steps={given}"),
        ]
    ).optim
    assert (optim.lr_warmup_steps, optim.lr_warmup_steps_ratio) == (steps, ratio)


def test_other_overrides_are_left_alone():
    assert quote_dims("optim.lr=1e-4") == "optim.lr=1e-4"
    assert quote_dims("++model.speculator.inner_dim=64.80") == "++model.speculator.inner_dim='64.80'"


def test_path_and_partial_pretrain_are_one():
    for key in ("model.path", "model.partial_pretrain"):
        model = load_settings(["trainer.default_local_dir=x", f"{key}=some/base"]).model
        assert model.path == model.partial_pretrain == "some/base"
    with pytest.raises(UserError, match="name the same thing"):
        load_settings(["trainer.default_local_dir=x", "model.path=a/b", "model.partial_pretrain=c/d"])


def test_types_follow_device_and_freezing():
    for frozen, model_dtype in (("true", "fp32"), ("false", "fp32")):
        config = load_settings(
            ["trainer.default_local_dir=x", "trainer.device=cpu", f"model.freeze_base_model={frozen}"]
        )
        assert (config.engine.mixed_precision.param_dtype, config.engine.model_dtype) == ("fp32", model_dtype)
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
def test_overrides_refused(override, words):
    with pytest.raises(UserError) as error:
        load_settings(["trainer.default_local_dir=x", override])
    assert words in str(error.value)
