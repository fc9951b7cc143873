"""Serving engines: which speculators each can load, and the tensors, shapes and configuration that it requires.

Taken from the sources of the named versions (docs/serving-engines.md). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from verl_speculator.checkpoint.format import (
    ARCTIC_MLP,
    DRAFT_TO_TARGET,
    NESTED_KEY,
    SAFETENSORS_FILE,
    TOKEN_MAP,
    WEIGHTS_FILE,
)
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.interop import eagle3

Shapes = dict[str, tuple[int, ...]]
ARCTIC = "ArcticInference 0.3.0 (vLLM 0.26.0)"
VLLM_MEDUSA = "vLLM 0.24 to 0.32 without plugins"
VLLM_EAGLE3 = "vLLM 0.24 to 0.32 without plugins, as EAGLE-3"
PROPOSER_ENGINE = "vLLM 0.24 to 0.33 with SpeculatorProposer (V1 runner)"
DRAFT_MODEL_ENGINE = "vLLM 0.29 to 0.33 with SpeculatorDraftModel (V2 runner)"
GATES = ("forget", "input", "output", "cell")

# This package's drafter for vLLM, and the key of its settings in vLLM's additional_config, since speculative_config
# rejects unknown keys.
PROPOSER = "verl_speculator.vllm_plugin.proposer.SpeculatorProposer"
# This package's draft model for vLLM's V2 runner, as its configuration names it.
DRAFT_MODEL = "SpeculatorDraftModel"
KEY = "verl_speculator"


_VOCABULARY = "draft_vocab_size={}: it drafts from the whole vocabulary; train with draft_vocab_size=null"


def _instead(config: SpeculatorConfig, otherwise: str) -> str:
    """What to do about a refusal: eagle3 is served by vLLM itself."""
    return "vLLM serves eagle3 by itself: --format vllm-eagle3" if config.method == "eagle3" else otherwise


def arctic_unsupported_reason(config: SpeculatorConfig) -> str | None:
    """Why ArcticInference 0.3.0 cannot serve a speculator, and what to train instead; None if it can."""
    if config.method not in ("sum_rnn", "sum_lstm"):
        return f"method={config.method}: it serves sum_rnn and sum_lstm; {_instead(config, 'train one of these')}"
    for name in config.base_tables:
        setting = f"{name}={getattr(config, name)}"
        return f"{setting}: it reads weights of the speculator's own; export it with --format arctic, which writes them"
    if config.draft_vocab_size is not None:
        return _VOCABULARY.format(config.draft_vocab_size)
    for name, dims in (("emb_dim", config.emb_dims), ("proj_dim", config.proj_dims)):
        if len(dims) > 1:
            return f"{name}={getattr(config, name)}: it reads a single width; train with {name}={dims[-1]}"
    inner, merge = f"inner_dim={config.inner_dim}", config.emb_dims[-1]
    if config.inner_dims[0] != merge:
        # It computes the embedding's weight from inner_dim[0], where training, here and there, takes emb_dim[-1].
        return (
            f"{inner}, emb_dim={config.emb_dim}: it takes both for one number; train with inner_dim={merge}, or one "
            "that starts with it"
        )
    if config.method == "sum_rnn":
        return None
    if len(config.inner_dims) > 1:
        return f"{inner}: it reads a single width for sum_lstm; train with inner_dim={merge}, or sum_rnn"
    if not config.tie_lstm_embs:
        return "tie_lstm_embs=false: it decodes with tied embeddings alone; train with tie_lstm_embs=true"
    if config.n_predict == 1:
        return "n_predict=1: it loads the projections of a second depth for sum_lstm; train with n_predict=2"
    return None


def arctic_mlp_unsupported_reason(config: SpeculatorConfig) -> str | None:
    """As `arctic_unsupported_reason`, for its MLP speculator: sum_rnn with one width."""
    if config.method != "sum_rnn":
        advice = _instead(config, "train it, or export with --format arctic")
        return f"method={config.method}: it serves sum_rnn alone; {advice}"
    if config.draft_vocab_size is not None:
        return _VOCABULARY.format(config.draft_vocab_size)
    dims = {name: getattr(config, name) for name in ("inner_dim", "emb_dim", "proj_dim")}
    if len(set(dims.values())) == len(config.inner_dims) == 1:
        return None
    widths = ", ".join(f"{name}={value}" for name, value in dims.items())
    return f"{widths}: it knows one width; train with the same single one in all three"


def medusa_unsupported_reason(config: SpeculatorConfig) -> str | None:
    """Why vLLM 0.24 to 0.32 cannot serve a speculator as Medusa heads, None if it can."""
    if config.method != "medusa":
        by = "as Medusa heads" if config.method == "eagle3" else "by itself"
        return f"method={config.method}: no released version serves it {by}; {_instead(config, 'train medusa')}"
    if config.inner_dim is not None:
        return f"inner_dim={config.inner_dim}: it knows no bottleneck; train with inner_dim=null"
    return proposer_unsupported_reason(config)


def proposer_unsupported_reason(config: SpeculatorConfig) -> str | None:
    """Why this package's drafter for vLLM's V1 runner cannot serve a speculator, None if it can."""
    for name in () if config.reads_sequence else config.frozen_tables:
        return (
            f"{name}=base_frozen: vLLM gives drafters no weights of the base model; train with another setting, or "
            "export it with --format safetensors, which writes them out"
        )
    return draft_model_unsupported_reason(config)


def draft_model_unsupported_reason(config: SpeculatorConfig) -> str | None:
    """Why this package's draft model for vLLM's V2 runner cannot serve a speculator, None if it can."""
    if config.method not in ("sum_rnn", "sum_lstm", "medusa"):
        return (
            f"method={config.method}: it serves sum_rnn, sum_lstm and medusa; {_instead(config, 'train one of these')}"
        )
    if config.hidden_state == "post_norm":
        return None
    return (
        f"hidden_state={config.hidden_state}: vLLM passes the hidden state after the final norm to drafters; "
        "train with hidden_state=post_norm"
    )


def serving_engines(config: SpeculatorConfig) -> dict[str, str | None]:
    """By engine with its versions: why it cannot serve a speculator of this configuration, None if it can."""
    return {
        "verl_speculator.decoding": None,
        DRAFT_MODEL_ENGINE: draft_model_unsupported_reason(config),
        PROPOSER_ENGINE: proposer_unsupported_reason(config),
        ARCTIC: arctic_unsupported_reason(config),
        VLLM_MEDUSA: medusa_unsupported_reason(config),
        VLLM_EAGLE3: eagle3.unsupported_reason(config),
    }


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _arctic_tensors(config: SpeculatorConfig, hidden_size: int, vocab_size: int) -> Shapes:
    """`ArcticLSTMSpeculator` of ArcticInference 0.3.0, spec_dec/arctic_speculator.py."""
    count, inner = config.n_predict, config.inner_dims
    merge = config.emb_dims[0]
    before = [hidden_size, *[inner[-1]] * (count - 1)]
    shapes: Shapes = {f"head.{k}.weight": (vocab_size, inner[-1]) for k in range(count)}
    projections = min(count, 2) if config.tie_weights else count
    if config.method == "sum_lstm":
        shapes |= {f"{gate}_emb.0.weight": (vocab_size, merge) for gate in GATES}
        shapes |= {f"{gate}_proj.{k}.weight": (merge, before[k]) for gate in GATES for k in range(projections)}
        return shapes | _norm("cell_ln.0", merge) | _norm("state_ln.0", merge)
    shapes |= {f"proj.{k}.0.weight": (merge, before[k]) for k in range(projections)}
    for k in range(1 if config.tie_weights else count):
        shapes |= {f"emb.{k}.0.weight": (vocab_size, merge)} | _norm(f"ln.{k}.0", inner[0])
        for i in range(1, len(inner)):
            shapes |= {f"ln.{k}.{3 * i - 1}.weight": (inner[i], inner[i - 1])} | _norm(f"ln.{k}.{3 * i}", inner[i])
    return shapes


def arctic_mlp_name(key: str) -> str:
    """The name of a tensor in `ArcticMLPSpeculator`, which has no index of the layer within a depth's chain."""
    return re.sub(r"^(emb|proj|ln)\.(\d+)\.0\.", r"\1.\2.", key)


