"""A speculator on disk: `pytorch_model.bin` with its weights alone, and `config.json` that describes them.

`config.json` has the keys that serving engines read (docs/checkpoint-format.md), and the package's own.
Loading is strict: the file holds exactly the tensors and shapes that the configuration implies, or an error names the
differences.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.base_model.loading import UNQUANTIZED, BaseModelFormat, base_path, base_shape
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.config.families import FAMILIES
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.utils.atomic_io import atomic_file, read_tensors
from verl_speculator.utils.settings import UserError

if TYPE_CHECKING:
    import torch

    from verl_speculator.models import Slot, Speculator

WEIGHTS_FILE, SAFETENSORS_FILE = "pytorch_model.bin", "model.safetensors"
# An export that ArcticInference alone reads.
ARCTIC_MLP = "ArcticMLPSpeculatorPreTrainedModel"
CONFIG_FILE = "config.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
STATE_DIRECTORY = "training_state"
STATE_FILES = ("optimizer.pt", "lr_scheduler.pt", "random.pt")
BASE_DIRECTORY = "huggingface"
STEP_DIRECTORY = re.compile(r"^global_step_(\d+)$")
PROVENANCE_KEY = "verl_speculator"
BLOCK_KEY = "block_shapes"
BLOCK_PREFIX = "block."
CAP_KEY = "logit_cap"
NESTED_KEY = "speculator"  # in an export that vLLM loads as a draft model: the content of the checkpoint's config.json
DRAFT_TOKENS = "draft_tokens"  # the module's name of the draft vocabulary
# On disk: what to add to the number of a head's row for its token, and the tokens as vLLM's Medusa reads them; in
# EAGLE-3's exports also which tokens those are.
DRAFT_TO_TARGET, TOKEN_MAP, TARGET_TO_DRAFT = "d2t", "token_map", "t2d"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of `config.json`.

    Attributes:
        directory: of the checkpoint.
        config: family and shape.
        hidden_size: D, the width of its base model.
        vocab_size: V, the rows of the base model's LM head.
        dtype: of the tensors on disk, as in `torch.<dtype>`.
        block_shapes: shapes of the parameters of the decoder layer that it holds a trained copy of, if it does.
        provenance: base model, data, step, seed and versions; empty for checkpoints of other programs.
        logit_cap: the soft cap of its logits, None without one.
        base_architectures: `architectures` of the base model's configuration.
        is_draft_model: whether the directory is an export that vLLM loads as a draft model.
    """

    directory: Path
    config: SpeculatorConfig
    hidden_size: int
    vocab_size: int
    dtype: str
    block_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    logit_cap: float | None = None
    base_architectures: Sequence[str] = ()
    is_draft_model: bool = False

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `build_speculator` that describe the base model."""
        return {name: getattr(self, name) for name in ("hidden_size", "vocab_size", "block_shapes", "logit_cap")}

    def content(self) -> dict[str, Any]:
        """The content of `config.json`: the keys of the serving engine, the settings, then the package's own keys."""
        content = {
            "base_model_archs": list(self.base_architectures),
            "torch_dtype": self.dtype,
            "input_hidden_dim": self.hidden_size,
            "vocab_size": self.vocab_size,
        } | self.config.to_dict()
        if self.block_shapes:
            content[BLOCK_KEY] = dict(self.block_shapes)
        if self.logit_cap is not None:
            content[CAP_KEY] = self.logit_cap
        engine_keys = FAMILIES[self.config.method].serving_keys(content)
        return engine_keys | content | {PROVENANCE_KEY: dict(self.provenance)}

    def differences(self, config: SpeculatorConfig, logit_cap: float | None) -> list[str]:
        """Differences from a speculator of this configuration and soft cap, as `SpeculatorConfig.differences`."""
        caps = [] if self.logit_cap == logit_cap else [f"{CAP_KEY} ({self.logit_cap}, {logit_cap})"]
        return self.config.differences(config) + caps

    def check_base(self, hidden_size: int, vocab_size: int) -> None:
        """Reject a base model of another width or vocabulary: a `UserError` names both numbers."""
        for name, expected, actual in (
            ("width (hidden_size)", self.hidden_size, hidden_size),
            ("vocabulary (vocab_size)", self.vocab_size, vocab_size),
        ):
            if expected != actual:
                raise UserError(f"{self.directory}: trained for a base of {name} {expected}, this base has {actual}")

    @property
    def data_share(self) -> float | None:
        """The share of the training rows that training has seen, 1 after an epoch; None if it is not known."""
        training, data = (self.provenance.get(section, {}) for section in ("training", "data"))
        step, batch, rows = training.get("step"), training.get("train_batch_size"), data.get("train_rows")
        return min(1.0, step * batch / rows) if step and batch and rows else None

    @property
    def trained_base(self) -> Path | None:
        """The directory of the base model that was trained jointly, None if the base model was frozen."""
        directory = self.directory / BASE_DIRECTORY
        return directory if directory.is_dir() else None

    @property
    def _base(self) -> Mapping[str, Any]:
        """What is recorded of the base model: the one that was trained jointly, or that of the provenance."""
        return {"name": str(self.trained_base)} if self.trained_base else self.provenance.get("base", {})

    @property
    def base_name(self) -> str:
        """The base model that it was trained for, as the run named it."""
        return self.base_form.name_of(self._base.get("name", "a base that its config.json does not name"))

    @property
    def base_form(self) -> BaseModelFormat:
        """The format of the base model during training."""
        return BaseModelFormat(self._base.get("quantization"), self._base.get("gguf_file"))

    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base model's weights, None if it is not known."""
        if self.trained_base:
            return weights_fingerprint(str(self.trained_base))
        return self._base.get("weights_fingerprint")

    def check_base_weights(self, base: str, form: BaseModelFormat = UNQUANTIZED, *, allow_other: bool = False) -> None:
        """Reject a base model whose weights are not those that the speculator was trained for.

        Logs a warning where a fingerprint is unknown, and where the same weights are quantized differently, which
        costs some acceptance.

        Args:
            base: directory or hub name.
            form: how its weights are held.
            allow_other: log a warning for other weights instead.

        Raises:
            UserError: naming both base models.
        """
        expected, actual = self.base_fingerprint(), weights_fingerprint(base, form.gguf_file)
        name = form.name_of(base)
        if expected is None or actual is None:
            unknown = self.directory if expected is None else name
            logger.warning("%s: the base's weights cannot be compared: no fingerprint of %s", self.directory, unknown)
        elif expected != actual:
            difference = f"{self.directory}: trained for the weights of {self.base_name}, those of {name} are others"
            if not allow_other:
                raise UserError(
                    f"{difference}; a base fine-tuned from it can be told to be fine: --allow-other-base "
                    "(allow_other_base=True)"
                )
            logger.warning("%s: expect fewer accepted drafts", difference)
        elif self.base_form.quantization != form.quantization:
            logger.warning("%s: trained on the states of %s, not of %s", self.directory, self.base_name, name)


