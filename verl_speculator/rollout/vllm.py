"""A drafter for vLLM's `custom_class` that serves sum_rnn, sum_lstm and Medusa, without a fork. Imports no vLLM.

`speculative_config = {"method": "custom_class", "model": "verl_speculator.rollout.vllm.SpeculatorProposer",
"num_speculative_tokens": K}` with `additional_config = {"verl_speculator": {"path": "/absolute/checkpoint"}}`;
`verl-speculator rollout-args` prints both. Drafts are greedy at any temperature: vLLM takes tokens of such a drafter,
and no distribution. What it stands on is written down in `vllm_contract`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verl_speculator.checkpoint import load_speculator
from verl_speculator.rollout.account import Account
from verl_speculator.rollout.drafting import draft_batch, greedy_drafts
from verl_speculator.rollout.hot_swap import copy_parameters
from verl_speculator.rollout.vllm_contract import (
    ProposerSettings,
    check_checkpoint,
    check_signature,
    check_version,
    installed_vllm,
)

logger = logging.getLogger(__name__)
# Sizes to compile for before the first request: a batch of one is a graph of its own, all others share one.
WARM_UP = (1, 3)


class SpeculatorProposer:
    """Drafts for vLLM's `GPUModelRunner`, which makes one in each worker.

    Every tensor-parallel worker holds the whole speculator and drafts the same; what the scheduler hands on are the
    drafts of the first. The weights are allocated here, while the runner is built: what the runner loads later lies in
    the pool that a sleeping engine gives back, and comes back from there empty.

    Args:
        vllm_config: vLLM's own.

    Raises:
        UserError: for settings, a checkpoint or a vLLM that do not fit (`vllm_contract`).
    """

    def __init__(self, vllm_config: Any) -> None:
        check_version(installed_vllm())
        settings = ProposerSettings.parse(vllm_config.additional_config)
        info = check_checkpoint(settings, vllm_config)
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        hand_over_rows(GPUModelRunner)
        device = torch.device(vllm_config.device_config.device)
        self.dtype = vllm_config.model_config.dtype
        self.speculator = load_speculator(info.directory, device=device, dtype=self.dtype).requires_grad_(False).eval()
        if self.speculator.is_untrained():
            logger.warning("%s: no training step has changed its tensors", info.directory)
        self.account = Account()
        self._rows: tuple[Tensor, list[int] | None] | None = None
        fuse = device.type == "cuda" if settings.compile is None else settings.compile
        drafts = torch.compile(greedy_drafts, dynamic=True) if fuse else greedy_drafts
        self._draft = partial(drafts, self.speculator)
        if fuse:
            self._warm_up(device)

    def load_model(self, target_model: Any) -> None:
        """Nothing: the weights are here already, and none of the base's is needed. vLLM's runner for CPUs calls it."""

    @torch.inference_mode()
    def _warm_up(self, device: torch.device) -> None:
        for size in WARM_UP:
            hidden = torch.zeros(size, self.speculator.hidden_size, device=device, dtype=self.dtype)
            self._draft(hidden, torch.zeros(size, device=device, dtype=torch.long))

    @contextmanager
    def rows(self, hidden: Tensor, num_draft_tokens: list[int] | None) -> Iterator[None]:
        """Hold ready what `propose` is not given.

        Args:
            hidden: [R, D] the states that this step's tokens were sampled from.
            num_draft_tokens: of each request; None where no request came with drafts.
        """
        self._rows = hidden, num_draft_tokens
        try:
            yield
        finally:
            self._rows = None

    @torch.inference_mode()
    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """K drafts for each request, none for one without a token: what vLLM calls."""
        if self._rows is None:
            raise RuntimeError(
                "vLLM asked for drafts in another way than through GPUModelRunner.propose_draft_token_ids"
            )
        hidden, num_draft_tokens = self._rows
        self.account.count(sampled_token_ids, num_draft_tokens)
        return draft_batch(self._draft, hidden.to(self.dtype), sampled_token_ids, num_draft_tokens)

    def update(self, tensors: Mapping[str, Tensor], version: int | None = None) -> int:
        """Draft with these parameters from the next step on.

        Args:
            tensors: every parameter of the speculator, under its own names.
            version: how the account calls them; one more than before by default.

        Returns:
            The version.

        Raises:
            UserError: for other names or shapes; the speculator stays as it is.
        """
        copy_parameters(self.speculator, tensors)
        self.account.version = self.account.version + 1 if version is None else version
        return self.account.version


def hand_over_rows(runner: type) -> None:
    """Have a runner's class hand its hidden states to our proposer, once per process.

    vLLM gives a drafter of `custom_class` tokens alone. The states are arguments of the runner's method that calls it,
    so that method is wrapped: it does what it did, while the proposer holds the states.

    Raises:
        UserError: if the method takes other parameters than the one that was read.
    """
    original = runner.propose_draft_token_ids
    if getattr(original, "hands_over_rows", False):
        return
    check_signature(original)

    signature = inspect.signature(original)

    @functools.wraps(original)
    def propose_draft_token_ids(self, *args, **kwargs):
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, SpeculatorProposer):
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        drafts = given["spec_decode_metadata"]
        with drafter.rows(given["sample_hidden_states"], None if drafts is None else drafts.num_draft_tokens):
            return original(self, *args, **kwargs)

    propose_draft_token_ids.hands_over_rows = True
    runner.propose_draft_token_ids = propose_draft_token_ids
