"""A drafter for vLLM's `custom_class` that serves sum_rnn, sum_lstm and Medusa, without a fork. Imports no vLLM.

`speculative_config = {"method": "custom_class", "model": "verl_speculator.vllm_plugin.proposer.SpeculatorProposer",
"num_speculative_tokens": K}` with `additional_config = {"verl_speculator": {"path": "/absolute/checkpoint"}}`;
`verl-speculator rollout-args` prints both. Drafts are greedy at any temperature: vLLM takes tokens of such a drafter,
and no distribution. What it stands on is written down in `vllm_contract`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info, read_weights
from verl_speculator.models import Speculator
from verl_speculator.utils.errors import UserError
from verl_speculator.vllm_plugin.acceptance_stats import AcceptanceStats
from verl_speculator.vllm_plugin.compat import (
    ProposerSettings,
    check_checkpoint,
    check_signature,
    check_version,
    installed_vllm,
)

logger = logging.getLogger(__name__)


def check_shapes(speculator: Speculator, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse parameters that are another speculator's, before a value is copied.

    Args:
        speculator: the served one.
        shapes: of every parameter that is to come, under the module's names.

    Raises:
        UserError: for a missing or unknown name, or another shape.
    """
    parameters = dict(speculator.named_parameters())
    faults = [f"missing {name}" for name in parameters if name not in shapes]
    faults += [f"unexpected {name}" for name in shapes if name not in parameters]
    faults += [
        f"{name} is {list(shapes[name])}, served is {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in shapes and list(shapes[name]) != list(parameter.shape)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"update_speculator: the tensors are another speculator's: {'; '.join(faults[:5])}{more}")


@torch.no_grad()
def copy_parameters(speculator: Speculator, tensors: Mapping[str, Tensor]) -> None:
    """Copy into the parameters where they lie, so that whatever was compiled or captured over them stays good.

    Args:
        speculator: on any device, in any type.
        tensors: every parameter, under the module's names.

    Raises:
        UserError: for a missing or unknown name, or another shape; then nothing has changed.
    """
    check_shapes(speculator, {name: tensor.shape for name, tensor in tensors.items()})
    for name, parameter in speculator.named_parameters():
        parameter.copy_(tensors[name])


class StreamedUpdate:
    """A served speculator's new values, copied as they arrive. What will arrive is announced, and checked, first.

    The sender waits for every bucket of tensors to be taken, so nothing is raised before the last one: what is
    refused is let through without a copy, and `finish` says why.

    Args:
        speculator: the served one; None in a worker that does not draft, which lets everything through.
        shapes: of every parameter that is to come, under the module's names.
    """

    def __init__(self, speculator: Speculator | None, shapes: Mapping[str, Sequence[int]]) -> None:
        self._refusal: UserError | None = None
        self._awaited: dict[str, Tensor] = {}
        if speculator is None:
            return
        try:
            check_shapes(speculator, shapes)
            self._awaited = dict(speculator.named_parameters())
        except UserError as error:
            self._refusal = error

    @torch.no_grad()
    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over a bucket; none of its tensors is kept."""
        for name, tensor in tensors:
            parameter = self._awaited.get(name)
            if parameter is not None and parameter.shape == tensor.shape:
                parameter.copy_(tensor)
                del self._awaited[name]

    def finish(self) -> None:
        """Behind the last bucket.

        Raises:
            UserError: for announced parameters that are another speculator's; the served one is as it was.
            RuntimeError: if not all that was announced has come; the served one is then partly new.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._awaited:
            raise RuntimeError(f"update_speculator: announced and not sent: {', '.join(self._awaited)}")


def read_parameters(path: str, speculator: Speculator) -> dict[str, Tensor]:
    """The parameters of a checkpoint that is to take a served speculator's place.

    Raises:
        UserError: if it is of another family or shape, or for another base.
    """
    info = read_checkpoint_info(path)
    differ = speculator.config.differences(info.config)
    if differ:
        raise UserError(f"update_speculator: {info.directory} differs from what is served: {', '.join(differ)}")
    info.check_base(speculator.hidden_size, speculator.vocab_size)
    return read_weights(info)


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

        patch_model_runner(GPUModelRunner)
        device = torch.device(vllm_config.device_config.device)
        self.dtype = vllm_config.model_config.dtype
        self.speculator = load_speculator(info.directory, device=device, dtype=self.dtype).requires_grad_(False).eval()
        if self.speculator.is_untrained():
            logger.warning("%s: no training step has changed its tensors", info.directory)
        self.account = AcceptanceStats()
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


def patch_model_runner(runner: type) -> None:
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


@dataclass(frozen=True)
class LatestTokens:
    """The newest state of every request that can be drafted for.

    Attributes:
        requests: which of the B requests.
        rows: which of the R rows holds the state that produced the newest token of each.
        tokens: the newest token of each; the base has not read it yet.
    """

    requests: list[int]
    rows: list[int]
    tokens: list[int]


def newest_rows(sampled: Sequence[Sequence[int]], num_draft_tokens: Sequence[int] | None) -> LatestTokens:
    """Find each request's newest token and the row of the state that produced it.

    A request that came with n drafts has n + 1 rows, one for each place where a token could be sampled. With m tokens
    out of it (m − 1 drafts accepted, and one more) the last of them was sampled from its row m − 1. A request has no
    token where its prompt is still being read (chunked prefill; a preempted one reads it anew): its row is passed by.

    Args:
        sampled: the tokens that each of the B requests got in this step, none or more.
        num_draft_tokens: how many drafts each of them came with; None where no request had any.

    Raises:
        ValueError: if a request got more tokens than it has rows, or the two do not speak of the same requests.
    """
    drafts = [0] * len(sampled) if num_draft_tokens is None else num_draft_tokens
    requests, rows, tokens, offset = [], [], [], 0
    for request, (one, count) in enumerate(zip(sampled, drafts, strict=True)):
        if len(one) > count + 1:
            raise ValueError(f"request {request} got {len(one)} tokens from {count} drafts")
        if one:
            requests.append(request)
            rows.append(offset + len(one) - 1)
            tokens.append(one[-1])
        offset += count + 1
    return LatestTokens(requests, rows, tokens)


def greedy_drafts(speculator: Speculator, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The most likely token of every depth, each fed to the next.

    At any temperature: a target that samples accepts such a draft with probability p(argmax q), where the objectives
    `tv` and `lk` raise the acceptance Σ_v min(p, q) of a sampled draft.

    Args:
        speculator: any family that lives on one hidden state.
        hidden: [B, D] the base's states that produced `tokens`, in the speculator's type.
        tokens: [B] the newest tokens.

    Returns:
        [B, K]
    """
    state, drafts = speculator.start(hidden), []
    for depth in range(speculator.n_predict):
        state = speculator.step(state, tokens)
        tokens = speculator.logits(depth, state.output).argmax(-1)
        drafts.append(tokens)
    return torch.stack(drafts, dim=1)


def draft_batch(
    draft: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    sampled: Sequence[Sequence[int]],
    num_draft_tokens: Sequence[int] | None,
) -> list[list[int]]:
    """Drafts for every request of a step, none where a request has no token.

    Args:
        draft: from states [n, D] and tokens [n] to drafts [n, K].
        hidden: [R, D] the states that this step's tokens were sampled from.
        sampled: as in `newest_rows`.
        num_draft_tokens: as in `newest_rows`.
    """
    newest = newest_rows(sampled, num_draft_tokens)
    found: list[list[int]] = [[] for _ in sampled]
    if newest.requests:
        rows, tokens = (torch.tensor(values, device=hidden.device) for values in (newest.rows, newest.tokens))
        for request, drafts in zip(newest.requests, draft(hidden[rows], tokens).tolist(), strict=True):
            found[request] = drafts
    return found