def latest_step(run: Path) -> int | None:
    """The step in a run's tracker file, None without such a file."""
    try:
        return int((run / TRACKER_FILE).read_text().strip())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(f"{run / TRACKER_FILE}: expected a step number") from None


def resolve_checkpoint(path: str | Path) -> Path:
    """The directory of a checkpoint: `path` itself, or the latest step of the run there; a `UserError` if neither."""
    directory = Path(path).expanduser()
    if (directory / CONFIG_FILE).is_file():
        return directory
    step = latest_step(directory)
    if step is not None and (directory / f"global_step_{step}" / CONFIG_FILE).is_file():
        return directory / f"global_step_{step}"
    raise UserError(f"{path}: no speculator checkpoint here (expected {CONFIG_FILE} or a run's {TRACKER_FILE})")


def find_resume_path(directory: Path, settings: Any) -> Path | None:
    """The checkpoint that a run resumes, None for a fresh start.

    Args:
        directory: of the run.
        settings: verl's `trainer` settings: resume_mode and resume_from_path.

    Raises:
        UserError: if the settings name a checkpoint that is not there.
    """
    mode, named = settings.resume_mode, settings.resume_from_path
    if mode == "disable":
        return None
    if named is not None:
        folder = Path(named).expanduser()
        if not (STEP_DIRECTORY.match(folder.name) and folder.is_dir()):
            raise UserError(f"trainer.resume_from_path={named}: expected an existing global_step_N folder")
    elif mode == "resume_path":
        raise UserError("trainer.resume_mode=resume_path needs trainer.resume_from_path=<a global_step_N folder>")
    else:
        step = latest_step(directory)
        if step is None:
            return None
        folder = directory / f"global_step_{step}"
        if not folder.is_dir():
            raise UserError(f"{directory / TRACKER_FILE} names step {step}, but {folder} is not there")
    if not (folder / STATE_DIRECTORY).is_dir():
        raise UserError(
            f"{folder} has no {STATE_DIRECTORY} to resume from; start from its weights: model.speculator.path={folder}"
        )
    return folder


