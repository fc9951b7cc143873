"""Loading a base model: its weights (as stored, in 4 bits, or from a GGUF file), tokenizer, device and dtype.

The module imports neither torch nor transformers before a function needs them.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from verl_speculator.base_model.chat_template import end_token_ids, ensure_chat_template
from verl_speculator.utils.process import cpu_computes_bf16
from verl_speculator.utils.settings import UserError, nearest, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
# Layer types of transformers' configurations that keep keys and values, or nothing; every other one has a state.
STATELESS_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense", "moe"}
QUANTIZATIONS = ("bnb4",)
# The package that each setting needs, and the extra of this package that installs it.
PACKAGES = {"quantization": ("bitsandbytes", "bnb"), "gguf_file": ("gguf", "gguf")}
PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class BaseModelFormat:
    """How the weights of a base model are stored and held.

    Attributes:
        quantization: `bnb4` holds the matrices of the decoder layers in 4 bits (bitsandbytes' NF4); embedding, norms
            and LM head are not quantized. None quantizes nothing.
        gguf_file: name of a GGUF file in the base model's directory or hub repository. Weights, configuration and
            tokenizer are read from it; its tensors are dequantized.
    """

    quantization: str | None = None
    gguf_file: str | None = None

    def check(self, prefix: str = "", *, frozen: bool = True) -> None:
        """Check the two settings against each other and that their packages are installed. Reads no file.

        `prefix` is that of the settings' names, `model.` in training; a base model that is trained is not `frozen`.
        Raises UserError naming the setting.
        """
        given = {name: f"{prefix}{name}={getattr(self, name)}" for name in PACKAGES if getattr(self, name) is not None}
        if self.is_quantized and self.quantization not in QUANTIZATIONS:
            expected = f"{', '.join(QUANTIZATIONS)} or null{nearest(str(self.quantization), QUANTIZATIONS)}"
            raise UserError(f"{given['quantization']}: expected {expected}")
        if "gguf_file" in given and not str(self.gguf_file).endswith(".gguf"):
            raise UserError(f"{given['gguf_file']}: expected the name of a .gguf file inside the base's directory")
        if len(given) > 1:
            names = ", ".join(given.values())
            raise UserError(f"{names}: a GGUF file defines its own quantization; expected one of the two")
        for name, setting in given.items():
            if name == "quantization" and not frozen:
                expected = f"{prefix}freeze_base_model=true"
                raise UserError(f"{setting}: a base in 4 bits cannot be trained; expected {expected}")
            package, extra = PACKAGES[name]
            if importlib.util.find_spec(package) is None:
                expected = f"pip install 'verl_speculator[{extra}]'"
                raise UserError(f"{setting}: the package {package} is not installed; expected: {expected}")

    def check_file(self, base: str | Path, prefix: str = "") -> None:
        """Check that the GGUF file is in the base model's directory. Files of a hub repository are not looked up.
        Raises UserError naming the file and the GGUF files that are there."""
        directory = Path(base).expanduser()
        if self.gguf_file is None or not directory.is_dir():
            return
        setting = f"{prefix}gguf_file={self.gguf_file}"
        if not (directory / self.gguf_file).is_file():
            existing = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
            raise UserError(f"{setting}: no such file in {directory}; its *.gguf: {existing}")
        if PART_OF_SEVERAL.search(self.gguf_file):
            advice = "join them with llama.cpp's llama-gguf-split --merge"
            raise UserError(f"{setting}: one part of several, transformers reads whole files; {advice}")

    @property
    def is_quantized(self) -> bool:
        """Whether the model must stay whole on one device: 4-bit weights cannot be sharded, cast or broadcast."""
        return self.quantization is not None

    def name_of(self, base: str | Path) -> str:
        """A base model in this format for messages: `DIR`, `DIR/file.gguf`, `DIR (bnb4)`."""
        file = "" if self.gguf_file is None else f"/{self.gguf_file}"
        return f"{base}{file} ({self.quantization})" if self.is_quantized else f"{base}{file}"

    @property
    def read_options(self) -> dict[str, Any]:
        """Options of `from_pretrained` for a configuration or tokenizer."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    def load(self, auto_class: Any, base: str | Path, *, dtype: torch.dtype, device: Any, **options: Any) -> nn.Module:
        """Load the model: on `device` if it is quantized, since it can be neither moved nor cast; else on the CPU.

        `auto_class` is one of transformers, `options` are more of its `from_pretrained`, and `dtype` is that of the
        weights that are not quantized, and of the products with those that are. Raises UserError if it cannot be
        loaded.
        """
        options |= {"dtype": dtype} | self.read_options
        if self.is_quantized:
            if dtype.itemsize > 4:
                raise UserError(f"dtype={dtype}: quantization={self.quantization} takes fp32, bf16, fp16")
            from transformers import BitsAndBytesConfig

            nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
            options |= {"quantization_config": nf4, "device_map": {"": device}}
        from safetensors import SafetensorError

        try:
            model = auto_class.from_pretrained(base, **options)
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise UserError(f"base={self.name_of(base)}: cannot be loaded: {one_line(error)}") from None
        if self.is_quantized:
            from bitsandbytes.nn import Linear4bit

            # On processors with AVX512-BF16 bitsandbytes packs matrices into tiles; the product of one that does not
            # fill them, such as a gate with one output, fails.
            for module in model.modules():
                if isinstance(module, Linear4bit) and (module.out_features % 32 or module.in_features % 64):
                    module.support_avx512bf16_for_cpu = False
        return model

    def read_tokenizer(self, base: str | Path, **options: Any) -> Any:
        """Read the tokenizer; options and exceptions are those of `AutoTokenizer.from_pretrained`."""
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, **self.read_options, **options)
        if self.gguf_file is not None:
            # transformers takes a tokenizer's special tokens from its class, and a configuration's from the file.
            config = AutoConfig.from_pretrained(base, **self.read_options)
            for role in ("bos", "eos", "pad"):
                if (token := getattr(config, f"{role}_token_id", None)) is not None:
                    setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
        return tokenizer

    def read_generation_config(self, base: str | Path, hf_config: Any) -> Any:
        """Read the generation configuration without loading the model: its file, else what `hf_config` implies."""
        from transformers import GenerationConfig

        with suppress(OSError, ValueError):
            if self.gguf_file is None:
                return GenerationConfig.from_pretrained(base)
        return GenerationConfig.from_model_config(hf_config)

    def write_description(self, base: str | Path, folder: Path) -> None:
        """Write configuration and tokenizer of a GGUF file as a directory, for readers that accept only these."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = AutoConfig.from_pretrained(base, **self.read_options)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)
        self.read_tokenizer(base).save_pretrained(folder)


UNQUANTIZED = BaseModelFormat()


@dataclass
class BaseModelLoader:
    """A base model whose device, dtype and configuration are checked, and whose weights are not read yet.

    Args:
        base: directory or hub name. No code from it is run.
        device, dtype: as for `choose_device` and `choose_dtype`; the attributes are what these return.
        form: how its weights are stored and held.

    Raises:
        UserError: for a device or dtype that does not exist, or if there is no model.
    """

    base: str | Path
    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    form: BaseModelFormat = UNQUANTIZED

    def __post_init__(self) -> None:
        self.device = choose_device(self.device)
        self.dtype = choose_dtype(self.dtype, self.device)
        self.config = read_config(self.base, self.form)

    @cached_property
    def tokenizer(self) -> Any:
        """As `load_tokenizer`."""
        return load_tokenizer(self.base, self.form)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """As `chat_template.end_token_ids`."""
        return end_token_ids(self.tokenizer, self.form.read_generation_config(self.base, self.config))

    def load(self) -> nn.Module:
        """As `load_base`, for speculative decoding: raises UserError as `check_rollback`, and computes faster on a CPU
        (`cpu.optimize_for_cpu`)."""
        from verl_speculator.base_model.cpu import optimize_for_cpu

        check_rollback(str(self.base), causal_lm_class(self.config), self.config)
        model = load_base(self.base, device=self.device, dtype=self.dtype, form=self.form)
        if self.device == "cpu":
            optimize_for_cpu(model)
        return model


def load_base(base: str | Path, *, device: str, dtype: torch.dtype, form: BaseModelFormat = UNQUANTIZED) -> nn.Module:
    """A causal language model in evaluation mode, without gradients. Raises UserError if it cannot be loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    # The grouped product of transformers' default experts is not implemented for float64.
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = form.load(AutoModelForCausalLM, base, dtype=dtype, device=device, trust_remote_code=False, **options)
    model = model if form.is_quantized else model.to(device)
    return model.eval().requires_grad_(False)


