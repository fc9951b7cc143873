"""A drafter for vLLM's `custom_class` that serves sum_rnn, sum_lstm and Medusa without a fork. Imports no vLLM.

`speculative_config = {"method": "custom_class", "model": "verl_speculator.vllm_plugin.proposer.SpeculatorProposer",
"num_speculative_tokens": K}` with `additional_config = {"verl_speculator": {"path": "/absolute/checkpoint"}}`;
`verl-speculator rollout-args` prints both. Drafts are greedy at any temperature unless `speculative_config` has
`"draft_sample_method": "probabilistic"`. `compat` lists what it relies on.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info
from verl_speculator.models import Speculator
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.acceptance import AcceptanceStats
from verl_speculator.vllm_plugin.compat import (
    ProposerSettings,
    check_reads_probabilities,
    check_served,
    check_signature,
    check_version,
    draws_drafts,
    installed_vllm,
)

logger = logging.getLogger(__name__)

# Batch sizes to compile for before the first request: torch.compile makes one graph for 1 and one for all others.
WARM_UP = (1, 3)


class StepInputs(NamedTuple):
    """What vLLM does not pass to `propose`, of one step with B requests.

    Attributes:
        hidden: [R, D] the hidden states that this step's tokens were sampled from.
        num_draft_tokens: [B] that each request came with; None if none came with any.
        temperature: [B] of each request, 0 where it is greedy; None if all are.
        generators: random generators of the requests that have a seed, by their index.
    """

    hidden: Tensor
    num_draft_tokens: list[int] | None
    temperature: Tensor | None = None
    generators: Mapping[int, torch.Generator] = {}


class DrawnFrom(NamedTuple):
    """The distributions of a step's drafts, which vLLM's rejection sampler reads in the next step.

    Attributes:
        requests: [n] index of each request that was drafted for.
        probabilities: [n, K, V] that its drafts were drawn from.
    """

    requests: list[int]
    probabilities: Tensor


class SpeculatorProposer:
    """Drafts for vLLM's `GPUModelRunner`, which makes one in each worker.

    Every tensor-parallel worker holds its rows of embeddings and heads and the rest of the speculator, and drafts the
    same tokens; the scheduler uses those of the first. The weights are allocated here, while the runner is built: what
    the runner loads later is in the memory pool that a sleeping engine frees, and is empty after it wakes up.

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

        from verl_speculator.vllm_plugin.sharding import shard_tables

        patch_model_runner(GPUModelRunner)
        self.draws_drafts = draws_drafts(vllm_config.speculative_config)
        if self.draws_drafts:
            check_reads_probabilities(GPUModelRunner)
        device = torch.device(vllm_config.device_config.device)
        self.dtype = vllm_config.model_config.dtype
        self.draft_up_to = settings.draft_up_to
        self.speculator = load_speculator(info.directory, dtype=self.dtype).requires_grad_(False).eval()
        self.shards = shard_tables(self.speculator)
        self.speculator.to(device)
        if self.speculator.is_untrained():
            logger.warning("%s: no training step has changed its tensors", info.directory)
        self.stats = AcceptanceStats()
        self._step_inputs: StepInputs | None = None
        self._drawn_from: DrawnFrom | None = None
        # Row and newest token of each request, in memory that is copied to a GPU without a stop; `propose` ends with
        # the copy of the drafts back, so nothing is overwritten before it was read.
        most_requests = max(vllm_config.scheduler_config.max_num_seqs, *WARM_UP)
        self._newest = torch.empty(3 * most_requests, dtype=torch.long, pin_memory=device.type == "cuda")
        compiled = device.type == "cuda" if settings.compile is None else settings.compile
        self._greedy, self._sampled = (
            partial(torch.compile(draft, dynamic=True) if compiled else draft, self.speculator)
            for draft in (greedy_drafts, sampled_drafts)
        )
        if compiled:
            self._warm_up(device)

    def load_model(self, target_model: Any) -> None:
        """Called by vLLM's runner for CPUs. Nothing: the weights are loaded, and none of the target model's is used."""

    @torch.inference_mode()
    def _warm_up(self, device: torch.device) -> None:
        for size in WARM_UP:
            hidden = torch.zeros(size, self.speculator.hidden_size, device=device, dtype=self.dtype)
            for temperature in (None, torch.ones(size, device=device)):
                self._draft([(i, i, 0) for i in range(size)], StepInputs(hidden, None, temperature))
        self._drawn_from = None

    @contextmanager
    def step_inputs(self, inputs: StepInputs) -> Iterator[None]:
        """Provide, for one step, what vLLM does not pass to `propose`."""
        self._step_inputs = inputs
        try:
            yield
        finally:
            self._step_inputs = None

    def take_drawn_from(self) -> DrawnFrom | None:
        """Where the last drafts were drawn from; None if they were greedy."""
        drawn_from, self._drawn_from = self._drawn_from, None
        return drawn_from

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
        inputs, drafts = self._step_inputs, [[] for _ in sampled_token_ids]
        self.stats.count(sampled_token_ids, inputs.num_draft_tokens)
        if len(sampled_token_ids) > self.draft_up_to:
            return drafts
        if newest := newest_rows(sampled_token_ids, inputs.num_draft_tokens):
            for (request, _, _), tokens in zip(newest, self._draft(newest, inputs).tolist(), strict=True):
                drafts[request] = tokens
        return drafts

    def _draft(self, newest: list[tuple[int, int, int]], inputs: StepInputs) -> Tensor:
        """[n, K] drafts for the n requests of `newest_rows`."""
        packed = self._newest[: 3 * len(newest)].view(3, -1).copy_(torch.tensor(newest).T)
        requests, rows, tokens = packed.to(inputs.hidden.device, non_blocking=True)
        hidden = inputs.hidden[rows].to(self.dtype)
        if not self.draws_drafts or inputs.temperature is None:
            return self._greedy(hidden, tokens)
        indices = [request for request, _, _ in newest]
        noise = self._noise(indices, inputs.generators)
        drafts, probabilities = self._sampled(hidden, tokens, inputs.temperature[requests], noise)
        self._drawn_from = DrawnFrom(indices, probabilities)
        return drafts

    def _noise(self, requests: Sequence[int], generators: Mapping[int, torch.Generator]) -> Tensor:
        """[n, K, V] exponential, from the generators of the requests that have one."""
        shape = (len(requests), self.speculator.n_predict, self.speculator.vocab_size)
        noise = torch.empty(shape, device=next(self.speculator.parameters()).device).exponential_()
        for row, request in enumerate(requests):
            if request in generators:
                noise[row].exponential_(generator=generators[request])
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)  # 0 · ∞ for a token outside of the draft vocabulary


