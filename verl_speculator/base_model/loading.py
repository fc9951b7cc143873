"""In which form a base is held: as its weights lie, in 4 bits, or read from a GGUF file. Imports no torch by itself."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn


# Kinds of layers, as configurations list them, that keep keys and values or nothing at all. All others keep a state.
ROLLED_BACK = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense", "moe"}
)
QUANTIZATIONS = ("bnb4",)
# The package that each setting needs, and the extra of ours that brings it.
PACKAGES = {"quantization": ("bitsandbytes", "bnb"), "gguf_file": ("gguf", "gguf")}
# verl's long names of types.
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class BaseModelFormat:
    """The one place that knows what transformers is asked for.

    Attributes:
        quantization: `bnb4` holds the matrices of the layers in 4 bits, as bitsandbytes' NF4; embedding, norms and
            output head stay as they are. None leaves everything as it lies.
        gguf_file: a GGUF file's name inside the base's directory or hub repository. Weights, configuration and
            tokenizer come from it; its tensors are dequantised as they are read.
    """

    quantization: str | None = None
    gguf_file: str | None = None

    def check(self, prefix: str = "", *, frozen: bool = True) -> None:
        """Whether the values make sense and the packages that they need are there. Reads no file.

        Args:
            prefix: of the settings' names, `model.` in training.
            frozen: whether the base keeps its weights.

        Raises:
            UserError: naming the setting.
        """
        word, file = self.quantization, self.gguf_file
        if word is not None and word not in QUANTIZATIONS:
            hint = nearest(str(word), QUANTIZATIONS)
            raise UserError(f"{prefix}quantization={word}: expected {', '.join(QUANTIZATIONS)} or null{hint}")
        if file is not None and (not isinstance(file, str) or not file.endswith(".gguf")):
            raise UserError(f"{prefix}gguf_file={file}: expected the name of a .gguf file inside the base's directory")
        if word is not None and file is not None:
            raise UserError(
                f"{prefix}quantization={word}, {prefix}gguf_file={file}: a GGUF file says itself how its tensors are "
                "held; expected one of the two"
            )
        if word is not None and not frozen:
            raise UserError(
                f"{prefix}quantization={word}: a base in 4 bits cannot be trained; "
                f"expected {prefix}freeze_base_model=true"
            )
        for setting, (package, extra) in PACKAGES.items():
            value = getattr(self, setting)
            if value is not None and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"{prefix}{setting}={value}: the package {package} is not installed; "
                    f"expected: pip install 'verl_speculator[{extra}]'"
                )

    def check_file(self, base: str | Path, prefix: str = "") -> None:
        """Whether the GGUF file lies where it is looked for. What a hub has is not asked.

        Raises:
            UserError: naming the file, and those that there are.
        """
        directory = Path(base).expanduser()
        if self.gguf_file is None or not directory.is_dir():
            return
        setting = f"{prefix}gguf_file={self.gguf_file}"
        if not (directory / self.gguf_file).is_file():
            there = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "none"
            raise UserError(f"{setting}: no such file in {directory}; its *.gguf: {there}")
        if PART_OF_SEVERAL.search(self.gguf_file):
            raise UserError(
                f"{setting}: one part of several, transformers reads whole files; join them with llama.cpp's "
                "llama-gguf-split --merge"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether it stays whole on one device: what is held in 4 bits cannot be cut, cast or sent like a tensor."""
        return self.quantization is not None

    def name_of(self, base: str | Path) -> str:
        """A base of this form as people read it: `DIR`, `DIR/file.gguf`, `DIR (bnb4)`."""
        name = str(base) if self.gguf_file is None else f"{base}/{self.gguf_file}"
        return name if self.quantization is None else f"{name} ({self.quantization})"

    @property
    def reading(self) -> dict[str, Any]:
        """Options of `from_pretrained` of a configuration or tokenizer."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    def load(self, auto_class: Any, base: str | Path, *, dtype: torch.dtype, device: Any, **options: Any) -> nn.Module:
        """The base in this form: in 4 bits on `device`, else on the host.

        Args:
            auto_class: of transformers, `AutoModelForCausalLM` or another.
            base: a directory or hub name.
            dtype: of what is not held in 4 bits, and of the products with what is.
            device: where a base in 4 bits is put: it is quantised there, and cannot be cast afterwards.
            options: more of `from_pretrained`.

        Raises:
            UserError: if it cannot be loaded.
        """
        options |= {"dtype": dtype} | self.reading
        if self.quantization is not None:
            if dtype.itemsize > 4:
                raise UserError(f"dtype={dtype}: quantization={self.quantization} takes fp32, bf16, fp16")
            from transformers import BitsAndBytesConfig

            nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
            options |= {"quantization_config": nf4, "device_map": {"": device}}
        from safetensors import SafetensorError

        try:
            model = auto_class.from_pretrained(base, **options)
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise UserError(f"base={self.name_of(base)}: cannot be loaded: {_one_line(error)}") from None
        if self.quantization is not None:
            _leave_odd_shapes_unpacked(model)
        return model

    def read_tokenizer(self, base: str | Path, **options: Any) -> Any:
        """The base's tokenizer. Raises whatever transformers does where there is none."""
        from transformers import AutoConfig, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, **self.reading, **options)
        if self.gguf_file is not None:
            # transformers gives the tokenizer its class's own special tokens; those of the file it tells the
            # configuration alone.
            config = AutoConfig.from_pretrained(base, **self.reading)
            for role in ("bos", "eos", "pad"):
                token = getattr(config, f"{role}_token_id", None)
                if token is not None:
                    setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
        return tokenizer

    def read_generation_config(self, base: str | Path, hf_config: Any) -> Any:
        """The base model's generation config without loading it: its file, else what its configuration says.

        Args:
            base: a directory or hub name.
            hf_config: the base model's configuration, read in this form.
        """
        from transformers import GenerationConfig

        if self.gguf_file is None:
            try:
                return GenerationConfig.from_pretrained(base)
            except (OSError, ValueError):
                pass
        return GenerationConfig.from_model_config(hf_config)

    def write_description(self, base: str | Path, folder: Path) -> None:
        """Configuration and tokenizer of a GGUF file as files, for who reads folders only."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = AutoConfig.from_pretrained(base, **self.reading)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)
        self.read_tokenizer(base).save_pretrained(folder)


UNQUANTIZED = BaseModelFormat()


def check_language_model(setting: str, config: Any) -> None:
    """Whether the base is a causal language model, as far as transformers knows.

    A model of images and text has positions of several parts and inputs that neither the data nor the commands here
    know. Those that transformers can also load as language models pass, and so does what it does not know.

    Args:
        setting: name and value as the user gave them, for the message.
        config: a Hugging Face configuration.

    Raises:
        UserError: for a model of images and text alone.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{setting}: {config.model_type} is a model of images and text; expected a causal language model"
        )