def read_checkpoint_info(path: str | Path) -> CheckpointInfo:
    """Read `config.json`. Imports no torch.

    Raises:
        UserError: if there is no checkpoint, or its configuration cannot be used.
    """
    directory = resolve_checkpoint(path)
    try:
        content = json.loads((directory / CONFIG_FILE).read_text())
    except ValueError as error:
        raise UserError(f"{directory / CONFIG_FILE}: not a speculator's configuration: {error}") from None
    return parse_checkpoint_info(directory, content)


def parse_checkpoint_info(directory: str | Path, content: Any) -> CheckpointInfo:
    """As `read_checkpoint_info`, from the content of a `config.json`.

    Args:
        directory: where it is from, for messages and to find the weights.
        content: decoded; that of an export that vLLM loads as a draft model holds a checkpoint's under one key.
    """
    directory = Path(directory)
    invalid = f"{directory / CONFIG_FILE}: not a speculator's configuration"
    if not isinstance(content, dict):
        raise UserError(f"{invalid}: expected an object")
    if is_draft_model := isinstance(content.get(NESTED_KEY), dict):
        content = content[NESTED_KEY] | {PROVENANCE_KEY: content.get(PROVENANCE_KEY, {})}
    _check_is_speculator(directory, content)
    try:
        settings = {f.name: content[f.name] for f in fields(SpeculatorConfig) if f.name in content}
        return CheckpointInfo(
            directory=directory,
            config=SpeculatorConfig(**settings),
            hidden_size=int(content["input_hidden_dim"]),
            vocab_size=int(content["vocab_size"]),
            dtype=str(content.get("torch_dtype", "float32")).removeprefix("torch."),
            block_shapes={str(k): [int(n) for n in v] for k, v in content.get(BLOCK_KEY, {}).items()},
            provenance=dict(content.get(PROVENANCE_KEY, {})),
            logit_cap=None if content.get(CAP_KEY) is None else float(content[CAP_KEY]),
            base_architectures=tuple(content.get("base_model_archs", ())),
            is_draft_model=is_draft_model,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{invalid}: {reason}") from None


def _check_is_speculator(directory: Path, content: Mapping[str, Any]) -> None:
    """Reject exports for another program, Medusa heads in another format, and whole models, with what to do instead."""
    if ARCTIC_MLP in content.get("architectures", ()):
        raise UserError(
            f"{directory}: an export for ArcticInference alone (arctic-mlp); expected the checkpoint that it was "
            "made of, or an export in another format"
        )
    if "input_hidden_dim" in content:
        return
    if "medusa_num_heads" in content or content.get("model_type") == "medusa":
        raise UserError(
            f"{directory}: Medusa heads in another format; expected a checkpoint of ours, which "
            f"`verl-speculator convert {directory} --out DIR` makes of it"
        )
    named = content.get("architectures") or content.get("model_type")
    if "speculators_model_type" in content or "eagle3" in str(named).lower():
        raise UserError(
            f"{directory}: an EAGLE-3 draft in another format; expected a checkpoint of ours, which "
            f"`verl-speculator convert {directory} --out DIR` makes of it"
        )
    if named:
        kind = ", ".join(named) if isinstance(named, list) else named
        raise UserError(
            f"{directory}: a model ({kind}), expected a speculator's checkpoint, as training writes it: a "
            "global_step_N folder, or a run's folder for its latest step; the model itself is --base"
        )


def write_checkpoint(
    directory: str | Path,
    config: SpeculatorConfig,
    state: Mapping[str, torch.Tensor],
    **description: Any,
) -> Path:
    """Write a checkpoint from the parameters of a speculator.

    Args:
        directory: made if it does not exist; its two files are replaced if it does. Returned.
        config: family and shape.
        state: every parameter of the module, and its draft vocabulary if it has one, whole and on the CPU, by the
            module's own names.
        description: hidden_size, vocab_size, and optionally logit_cap, base_architectures and provenance, which are
            fields of `CheckpointInfo`.
    """
    import torch

    from verl_speculator.models import build_speculator

    (dtype,) = {str(p.dtype).removeprefix("torch.") for name, p in state.items() if name != DRAFT_TOKENS}
    block = {name: list(p.shape) for name, p in state.items() if name.startswith(BLOCK_PREFIX)}
    block_shapes = {name.removeprefix(BLOCK_PREFIX): shape for name, shape in block.items()}
    info = CheckpointInfo(Path(directory), config, dtype=dtype, block_shapes=block_shapes, **description)
    slots = build_speculator(config, **info.shape, device="meta").checkpoint_slots()
    tensors = {key: slot.of(state).contiguous() for key, slot in slots.items()}
    tensors |= vocabulary_tensors(config, state.get(DRAFT_TOKENS))
    info.directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(info.directory / WEIGHTS_FILE) as path:
        torch.save(tensors, path)
    with atomic_file(info.directory / CONFIG_FILE) as path:
        path.write_text(json.dumps(info.content(), indent=2) + "\n")
    return info.directory


def vocabulary_tensors(config: SpeculatorConfig, tokens: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that hold the draft vocabulary: `d2t` [V′] is v_i − i for ascending ids v_i, and
    Medusa heads have the ids themselves too, under vLLM's name. Empty without a draft vocabulary."""
    import torch

    if tokens is None:
        return {}
    offsets = {DRAFT_TO_TARGET: tokens - torch.arange(len(tokens), device=tokens.device)}
    return offsets | {TOKEN_MAP: tokens.contiguous()} if config.method == "medusa" else offsets


def save_speculator(
    speculator: Speculator,
    directory: str | Path,
    *,
    base_architectures: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Save a speculator whose parameters are whole in this process (the trainer saves sharded ones by itself).

    Args:
        speculator: any family.
        directory: made if it does not exist; its two files are replaced if it does. Returned.
        base_architectures: as in the base's own `config.json`; some versions of ArcticInference demand it.
        provenance: any record in values of JSON, saved under the key `verl_speculator`.
    """
    return write_checkpoint(
        directory,
        speculator.config,
        {name: tensor.detach().cpu() for name, tensor in speculator.state_dict().items()},
        hidden_size=speculator.hidden_size,
        vocab_size=speculator.vocab_size,
        logit_cap=speculator.logit_cap,
        base_architectures=base_architectures,
        provenance=provenance or {},
    )


def read_weights(info: CheckpointInfo) -> dict[str, torch.Tensor]:
    """The state of a checkpoint's module by its own names, memory-mapped and strictly checked: the parameters, and the
    draft vocabulary if it has one.

    Raises:
        UserError: if the file is missing or truncated, or holds other tensors than the configuration implies.
    """
    import torch

    from verl_speculator.models import build_speculator

    path = info.directory / WEIGHTS_FILE
    if not path.exists() and (info.directory / SAFETENSORS_FILE).exists():
        path = info.directory / SAFETENSORS_FILE
    tensors = read_tensors(path)
    module = build_speculator(info.config, **info.shape, device="meta")
    slots, parameters = module.checkpoint_slots(), dict(module.named_parameters())
    names = [*slots, *vocabulary_tensors(info.config, module.draft_tokens)]
    optional = {TARGET_TO_DRAFT} if DRAFT_TO_TARGET in names else set()
    faults = [f"missing {key}" for key in names if key not in tensors]
    faults += [f"unexpected {key}" for key in tensors if key not in names and key not in optional]
    tensor_of_slot: dict[Slot, torch.Tensor] = {}
    for key, slot in slots.items():
        if key not in tensors:
            continue
        tensor, shape = tensors[key], slot.of(parameters).shape
        if tensor.shape != shape:
            faults.append(f"{key} is {list(tensor.shape)}, the configuration says {list(shape)}")
        elif not torch.equal(tensor_of_slot.setdefault(slot, tensor), tensor):
            faults.append(f"{key} differs from the tensor that it is tied to")
    tokens = {}
    if DRAFT_TO_TARGET in names and DRAFT_TO_TARGET in tensors:
        tokens[DRAFT_TOKENS], fault = _draft_tokens(tensors, module.head_size, info.vocab_size)
        faults += fault
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path} does not fit its {CONFIG_FILE}: {'; '.join(faults[:5])}{more}")
    return join_slots(tensor_of_slot, {name: p.shape for name, p in parameters.items()}) | tokens


def _draft_tokens(tensors: Mapping[str, torch.Tensor], size: int, vocab_size: int) -> tuple[torch.Tensor, list[str]]:
    """The tokens of a checkpoint's draft vocabulary, and what is wrong with them."""
    import torch

    offsets = tensors[DRAFT_TO_TARGET]
    if offsets.shape != (size,) or offsets.dtype != torch.int64:
        actual = f"{list(offsets.shape)} of {str(offsets.dtype).removeprefix('torch.')}"
        return offsets, [f"{DRAFT_TO_TARGET} is {actual}, the configuration says [{size}] of int64"]
    tokens = offsets + torch.arange(size)
    if tokens[0] < 0 or tokens[-1] >= vocab_size or bool((tokens.diff() <= 0).any()):
        return tokens, [f"{DRAFT_TO_TARGET} names no ascending tokens below {vocab_size}"]
    if not torch.equal(tensors.get(TOKEN_MAP, tokens), tokens):
        return tokens, [f"{TOKEN_MAP} names other tokens than {DRAFT_TO_TARGET}"]
    if TARGET_TO_DRAFT in tensors and not torch.equal(tensors[TARGET_TO_DRAFT], vocabulary_mask(tokens, vocab_size)):
        return tokens, [f"{TARGET_TO_DRAFT} names other tokens than {DRAFT_TO_TARGET}"]
    return tokens, []


def vocabulary_mask(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[V] whether each token is in the draft vocabulary: `t2d`."""
    import torch

    mask = torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device)
    mask[tokens] = True
    return mask


def join_slots(tensors: Mapping[Slot, torch.Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The parameters that these tensors are, or are parts of."""
    state: dict[str, torch.Tensor] = {}
    for slot, tensor in tensors.items():
        if slot.part is None:
            state[slot.parameter] = tensor
            continue
        if slot.parameter not in state:
            state[slot.parameter] = tensor.new_empty(shapes[slot.parameter])
        slot.of(state).copy_(tensor)
    return state


def load_speculator(
    path: str | Path,
    *,
    base: Any = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    allow_other_base: bool = False,
) -> Speculator:
    """Load a trained speculator, strictly, and log the base model that it was trained for.

    Args:
        path: a checkpoint's directory, or a run's for its latest step.
        base: the base model, its configuration, directory or hub name. If given, its width and vocabulary must be those
            of the speculator, and its weights, where they can be read, those that it was trained for. A speculator that
            uses the base model's tables (`embedding` or `head`=base_frozen) takes them from a model given here, or from
            the one that it decodes with.
        device: of the parameters.
        dtype: of the parameters; the one on disk by default.
        allow_other_base: log a warning for a base model with other weights, such as a fine-tuned one.

    Raises:
        UserError: if there is no checkpoint, it is incomplete, or it is for another base model.
    """
    import torch
    from torch import nn

    from verl_speculator.models import build_speculator

    info = read_checkpoint_info(path)
    if base is not None:
        info.check_base(*base_shape(base))
        if name := base_path(base):
            info.check_base_weights(name, allow_other=allow_other_base)
    logger.info("%s: trained for %s", info.directory, info.base_name)
    speculator = build_speculator(info.config, **info.shape, device="meta")
    state = {name: tensor.clone() for name, tensor in read_weights(info).items()}
    speculator.load_state_dict(state, assign=True)
    speculator = speculator.to(device=device, dtype=dtype or getattr(torch, info.dtype))
    if isinstance(base, nn.Module):
        speculator.attach(base)
    return speculator
