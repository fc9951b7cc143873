"""The table of speculator families: one row each, readable without importing torch.

A family is one module of `verl_speculator.models` and one row here. The row says which settings the family reads, what
they default to, which settings it insists on, and how a serving engine's configuration calls them;
`verl_speculator.config.schema` validates from the row, `verl_speculator.checkpoint.format` writes from it, and
`verl_speculator.models` imports the module when a speculator is really built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

HEADS = ("copy", "shared", "frozen_shared")
HIDDEN_STATES = ("post_norm", "pre_norm")
TRAINABLE = ("head", "head_and_block")


def _nothing_more(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _arctic_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What ArcticInference 0.3.0 reads beside the settings; it asserts one entry of top_k for each draft token."""
    return {
        "model_type": "mlp_speculator",
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "top_k_tokens_per_head": [1] * facts["n_predict"],
        "tie_lstm_embs": False,
    }


def _vllm_medusa_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM 0.24 to 0.32 reads of a Medusa checkpoint."""
    keys = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": facts["input_hidden_dim"],
        "num_heads": facts["n_predict"],
        "num_hidden_layers": facts["num_layers"],
        "medusa_fc_bias": True,
    }
    return keys if facts["head"] == "copy" else keys | {"original_lm_head": True}


@dataclass(frozen=True)
class Family:
    """One family of speculators.

    Attributes:
        target: `module:Class` of the implementation, imported on first use.
        summary: what it is, in a line, for `--help`, `inspect` and the docs.
        settings: what it reads of `SpeculatorConfig` beside `method` and `n_predict`. Others are ignored.
        dim_defaults: those that name widths, with the default of each; None is no such layer.
        single_widths: whether a width is one number and never a list.
        merges_widths: whether `emb_dim` and `proj_dim` meet in a sum, and so must end in the same width.
        requires: settings that must hold one particular value, for example `{"tie_weights": True}`.
        init: what `model.speculator.init` is by default.
        lk_eta: what `model.speculator.lk_eta` is by default (arXiv 2602.23881).
        first_offset: how many tokens ahead its first prediction lies: 2 where it starts from a state whose next token
            is known, 1 where it reads every token itself.
        single_depth: whether training knows one depth only, each draft token being read before the next is drafted.
        serving_keys: from the content of `config.json` to the keys by which a serving engine knows the same.
    """

    target: str
    summary: str
    settings: tuple[str, ...] = ()
    dim_defaults: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))
    single_widths: bool = False
    merges_widths: bool = False
    requires: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    init: str = "random"
    lk_eta: float = 3.0
    first_offset: int = 2
    single_depth: bool = False
    serving_keys: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing_more


_MLP_SETTINGS = ("inner_dim", "emb_dim", "proj_dim", "scale_input", "tie_weights")
_MLP_DIMS = MappingProxyType({"inner_dim": 1024, "emb_dim": 1024, "proj_dim": 1024})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "sum_rnn": Family(
            target="verl_speculator.models.sum_rnn:SumRNN",
            summary="MLP speculator: one summed recurrent state (IBM, Snowflake)",
            settings=_MLP_SETTINGS,
            dim_defaults=_MLP_DIMS,
            merges_widths=True,
            serving_keys=_arctic_keys,
        ),
        "sum_lstm": Family(
            target="verl_speculator.models.sum_lstm:SumLSTM",
            summary="LSTM speculator: four summed gates and a cell (Snowflake Arctic)",
            settings=(*_MLP_SETTINGS, "tie_lstm_embs"),
            dim_defaults=_MLP_DIMS,
            merges_widths=True,
            requires=MappingProxyType({"tie_weights": True}),
            serving_keys=_arctic_keys,
        ),
        "medusa": Family(
            target="verl_speculator.models.medusa:Medusa",
            summary="Medusa heads: one residual head for each draft token (Cai et al.)",
            settings=("num_layers", "head", "hidden_state", "inner_dim"),
            dim_defaults=MappingProxyType({"inner_dim": None}),
            single_widths=True,
            init="base",
            lk_eta=10.0,
            serving_keys=_vllm_medusa_keys,
        ),
        "early_exit": Family(
            target="verl_speculator.models.early_exit:EarlyExit",
            summary="Early exit: the base cut behind one of its blocks, with a head of its own",
            settings=("exit_layer", "trainable"),
            init="base",
            first_offset=1,
            single_depth=True,
        ),
    }
)