def _arctic_mlp_tensors(config: SpeculatorConfig, hidden_size: int, vocab_size: int) -> Shapes:
    """`ArcticMLPSpeculator` of ArcticInference 0.3.0, spec_dec/arctic_speculator.py."""
    return {arctic_mlp_name(key): shape for key, shape in _arctic_tensors(config, hidden_size, vocab_size).items()}


def _medusa_tensors(config: SpeculatorConfig, hidden_size: int, vocab_size: int) -> Shapes:
    """`Medusa` of vLLM 0.24.0, model_executor/models/medusa.py."""
    heads, size = config.n_predict if config.head == "copy" else 1, config.draft_vocab_size
    shapes: Shapes = {f"lm_heads.{k}.weight": (size or vocab_size, hidden_size) for k in range(heads)}
    if size is not None:  # vLLM reads the second and ignores the first
        shapes |= {DRAFT_TO_TARGET: (size,), TOKEN_MAP: (size,)}
    for k in range(config.n_predict):
        for j in range(config.num_layers):
            shapes |= {f"blocks.{k}.layers.{j}.weight": (hidden_size, hidden_size)}
            shapes |= {f"blocks.{k}.layers.{j}.bias": (hidden_size,)}
    return shapes


def _arctic_mlp_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """`emb_dim` is the base model's width here. Tied weights of one depth fail an assertion, and change nothing."""
    changed = {
        "model_type": "mlp_speculator",
        "architectures": [ARCTIC_MLP],
        "emb_dim": content["input_hidden_dim"],
        "tie_weights": content["tie_weights"] and content["n_predict"] > 1,
    }
    return {key: value for key, value in content.items() if key in _MLP_KEYS} | changed


