"""The table of speculator families: one row each, readable without importing torch.

A family is one class in `verl_speculator.models` and one row here. `verl_speculator.config.schema` validates from the
row, `verl_speculator.checkpoint.format` writes from it, and `verl_speculator.models` imports its module when a
speculator is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Where an embedding or a head of sum_rnn and sum_lstm comes from, and what Medusa's heads are: the values of
# `embedding` and `head`. base corresponds to shared, base_frozen to frozen_shared (docs/training.md).
TABLES = OWN, BASE, BASE_FROZEN = ("own", "base", "base_frozen")
HEADS = ("copy", "shared", "frozen_shared")
HIDDEN_STATES = ("post_norm", "pre_norm")
TRAINABLE = ("head", "head_and_block")


def _arctic_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ArcticInference 0.3.0 reads besides the settings; it asserts one entry of top_k per draft token."""
    return {
        "model_type": "mlp_speculator",
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "top_k_tokens_per_head": [1] * content["n_predict"],
        "tie_lstm_embs": False,
    }


def _vllm_medusa_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that vLLM 0.24 to 0.32 reads from a Medusa checkpoint."""
    keys = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": content["input_hidden_dim"],
        "num_heads": content["n_predict"],
        "num_hidden_layers": content["num_layers"],
        "medusa_fc_bias": True,
    }
    if content["head"] != "copy":
        keys["original_lm_head"] = True
    if size := content.get("draft_vocab_size"):
        keys["truncated_vocab_size"] = size
    return keys


@dataclass(frozen=True)
class Family:
    """One family of speculators.

    Attributes:
        target: `module:Class` of the implementation, imported on first use.
        summary: one line for `inspect`, the model card and the docs.
        settings: the fields of `SpeculatorConfig` that it reads besides those of all families; others are ignored.
        defaults: the values of the settings that are null by default. A width of None means no such layer.
        choices: the values of a setting that it accepts, where they differ from those of other families.
        single_widths: whether each width must be a single number.
        merges_widths: whether `emb_dim` and `proj_dim` are summed, and so must end in the same width.
        requires: settings that must have one particular value, for example `{"tie_weights": True}`.
        first_offset: how many tokens ahead the first prediction lies: 2 if drafting starts from a hidden state whose
            next token is known, 1 if the speculator reads every token itself.
        single_depth: whether training knows one depth only, because each draft token is read before the next is
            drafted.
        reads_sequence: whether it reads the states of all positions, of the base model's layers `aux_layers`.
        serving_keys: maps the content of `config.json` to the additional keys that serving engines read.
    """

    target: str
    summary: str
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    single_widths: bool = False
    merges_widths: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)
    first_offset: int = 2
    single_depth: bool = False
    reads_sequence: bool = False
    serving_keys: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda content: {}


_MLP_SETTINGS = ("inner_dim", "emb_dim", "proj_dim", "embedding", "head", "scale_input", "tie_weights")
_MLP = {
    # η of the hybrid loss: 3 for speculators that read tokens, 10 for Medusa heads (arXiv 2602.23881).
    "defaults": {
        **{"n_predict": 5, "inner_dim": 1024, "emb_dim": 1024, "proj_dim": 1024, "embedding": OWN, "head": OWN},
        **{"init": "random", "lk_eta": 3.0},
    },
    "choices": {"embedding": TABLES, "head": TABLES},
    "merges_widths": True,
    "serving_keys": _arctic_keys,
}
FAMILIES: Mapping[str, Family] = {
    "sum_rnn": Family(
        target="verl_speculator.models.recurrent:SumRNN",
        summary="MLP speculator: one summed recurrent state (IBM, Snowflake)",
        settings=_MLP_SETTINGS,
        **_MLP,
    ),
    "sum_lstm": Family(
        target="verl_speculator.models.recurrent:SumLSTM",
        summary="LSTM speculator: four summed gates and a cell (Snowflake Arctic)",
        settings=(*_MLP_SETTINGS, "tie_lstm_embs"),
        requires={"tie_weights": True},
        **_MLP,
    ),
    "medusa": Family(
        target="verl_speculator.models.medusa:Medusa",
        summary="Medusa heads: one residual head for each draft token (Cai et al.)",
        settings=("num_layers", "head", "hidden_state", "inner_dim"),
        defaults={"n_predict": 5, "inner_dim": None, "head": "copy", "init": "base", "lk_eta": 10.0},
        choices={"head": HEADS},
        single_widths=True,
        serving_keys=_vllm_medusa_keys,
    ),
    "early_exit": Family(
        target="verl_speculator.models.early_exit:EarlyExit",
        summary="Early exit: the base model cut behind one of its decoder layers, with an LM head of its own",
        settings=("exit_layer", "trainable"),
        defaults={"n_predict": 5, "init": "base", "lk_eta": 3.0},
        first_offset=1,
        single_depth=True,
    ),
    "eagle3": Family(
        target="verl_speculator.models.eagle3:Eagle3",
        summary="EAGLE-3: a decoder layer over the sequence and three hidden states of the base model (Li et al.)",
        settings=("aux_layers", "num_layers", "ttt_steps", "embedding", "head", "norm_before_residual", "layer"),
        # η of the hybrid loss as for other speculators that read tokens.
        defaults={"n_predict": 7, "embedding": BASE_FROZEN, "head": BASE, "init": "base", "lk_eta": 3.0},
        choices={"embedding": TABLES, "head": TABLES},
        reads_sequence=True,
    ),
}
