"""EAGLE-3 drafts of other programs as a checkpoint.

Read from SafeAILab/EAGLE's and SpecForge's format, which vLLM reads too, and from speculators 0.9.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from verl_speculator.base_model.loading import base_shape
from verl_speculator.checkpoint.format import DRAFT_TO_TARGET, DRAFT_TOKENS, TARGET_TO_DRAFT, vocabulary_mask
from verl_speculator.config.families import BASE_FROZEN, OWN
from verl_speculator.config.schema import NUM_AUX_LAYERS, ROPE_TYPES, LayerShape, SpeculatorConfig, as_written
from verl_speculator.interop.eagle3 import AUX_LAYERS, layer_prefix, served_shapes
from verl_speculator.interop.engine_formats import first_few, shape_faults
from verl_speculator.interop.key_maps import AUTO
from verl_speculator.interop.source import (
    COUNT,
    TRUTH,
    Accepted,
    Contents,
    TensorFile,
    base_config,
    dtype_name,
)
from verl_speculator.utils.settings import UserError, one_line

if TYPE_CHECKING:
    import torch

    from verl_speculator.interop.convert import ConvertSettings

EAGLE3, SPECULATORS = FORMATS = ("eagle3", "speculators")
LAYER_KEY, MODEL_TYPE_KEY, RESIDUAL_KEY = "transformer_layer_config", "speculators_model_type", "norm_before_residual"
IN_PARALLEL = "it drafts in parallel, and eagle3 here one token after the other"
# Settings that change the arithmetic: why a value that is set is refused.
UNSUPPORTED = {
    "norm_before_fc": "it normalises the three states together, and eagle3 here none of them",
    "fc_norm": "it normalises each of the three states, and eagle3 here none of them",
    "norm_output": "it feeds normalised states back, and eagle3 here the states themselves",
    "attention_bias": "its attention has biases, and that of eagle3 here none",
    "mlp_bias": "its MLP has biases, and that of eagle3 here none",
    **dict.fromkeys(("parallel_drafting", "pard_token", "ptd_token_id"), IN_PARALLEL),
}
MASK = "mask_hidden"  # a state in place of those that parallel drafting does not have
SETTINGS: Mapping[str, Accepted] = MappingProxyType(
    {
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "draft_vocab_size"), COUNT),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim"), COUNT),
        RESIDUAL_KEY: TRUTH,
        "hidden_act": ("silu",),
        "model_type": ("llama",),
        "use_aux_hidden_state": (True,),
        "logit_scale": (
            lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0,
            "a number above 0",
        ),
    }
)
# What transformers knows of a Llama's layers.
LLAMA = (
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
)
IGNORED = ("verifier_norm.weight", "verifier_lm_head.weight")  # the base model's


def eagle3_format(name: str, source: TensorFile) -> str | None:
    """The one of FORMATS that a file has by its config.json or its tensors, or that `name` says; None for neither."""
    if name != AUTO:
        return name if name in FORMATS else None
    if MODEL_TYPE_KEY in source.config or LAYER_KEY in source.config:
        return SPECULATORS
    architectures = source.config.get("architectures")
    named = any("eagle3" in str(each).lower() for each in architectures) if isinstance(architectures, list) else False
    return EAGLE3 if named or "fc.weight" in source.tensors else None


def read_eagle3(settings: ConvertSettings, source: TensorFile) -> Contents:
    """An EAGLE-3 draft of a file. Raises UserError for settings that eagle3 here does not have, tensors that are
    missing, unexpected or do not fit config.json, a draft vocabulary that does not fit the head, or another base."""
    import torch

    from verl_speculator.models import build_speculator

    name = eagle3_format(settings.format, source)
    for option, default in (("hidden_state", None), ("first_offset", 2)):
        if (value := getattr(settings, option)) != default:
            raise UserError(f"{option}={value}: {source.file} holds an EAGLE-3 draft; the option is for Medusa heads")
    stated = _stated(name, source)
    width, vocab, layers = stated["hidden_size"], stated["vocab_size"], stated["num_hidden_layers"]
    if settings.base is not None:
        base_width, base_vocab = base_shape(settings.base)
        for key, size, base_size in (("hidden_size", width, base_width), ("vocab_size", vocab, base_vocab)):
            if size != base_size:
                raise UserError(f"base={settings.base}: {key} {base_size}, {source.file} holds a draft of {key} {size}")
    tensors = _tensors(source, layers)
    head_size = stated.get("draft_vocab_size", vocab)
    tokens = _draft_tokens(source, tensors, head_size, vocab)
    config = SpeculatorConfig(
        method="eagle3",
        n_predict=settings.n_predict or stated["n_predict"],
        draft_vocab_size=None if tokens is None else head_size,
        num_layers=layers,
        aux_layers=_aux_layers(source, stated.get(AUX_LAYERS), settings.base),
        embedding=OWN if "embed_tokens.weight" in tensors else BASE_FROZEN,
        head=OWN,
        norm_before_residual=stated[RESIDUAL_KEY],
        layer=stated["layer"],
    )
    required = served_shapes(config, width, vocab)
    required = {key: shape for key, shape in required.items() if key not in (DRAFT_TO_TARGET, TARGET_TO_DRAFT)}
    if faults := shape_faults({key: tuple(tensor.shape) for key, tensor in tensors.items()}, required):
        raise UserError(f"{source.file}: no EAGLE-3 draft of {source.config_file}: {first_few(faults)}")

    floats = [key for key in source.tensors if _our_name(key, layers) in tensors]
    dtype = source.choose_dtype(floats, settings.dtype)
    scale = stated.get("logit_scale", 1)
    if scale != 1:
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head.to(torch.promote_types(head.dtype, torch.float32)) * scale
    slots = build_speculator(config, hidden_size=width, vocab_size=vocab, device="meta").checkpoint_slots()
    state = {slots[key].parameter: source.cast(key, tensor, dtype) for key, tensor in tensors.items()}
    return Contents(
        format=name,
        described=f"num_layers={layers}, draft_vocab_size={config.draft_vocab_size}, aux_layers={config.aux_layers}",
        config=config,
        hidden_size=width,
        vocab_size=vocab,
        dtype=dtype,
        state=state if tokens is None else state | {DRAFT_TOKENS: tokens},
        base_name=stated["base_name"],
        record={} if scale == 1 else {"logit_scale": scale},
    )


def _stated(name: str, source: TensorFile) -> dict[str, Any]:
    """The settings of config.json in one mapping, checked one by one, with `n_predict` and `base_name`, which may be
    None."""
    if not source.config:
        raise UserError(f"{source.file}: an EAGLE-3 draft without {source.config_file}, which has its shape")
    nested, proposal, verifier = {}, {}, {}
    if name == SPECULATORS:
        kind = source.config.get(MODEL_TYPE_KEY, "eagle3")
        if kind != "eagle3":
            raise UserError(f"{source.config_file}: {MODEL_TYPE_KEY}={kind}: expected eagle3")
        nested = _object(source, source.config, LAYER_KEY)
        more = _object(source, source.config, "speculators_config")
        proposal, verifier = (more.get("proposal_methods") or [{}])[0], _object(source, more, "verifier")
    stated = {**source.config, **nested, **_object(source, source.config, "eagle_config")}
    stated = {key: value for key, value in stated.items() if value is not None}
    source.check_settings(SETTINGS, stated)
    for key, reason in UNSUPPORTED.items():
        if stated.get(key, False) is not False:
            raise UserError(f"{source.config_file}: {key}={as_written(stated[key])}: {reason}")
    if stated.get("target_hidden_size", stated.get("hidden_size")) != stated.get("hidden_size"):
        raise UserError(
            f"{source.config_file}: target_hidden_size={stated['target_hidden_size']}: expected hidden_size, "
            f"{stated.get('hidden_size')}: eagle3 here is as wide as its base model"
        )
    if "sliding_attention" in stated.get("layer_types", ()):
        raise UserError(
            f"{source.config_file}: layer_types={stated['layer_types']}: eagle3 here attends to the whole text"
        )
    if RESIDUAL_KEY not in stated and name == SPECULATORS:
        # speculators takes a missing one for false, vLLM for true.
        raise UserError(f"{source.config_file}: {RESIDUAL_KEY} is missing; expected true or false")
    proposed = {"n_predict": proposal.get("speculative_tokens"), "base_name": verifier.get("name_or_path")}
    return {RESIDUAL_KEY: False} | stated | _llama(source, stated) | proposed


def _object(source: TensorFile, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of config.json, empty if it is not there."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{source.config_file}: {key}={value}: expected an object")
    return value


def _llama(source: TensorFile, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the layers, with transformers' values of those that are not stated: speculators writes only
    those that differ. The `layer` among them is that of `SpeculatorConfig`."""
    from transformers import LlamaConfig

    try:
        llama = LlamaConfig(**{key: stated[key] for key in LLAMA if key in stated})
    except Exception as error:  # of transformers' own checks, which have no common class
        raise UserError(f"{source.config_file}: no configuration of a Llama: {one_line(error)}") from None
    rope = llama.rope_parameters
    kind, part = rope.get("rope_type"), rope.get("partial_rotary_factor", 1)
    if kind not in ROPE_TYPES or part != 1 or "mrope_section" in rope:
        raise UserError(
            f"{source.config_file}: rope_parameters={rope}: expected rope_type {', '.join(ROPE_TYPES)}, whole heads"
        )
    sizes = ("hidden_size", "vocab_size", "num_hidden_layers")
    return {key: getattr(llama, key) for key in sizes} | {"layer": asdict(LayerShape.of(llama))}