def check_frozen_type(model_dtype: str, param_dtype: str) -> None:
    """Whether a frozen base is held in the type that it computes in. In another one its sharding units would cast all
    that they gather, and with it what the base keeps in fp32.

    Args:
        model_dtype: verl's `engine.model_dtype`.
        param_dtype: verl's `engine.mixed_precision.param_dtype`.

    Raises:
        UserError: if it is not.
    """
    if SHORT.get(model_dtype, model_dtype) != SHORT.get(param_dtype, param_dtype):
        raise UserError(
            f"engine.model_dtype={model_dtype}: a frozen base is held in the type that it computes in, "
            f"engine.mixed_precision.param_dtype is {param_dtype}; expected auto or {param_dtype}"
        )


def supported_attention(config: Any, wanted: str) -> str:
    """The implementation of attention that a base has: the one wanted, or else sdpa, or eager, which all have.

    Args:
        config: a Hugging Face configuration. What transformers does not know keeps what is wanted.
        wanted: as in `attn_implementation`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return wanted
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    supported = {"flash_attention_2": model_class._supports_flash_attn, "sdpa": model_class._supports_sdpa}
    if supported.get(wanted, True):
        return wanted
    return "sdpa" if supported["sdpa"] else "eager"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _leave_odd_shapes_unpacked(model: nn.Module) -> None:
    """For processors with AVX512-BF16 bitsandbytes packs matrices in blocks, and fails on those that do not fill them,
    such as a gate with one output: they take its general way."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and (module.out_features % 32 or module.in_features % 64):
            module.support_avx512bf16_for_cpu = False


def check_base_name(base: str | Path) -> None:
    """Refuse what can only be a directory, and is none: a hub would be asked for it in vain, and for a long time.

    Raises:
        UserError: naming the directory.
    """
    path, text = Path(base).expanduser(), str(base)
    local = text.startswith((".", "/", "~")) or text.count("/") != 1 or path.parent.is_dir()
    if local and "/" in text and not path.is_dir():
        raise UserError(
            f"base={base}: no such directory; expected one, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct"
        )


