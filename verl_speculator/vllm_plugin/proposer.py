"""A drafter for vLLM's `custom_class` that serves sum_rnn, sum_lstm and Medusa without a fork. Imports no vLLM.

`speculative_config = {"method": "custom_class", "model": "verl_speculator.vllm_plugin.proposer.SpeculatorProposer",
"num_speculative_tokens": K}` with `additional_config = {"verl_speculator": {"path": "/absolute/checkpoint"}}`;
`verl-speculator rollout-args` prints both. Drafts are greedy at any temperature, since vLLM takes tokens from such a
drafter and no distribution. `compat` lists what it relies on.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info
from verl_speculator.models import Speculator
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.compat import (
    ProposerSettings,
    check_served,
    check_signature,
    check_version,
    installed_vllm,
)

logger = logging.getLogger(__name__)

# Batch sizes to compile for before the first request: torch.compile makes one graph for 1 and one for all others.
WARM_UP = (1, 3)


@dataclass
class AcceptanceStats:
    """Counts of one worker's drafts since they were last taken.

    Attributes:
        version: of the speculator: 0 as loaded, then that of the last weight update.
        rounds: verifications of a request that had drafts.
        drafted: draft tokens in them.
        accepted: draft tokens of them that were accepted.
    """

    version: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, sampled: Sequence[Sequence[int]], num_draft_tokens: Sequence[int] | None) -> None:
        """Add one step of the engine. A request without drafts or without a token is no round."""
        if num_draft_tokens is None:
            return
        for tokens, drafts in zip(sampled, num_draft_tokens, strict=True):
            if drafts and tokens:
                self.rounds += 1
                self.drafted += drafts
                self.accepted += len(tokens) - 1

    def take(self) -> dict[str, Any]:
        """The counts as a dictionary; they restart at 0."""
        counts = asdict(self)
        self.rounds = self.drafted = self.accepted = 0
        return counts


def rollout_metrics(
    stats: Sequence[dict[str, Any]], *, trainer_version: int | None = None, prefix: str = "rollout"
) -> dict[str, float]:
    """Metrics of a training step, or of a validation, from the statistics of all workers.

    Counts are added before they are divided. Tensor-parallel workers count the same requests: no ratio changes.

    Args:
        stats: `AcceptanceStats.take` of every worker that drafts.
        trainer_version: the version that the trainer has.
        prefix: of the metrics' names.

    Returns:
        `rollout/speculator_version`, the oldest version that drafted (or that is served, if nothing was drafted); with
        `trainer_version` also `rollout/speculator_lag`, the staleness in versions. If anything was drafted,
        `rollout/accepted_length` (τ, tokens per forward pass of the target model) and `rollout/accept_rate` (accepted
        share of the draft tokens). Empty without stats.
    """
    if not stats:
        return {}
    drafting = [worker_stats for worker_stats in stats if worker_stats["rounds"]]
    oldest = min(worker_stats["version"] for worker_stats in drafting or stats)
    metrics: dict[str, float] = {f"{prefix}/speculator_version": oldest}
    if trainer_version is not None:
        metrics[f"{prefix}/speculator_lag"] = trainer_version - oldest
    rounds, drafted, accepted = (sum(a[name] for a in stats) for name in ("rounds", "drafted", "accepted"))
    if rounds:
        metrics |= {f"{prefix}/accepted_length": 1 + accepted / rounds, f"{prefix}/accept_rate": accepted / drafted}
    return metrics


class SpeculatorProposer:
    """Drafts for vLLM's `GPUModelRunner`, which makes one in each worker.

    Every tensor-parallel worker holds the whole speculator and drafts the same tokens; the scheduler uses those of the
    first. The weights are allocated here, while the runner is built: what the runner loads later is in the memory pool
    that a sleeping engine frees, and is empty after it wakes up.

    Args:
        vllm_config: vLLM's own.

    Raises:
        UserError: for settings, a checkpoint or a vLLM that do not fit (`compat`).
    """

    def __init__(self, vllm_config: Any) -> None:
        check_version(installed_vllm())
        settings = ProposerSettings.parse(vllm_config.additional_config)
        info = read_checkpoint_info(settings.path)
        if vllm_config.use_v2_model_runner:
            raise UserError(
                "VLLM_USE_V2_MODEL_RUNNER=1: custom_class drafters run in vLLM's V1 runner alone; expected 0"
            )
        check_served(info, vllm_config.speculative_config.num_speculative_tokens)
        info.check_base(vllm_config.model_config.get_hidden_size(), vllm_config.model_config.get_vocab_size())
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        patch_model_runner(GPUModelRunner)
        device = torch.device(vllm_config.device_config.device)
        self.dtype = vllm_config.model_config.dtype
        self.draft_up_to = settings.draft_up_to
        self.speculator = load_speculator(info.directory, device=device, dtype=self.dtype).requires_grad_(False).eval()
        if self.speculator.is_untrained():
            logger.warning("%s: no training step has changed its tensors", info.directory)
        self.stats = AcceptanceStats()
        self.shards: dict[str, Any] = {}  # every worker holds all of it
        self._step_inputs: tuple[Tensor, list[int] | None] | None = None
        compiled = device.type == "cuda" if settings.compile is None else settings.compile
        self._draft = partial(
            torch.compile(greedy_drafts, dynamic=True) if compiled else greedy_drafts, self.speculator
        )
        if compiled:
            self._warm_up(device)

    def load_model(self, target_model: Any) -> None:
        """Called by vLLM's runner for CPUs. Nothing: the weights are loaded, and none of the target model's is used."""

    @torch.inference_mode()
    def _warm_up(self, device: torch.device) -> None:
        for size in WARM_UP:
            hidden = torch.zeros(size, self.speculator.hidden_size, device=device, dtype=self.dtype)
            self._draft(hidden, torch.zeros(size, device=device, dtype=torch.long))

    @contextmanager
    def step_inputs(self, hidden: Tensor, num_draft_tokens: list[int] | None) -> Iterator[None]:
        """Provide, for one step, what vLLM does not pass to `propose`.

        Args:
            hidden: [R, D] the hidden states that this step's tokens were sampled from.
            num_draft_tokens: of each request; None if no request came with drafts.
        """
        self._step_inputs = hidden, num_draft_tokens
        try:
            yield
        finally:
            self._step_inputs = None

    @torch.inference_mode()
    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Called by vLLM: K draft tokens for each request, none for one without a token, and none at all in a batch of
        more than `draft_up_to` requests."""
        if self._step_inputs is None:
            raise RuntimeError(
                "vLLM asked for drafts in another way than through GPUModelRunner.propose_draft_token_ids"
            )
        hidden, num_draft_tokens = self._step_inputs
        self.stats.count(sampled_token_ids, num_draft_tokens)
        if len(sampled_token_ids) > self.draft_up_to:
            return [[] for _ in sampled_token_ids]
        return draft_batch(self._draft, hidden.to(self.dtype), sampled_token_ids, num_draft_tokens)