def load_tokenizer(base: str | Path, form: BaseModelFormat = UNQUANTIZED) -> Any:
    """A base model's tokenizer, with the default chat template if it has none. Raises UserError if there is none."""
    check_base_name(base)
    try:
        tokenizer = form.read_tokenizer(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base={form.name_of(base)}: no tokenizer: {one_line(error)}") from None
    ensure_chat_template(tokenizer)
    return tokenizer


def choose_device(device: str) -> str:
    """Resolve `auto` to the accelerator if there is one. Raises UserError for a device that this machine lacks."""
    import torch

    is_available = torch.accelerator.is_available()
    available = torch.accelerator.current_accelerator().type if is_available else "cpu"
    if device == "auto":
        return available
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: expected auto, cpu, or an accelerator such as cuda") from None
    if kind not in ("cpu", available):
        raise UserError(f"device={device}: not on this machine (it has {available if is_available else 'cpu alone'})")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Resolve a key of DTYPES, and `auto` to bf16, or fp32 on a CPU without instructions for bf16. Raises UserError for
    another name."""
    import torch

    if dtype == "auto":
        dtype = "fp32" if device == "cpu" and not cpu_computes_bf16() else "bf16"
        if device == "cpu":
            has_bf16 = "this CPU computes it faster than fp32 (--dtype fp32)"
            logger.info("dtype %s: %s", dtype, has_bf16 if dtype == "bf16" else "this CPU has no instructions for bf16")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return getattr(torch, DTYPES[dtype])


def check_base_name(base: str | Path) -> None:
    """Reject the path of a directory that does not exist, for which a hub would be asked in vain. Raises UserError
    naming the directory."""
    path, text = Path(base).expanduser(), str(base)
    is_path = text.startswith((".", "/", "~")) or text.count("/") != 1 or path.parent.is_dir()
    if is_path and "/" in text and not path.is_dir():
        raise UserError(f"base={base}: no such directory; expected one, or a hub name such as Qwen/Qwen2.5-0.5B")


def check_hub(setting: str, name: str, file: str = "config.json") -> None:
    """Refuse a hub name that can neither be read from this machine's cache nor be downloaded, at once: the hub's own
    library tries for half a minute. Where a proxy is set, the library itself has to find out.

    Raises:
        UserError: beginning with `setting`.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(name).exists() or isinstance(try_to_load_from_cache(name, file), str):
        return
    missing = f"{setting}: no such directory, and not in the hub's cache on this machine"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{missing}, while HF_HUB_OFFLINE forbids to download it; expected a directory, or to unset that"
        )
    if getproxies():
        return
    url = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError as error:
        reason = f"{url.hostname} cannot be reached ({error.strerror or error})"
        raise UserError(f"{missing}, and {reason}; expected a directory, or a connection") from None