def base_shape(base: Any, form: BaseModelFormat = UNQUANTIZED) -> tuple[int, int]:
    """(D, V) of a base given as a model, a Hugging Face configuration, or the path or name of one in this form."""
    if isinstance(base, (str, Path)):
        check_base_name(base)
        form.check_file(base)
        from transformers import AutoConfig

        try:
            base = AutoConfig.from_pretrained(base, **form.reading)
        except (OSError, ValueError) as error:
            raise UserError(f"base={base}: no model there: {' '.join(str(error).split())[:200]}") from None
    if hasattr(base, "get_output_embeddings"):
        return base.config.get_text_config().hidden_size, base.get_output_embeddings().weight.shape[0]
    text_config = base.get_text_config()
    return text_config.hidden_size, text_config.vocab_size


def base_path(base: Any) -> str:
    """Where a model or a Hugging Face configuration was read from, empty if it was made in memory."""
    return (base.config if hasattr(base, "get_output_embeddings") else base).name_or_path


def base_architectures(base: str | Path) -> tuple[str, ...]:
    """`architectures` of the base at a path or of a hub name, as in its `config.json`."""
    from transformers import AutoConfig

    return tuple(AutoConfig.from_pretrained(base).architectures or ())


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def choose_device(device: str) -> str:
    """`auto` is the accelerator if there is one.

    Raises:
        UserError: for a device that is not there.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "auto":
        return found.type if found else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device={device}: expected auto, cpu, or an accelerator such as cuda") from None
    if kind != "cpu" and (found is None or found.type != kind):
        raise UserError(f"device={device}: not on this machine (it has {found.type if found else 'cpu alone'})")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is fp32 on a CPU and bf16 elsewhere.

    Raises:
        UserError: for a name that is none.
    """
    import torch

    if dtype == "auto":
        dtype = "fp32" if device == "cpu" else "bf16"
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return getattr(torch, DTYPES[dtype])


def check_base(path: str | Path, form: BaseModelFormat = UNQUANTIZED) -> None:
    """Whether a base can be decoded with, by its configuration: before its weights are read.

    Raises:
        UserError: for one with recurrent layers.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **form.reading)
    except (OSError, ValueError, KeyError):  # `load_base` says what is the matter
        return
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        check_rollback(str(path), MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


def load_base(path: str | Path, *, device: str, dtype: torch.dtype, form: BaseModelFormat = UNQUANTIZED) -> nn.Module:
    """A Hugging Face causal language model in evaluation mode. No code from the model's folder is run.

    Raises:
        UserError: if there is none.
    """
    from transformers import AutoModelForCausalLM

    base = form.load(AutoModelForCausalLM, path, dtype=dtype, device=device, trust_remote_code=False)
    base = base if form.is_quantized else base.to(device)
    return base.eval().requires_grad_(False)


def load_tokenizer(path: str | Path, form: BaseModelFormat = UNQUANTIZED) -> Any:
    """A base's tokenizer, with the default chat template if it has none.

    Raises:
        UserError: if there is none.
    """

    check_base_name(path)
    from verl_speculator.base_model.chat_template import ensure_chat_template

    try:
        tokenizer = form.read_tokenizer(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base={form.name_of(path)}: no tokenizer: {' '.join(str(error).split())[:300]}") from None
    ensure_chat_template(tokenizer)
    return tokenizer


def check_rollback(base: str, model_class: type, config: Any) -> None:
    """Whether a base keeps nothing of what it has read but keys and values. Reads no weight.

    Args:
        base: its name in the error.
        model_class: of transformers.
        config: its Hugging Face configuration.

    Raises:
        UserError: for a base with recurrent layers, whose state cannot be rolled back.
    """
    settings = config.get_text_config()
    # Not every architecture with recurrent layers is marked as stateful.
    kinds = getattr(settings, "layer_types", None) or getattr(settings, "layers_block_type", None) or ()
    recurrent = sorted(set(kinds) - ROLLED_BACK)
    if getattr(model_class, "_is_stateful", False) or recurrent:
        layers = f" (layers of {recurrent[0]})" if recurrent else ""
        raise UserError(
            f"base={base} ({model_class.__name__}): its recurrent state cannot be rolled back after a rejected "
            f"draft{layers}; expected a base with attention layers only"
        )