def _draft_model_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """A language model without layers, as vLLM counts them: one module of prediction for each depth."""
    depths = content["n_predict"]
    return {
        "architectures": [DRAFT_MODEL],
        "model_type": "mtp",
        "hidden_size": content["input_hidden_dim"],
        "vocab_size": content["vocab_size"],
        "num_hidden_layers": 0,
        # There is no attention; vLLM wants a number that the number of tensor-parallel workers divides.
        **{"num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 64},
        "num_nextn_predict_layers": depths,
        "n_predict": depths,
        "max_position_embeddings": 2**24,  # the draft has no positions; vLLM takes the smaller one of draft and target
        "torch_dtype": content["torch_dtype"],
        NESTED_KEY: dict(content),
    }


@dataclass(frozen=True)
class EngineFormat:
    """A format for a serving engine and its requirements.

    Attributes:
        engine: name and versions of the engine.
        unsupported_reason: why a configuration cannot be exported, and what to train instead; None if it can.
        weights_file: its file of tensors.
        tensors: from configuration, D and V to the shape of every tensor; None for the checkpoint's own names.
        tensor_name: from a tensor's name in the checkpoint to that in the format.
        content: from a checkpoint's `config.json`, without provenance, to that of the export.
        keys: the keys of that `config.json`; None for the checkpoint's own.
        optional_keys: keys that it may have.
        method: of vLLM's `speculative_config`, for the engine's own drafter; None without one.
        ours: whether `load_speculator` and `SpeculatorProposer` read the format too.
        shares_embedding: whether the engine takes the base model's embedding where the file has none.
        vocabulary_mask: whether the file has the mask of the draft vocabulary, `t2d`.
    """

    engine: str
    unsupported_reason: Callable[[SpeculatorConfig], str | None]
    weights_file: str = WEIGHTS_FILE
    tensors: Callable[[SpeculatorConfig, int, int], Shapes] | None = None
    tensor_name: Callable[[str], str] = str
    content: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    keys: frozenset[str] | None = None
    optional_keys: frozenset[str] = frozenset()
    method: str | None = None
    ours: bool = True
    shares_embedding: bool = False
    vocabulary_mask: bool = False


_MLP_KEYS = frozenset(
    {
        *("architectures", "base_model_archs", "emb_dim", "inner_dim", "model_type", "n_predict", "scale_input"),
        *("tie_weights", "top_k_tokens_per_head", "torch_dtype", "vocab_size"),
    }
)
_MEDUSA_KEYS = frozenset(
    {
        *("architectures", "base_model_archs", "head", "hidden_size", "hidden_state", "inner_dim", "input_hidden_dim"),
        *("medusa_fc_bias", "method", "model_type", "n_predict", "num_heads", "num_hidden_layers", "num_layers"),
        *("torch_dtype", "vocab_size"),
    }
)

FORMATS: Mapping[str, EngineFormat] = MappingProxyType(
    {
        "arctic": EngineFormat(
            ARCTIC,
            arctic_unsupported_reason,
            tensors=_arctic_tensors,
            keys=_MLP_KEYS | {"input_hidden_dim", "method", "proj_dim", "tie_lstm_embs"},
            method="arctic",
        ),
        "arctic-mlp": EngineFormat(
            ARCTIC,
            arctic_mlp_unsupported_reason,
            tensors=_arctic_mlp_tensors,
            tensor_name=arctic_mlp_name,
            content=_arctic_mlp_content,
            keys=_MLP_KEYS,
            method="arctic",
            ours=False,
        ),
        "vllm-medusa": EngineFormat(
            VLLM_MEDUSA,
            medusa_unsupported_reason,
            SAFETENSORS_FILE,
            tensors=_medusa_tensors,
            keys=_MEDUSA_KEYS,
            method="medusa",
            optional_keys=frozenset({"draft_vocab_size", "original_lm_head", "logit_cap", "truncated_vocab_size"}),
        ),
        "vllm": EngineFormat(
            DRAFT_MODEL_ENGINE,
            draft_model_unsupported_reason,
            SAFETENSORS_FILE,
            content=_draft_model_content,
            method="mtp",
        ),
        "vllm-eagle3": EngineFormat(
            VLLM_EAGLE3,
            eagle3.unsupported_reason,
            SAFETENSORS_FILE,
            tensors=eagle3.served_shapes,
            content=eagle3.served_content,
            keys=eagle3.SERVED_KEYS,
            optional_keys=frozenset({"draft_vocab_size"}),
            method="eagle3",
            shares_embedding=True,
            vocabulary_mask=True,
        ),
        "safetensors": EngineFormat("verl_speculator, and " + PROPOSER_ENGINE, lambda config: None, SAFETENSORS_FILE),
    }
)


def shape_faults(shapes: Mapping[str, Sequence[int]], required: Mapping[str, Sequence[int]]) -> list[str]:
    """The tensors that are missing, unexpected, or of another shape than the required one."""
    faults = [f"missing {key}" for key in required if key not in shapes]
    faults += [f"unexpected {key}" for key in shapes if key not in required]
    return faults + [
        f"{key} is {list(shapes[key])}, expected {list(shape)}"
        for key, shape in required.items()
        if key in shapes and list(shapes[key]) != list(shape)
    ]


def first_few(texts: Iterable[str], separator: str = "; ", limit: int = 5) -> str:
    """The first few of several texts, and the number of the others."""
    texts = list(texts)
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return (separator.join(texts[:limit]) or "nothing") + more


def contract_faults(
    name: str, config: SpeculatorConfig, hidden_size: int, vocab_size: int, shapes: Shapes, content: Mapping[str, Any]
) -> list[str]:
    """Differences of tensors and configuration from a format's requirements, which no engine checks completely.

    Args:
        name: a key of `FORMATS`.
        config: family and shape.
        hidden_size: D.
        vocab_size: V.
        shapes: of every tensor.
        content: of `config.json`, without provenance.
    """
    form, faults = FORMATS[name], []
    if form.tensors is not None:
        faults += shape_faults(shapes, form.tensors(config, hidden_size, vocab_size))
    if form.keys is not None:
        faults += [f"config.json has no {key}" for key in sorted(form.keys - content.keys())]
        faults += [f"config.json has {key}" for key in sorted(content.keys() - form.keys - form.optional_keys)]
    return faults