def patch_model_runner(runner: type) -> None:
    """Wrap a runner's method so that it passes its hidden states to our proposer; once per process.

    vLLM passes only tokens to a drafter of `custom_class`. The hidden states are arguments of the method that calls it;
    the wrapper provides them to the proposer for the time of that call, and stores the distributions of sampled drafts
    where vLLM's own drafters have theirs stored. A speculator has no positions, so that it drafts up to the end of the
    context; vLLM's scheduler cuts off what is beyond. Everything else is left as it is.

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
        # Within K tokens of this length, which is the target's, vLLM verifies zeros for the whole batch instead.
        self.effective_drafter_max_model_len = sys.maxsize
        arguments = signature.bind(self, *args, **kwargs).arguments
        verified, sampling = arguments["spec_decode_metadata"], arguments["sampling_metadata"]
        inputs = StepInputs(
            hidden=arguments["sample_hidden_states"],
            num_draft_tokens=None if verified is None else verified.num_draft_tokens,
            temperature=sampling.temperature,
            generators=sampling.generators,
        )
        with drafter.step_inputs(inputs):
            drafts = original(self, *args, **kwargs)
        if (drawn_from := drafter.take_drawn_from()) is not None:
            self._draft_probs = drawn_from.probabilities
            self._draft_prob_req_ids = [self.input_batch.req_ids[request] for request in drawn_from.requests]
        return drafts

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

    A target model that samples accepts such a draft with probability p(argmax q).

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


def sampled_drafts(
    speculator: Speculator, hidden: Tensor, tokens: Tensor, temperature: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from the distribution of every depth, each fed to the next depth.

    A target model that samples accepts such a draft with probability Σ_v min(p, q) (Leviathan et al. 2022, equation 3).

    Args:
        speculator: any family that reads one hidden state.
        hidden: [B, D] as in `greedy_drafts`.
        tokens: [B] as there.
        temperature: [B] of the requests; those with 0 get the most likely tokens.
        noise: [B, K, V] float32, exponential, larger than 0: argmax q / noise is a draw from q. It is overwritten.

    Returns:
        [B, K] the drafts, and [B, K, V] what they were drawn from, in the place of the noise.
    """
    is_greedy = (temperature < 1e-5)[:, None]  # as vLLM decides it
    temperature = torch.where(is_greedy, 1.0, temperature[:, None])
    state, drafts = speculator.start(hidden), []
    for depth in range(speculator.n_predict):
        state = speculator.step(state, tokens)
        distribution = (speculator.logits(depth, state.output).float() / temperature).softmax(-1)
        tokens = torch.where(is_greedy, distribution, distribution / noise[:, depth]).argmax(-1)
        drafts.append(tokens)
        noise[:, depth] = distribution
    return torch.stack(drafts, dim=1), noise