def read_config(base: str | Path, form: BaseModelFormat = UNQUANTIZED) -> Any:
    """Read the Hugging Face configuration of a directory or hub name. Raises UserError if there is none."""
    check_base_name(base)
    form.check_file(base)
    check_hub(f"base={base}", str(base), form.gguf_file or "config.json")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False, **form.read_options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base={base}: no model there: {one_line(error, 200)}") from None


def base_shape(base: Any, form: BaseModelFormat = UNQUANTIZED) -> tuple[int, int]:
    """(D, V) of a base model given as a model, a Hugging Face configuration, a directory or a hub name."""
    if hasattr(base, "get_output_embeddings"):
        return base.config.get_text_config().hidden_size, base.get_output_embeddings().weight.shape[0]
    text_config = (read_config(base, form) if isinstance(base, (str, Path)) else base).get_text_config()
    return text_config.hidden_size, text_config.vocab_size


def base_path(base: Any) -> str:
    """Where a model or a Hugging Face configuration was read from, empty if it was not read; a path as it is."""
    return str(base) if isinstance(base, (str, Path)) else getattr(base, "config", base).name_or_path


def causal_lm_class(config: Any) -> Any:
    """transformers' causal language model for a configuration, None if it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def check_language_model(setting: str, config: Any) -> None:
    """Reject models that transformers loads only as models of images and text: their positions have several
    components, and the datasets and commands of this package do not have their inputs. Raises UserError, beginning
    with `setting`, for the Hugging Face configuration of such a model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and causal_lm_class(config) is None:
        what = f"{config.model_type} is a model of images and text"
        raise UserError(f"{setting}: {what}; expected a causal language model")


def check_frozen_type(model_dtype: str, param_dtype: str) -> None:
    """Check that a frozen base model is held (verl's `engine.model_dtype`) in the dtype that it computes in (verl's
    `engine.mixed_precision.param_dtype`). Otherwise its sharding units cast every parameter that they gather, those
    that it keeps in fp32 included. Raises UserError if they differ."""
    if DTYPES.get(model_dtype, model_dtype) != DTYPES.get(param_dtype, param_dtype):
        reason = "a frozen base is held in the type that it computes in, engine.mixed_precision.param_dtype is"
        expected = f"expected auto or {param_dtype}"
        raise UserError(f"engine.model_dtype={model_dtype}: {reason} {param_dtype}; {expected}")


def supported_attention(config: Any, wanted: str) -> str:
    """An `attn_implementation` that the base model supports: the wanted one, else sdpa, else eager. For an architecture
    that transformers does not know it is the wanted one."""
    model_class = causal_lm_class(config)
    checked = {"flash_attention_2": "_supports_flash_attn", "sdpa": "_supports_sdpa"}
    if model_class is None or wanted not in checked or getattr(model_class, checked[wanted]):
        return wanted
    return "sdpa" if model_class._supports_sdpa else "eager"


def check_rollback(base: str, model_class: type | None, config: Any) -> None:
    """Reject a base model with recurrent layers, by a UserError that begins with its name: their state cannot be rolled
    back after a rejected draft. An architecture that transformers does not know (`model_class` None) passes."""
    if model_class is None:
        return
    text_config = config.get_text_config()
    # Not every architecture with recurrent layers is marked as stateful.
    layers = getattr(text_config, "layer_types", None) or getattr(text_config, "layers_block_type", None) or ()
    recurrent = sorted(set(layers) - STATELESS_LAYERS)
    if getattr(model_class, "_is_stateful", False) or recurrent:
        named = f" (layers of {recurrent[0]})" if recurrent else ""
        what = f"its recurrent state cannot be rolled back after a rejected draft{named}"
        raise UserError(f"base={base} ({model_class.__name__}): {what}; expected a base with attention layers only")