def patch_model_runner(runner: type) -> None:
    """Wrap a runner's method so that it passes its hidden states to our proposer; once per process.

    vLLM passes only tokens to a drafter of `custom_class`. The hidden states are arguments of the method that calls it;
    the wrapper provides them to the proposer for the time of that call and leaves everything else as it is.

    Raises:
        UserError: if the method has other parameters than in the versions that are supported.
    """
    original = runner.propose_draft_token_ids
    if getattr(original, "passes_hidden_states", False):
        return
    check_signature(original)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def propose_draft_token_ids(self, *args, **kwargs):
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, SpeculatorProposer):
            return original(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        drafts = arguments["spec_decode_metadata"]
        num_draft_tokens = None if drafts is None else drafts.num_draft_tokens
        with drafter.step_inputs(arguments["sample_hidden_states"], num_draft_tokens):
            return original(self, *args, **kwargs)

    propose_draft_token_ids.passes_hidden_states = True
    runner.propose_draft_token_ids = propose_draft_token_ids


def newest_rows(sampled: Sequence[Sequence[int]], num_draft_tokens: Sequence[int] | None) -> list[tuple[int, int, int]]:
    """The requests of a step that can be drafted for: the index of each among the B requests, the row among R of the
    hidden state that produced its newest token, and that token, which the target model has not read yet.

    A request that came with n drafts has n + 1 rows, one for each position where a token could be sampled. If it got m
    tokens (m − 1 accepted drafts and one more), the last one was sampled from its row m − 1. A request whose prompt is
    still being read (chunked prefill, also after preemption) has no token, and its row is skipped.

    Args:
        sampled: the tokens, none or more, that each of the B requests got in this step.
        num_draft_tokens: the drafts that each of them came with; None if no request had any.

    Raises:
        ValueError: if a request got more tokens than it has rows, or the two lists have different lengths.
    """
    counts = [0] * len(sampled) if num_draft_tokens is None else num_draft_tokens
    newest, offset = [], 0
    for request, (tokens, count) in enumerate(zip(sampled, counts, strict=True)):
        if len(tokens) > count + 1:
            raise ValueError(f"request {request} got {len(tokens)} tokens from {count} drafts")
        if tokens:
            newest.append((request, offset + len(tokens) - 1, tokens[-1]))
        offset += count + 1
    return newest


def greedy_drafts(speculator: Speculator, hidden: Tensor, tokens: Tensor) -> Tensor:
    """[B, K] the most likely token of every depth, each fed to the next depth.

    A target model that samples accepts such a draft with probability p(argmax q); `tv` and `lk` raise Σ_v min(p, q),
    the acceptance rate of a sampled draft.

    Args:
        speculator: any family that reads one hidden state.
        hidden: [B, D] the hidden states that produced `tokens`, in the speculator's dtype.
        tokens: [B] the newest tokens.
    """
    state, drafts = speculator.start(hidden), []
    for depth in range(speculator.n_predict):
        state = speculator.step(state, tokens)
        tokens = speculator.most_likely(depth, state.output)
        drafts.append(tokens)
    return torch.stack(drafts, dim=1)


def draft_batch(
    draft: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    sampled: Sequence[Sequence[int]],
    num_draft_tokens: Sequence[int] | None,
) -> list[list[int]]:
    """Draft tokens for every request of a step, none for a request without a token.

    Args:
        draft: from hidden states [n, D] and tokens [n] to drafts [n, K].
        hidden: [R, D] the hidden states that this step's tokens were sampled from.
        sampled: as in `newest_rows`.
        num_draft_tokens: as in `newest_rows`.
    """
    drafts: list[list[int]] = [[] for _ in sampled]
    if newest := newest_rows(sampled, num_draft_tokens):
        requests, *rows_and_tokens = zip(*newest, strict=True)
        rows, tokens = (torch.tensor(values, device=hidden.device) for values in rows_and_tokens)
        for request, tokens_of_request in zip(requests, draft(hidden[rows], tokens).tolist(), strict=True):
            drafts[request] = tokens_of_request
    return drafts