def _tensors(source: TensorFile, layers: int) -> dict[str, torch.Tensor]:
    """The tensors by our names, without those that are the base model's."""
    if MASK in source.tensors:
        raise UserError(f"{source.file}: {MASK}: a draft in parallel, and eagle3 here drafts one token after the other")
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in source.tensors.items():
        if key in IGNORED or key.endswith("rotary_emb.inv_freq"):
            continue
        name = _our_name(key, layers)
        if name in tensors:
            raise UserError(f"{source.file}: holds {name} under two names; expected one of them")
        tensors[name] = tensor
    return tensors


def _our_name(key: str, layers: int) -> str:
    """The first layer is `midlayer` or `layers.0` elsewhere."""
    first = next((prefix for prefix in ("midlayer.", "layers.0.") if key.startswith(prefix)), None)
    return key if first is None else f"{layer_prefix(0, layers)}.{key.removeprefix(first)}"


def _aux_layers(source: TensorFile, stated: Any, base: str | None) -> list[int]:
    """The layers whose inputs the draft reads: those of config.json, or the base model's usual ones."""
    count = None if base is None else base_config(base).get_text_config().num_hidden_layers
    if stated is None and count is None:
        raise UserError(
            f"{source.config_file}: no {AUX_LAYERS}: the usual layers 2, L//2 and L-3 of the base's L are meant; "
            "expected --base"
        )
    layers = [2, count // 2, count - 3] if stated is None else stated
    where = f"{source.config_file}: {AUX_LAYERS}={layers}"
    numbers = isinstance(layers, list) and all(isinstance(layer, int) and layer >= 0 for layer in layers)
    if not numbers or len(layers) != NUM_AUX_LAYERS or sorted(set(layers)) != layers:
        raise UserError(f"{where}: expected three layers, ascending")
    if count is not None and layers[-1] > count:
        raise UserError(f"{where}: {base} has {count} layers; expected 0 to {count}")
    return layers


def _draft_tokens(source: TensorFile, tensors: dict[str, torch.Tensor], size: int, vocab: int) -> torch.Tensor | None:
    """[V′] the tokens of the draft vocabulary, None where it is the whole vocabulary. Takes d2t and t2d out of the
    tensors."""
    import torch

    offsets, mask = tensors.pop(DRAFT_TO_TARGET, None), tensors.pop(TARGET_TO_DRAFT, None)
    if offsets is None:
        if size != vocab:
            raise UserError(
                f"{source.file}: no {DRAFT_TO_TARGET}: {source.config_file} says draft_vocab_size={size} of {vocab} "
                "tokens, and which they are is not known"
            )
        offsets = torch.zeros(size, dtype=torch.long)
    if offsets.is_floating_point() or offsets.dtype == torch.bool or tuple(offsets.shape) != (size,):
        actual = f"{list(offsets.shape)} of {dtype_name(offsets.dtype)}"
        raise UserError(f"{source.file}: {DRAFT_TO_TARGET} is {actual}, expected [{size}] of int64")
    tokens = offsets.long() + torch.arange(size)
    outside = (tokens < 0) | (tokens >= vocab)
    for is_wrong, reason in (
        (outside, f"expected 0 to {vocab - 1}"),
        (tokens.diff() <= 0, "expected ascending tokens"),
    ):
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0]) + size - len(is_wrong)
            raise UserError(f"{source.file}: {DRAFT_TO_TARGET}: row {row} stands for token {tokens[row]}; {reason}")
    if mask is not None and not torch.equal(mask.bool(), vocabulary_mask(tokens, vocab)):
        raise UserError(f"{source.file}: {TARGET_TO_DRAFT} names other tokens than {DRAFT_TO_TARGET}")
    return None if size == vocab else tokens
