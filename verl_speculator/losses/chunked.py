"""The speculator's loss in chunks of rows, with the gradients computed in the forward pass.

Logits of K depths are the largest tensors of training: K·T·V numbers, and as many gradients. autograd would keep them
until the backward pass, or compute the product of states and head, the most expensive one, a second time. Instead each
chunk of rows runs through unroll, head and loss, adds its gradients to sums and is freed before the next one starts;
`backward` only multiplies the sums by the gradient of the loss (as Liger-Kernel's fused linear cross-entropy does, Hsu
et al. 2024, arXiv 2410.10989). What is allocated:

    for the whole pass   the gradient of each parameter       in the accumulation dtype: thousands of chunks are added
    for one chunk        [K · r, V′] logits, overwritten by   in the accumulation dtype: bf16 has too few digits for
                         their gradient, and the teacher's    a softmax and its differences
    for one chunk        [K, r, E] states and their gradient  in the compute dtype (autocast's, else the parameters')

The accumulation dtype is float32 for bf16 and fp16, else the compute dtype. `backward` converts the gradients to the
dtypes of their parameters, one at a time.

Shapes: T rows, r rows of a chunk, K depths, D base width, E speculator width, V vocabulary, V′ draft vocabulary, R rows
of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from verl_speculator.config.families import BASE_FROZEN
from verl_speculator.config.objective import Objective
from verl_speculator.losses.closed_form import Kernel, Teacher, choose_kernel, compile_once, teacher_distribution
from verl_speculator.losses.reference import drafted_pairs
from verl_speculator.models.layers import OutputHead, TokenEmbedding, tables_of
from verl_speculator.models.speculator import Speculator, TokenBatch

# Numbers in the blocks of logits of a chunk: 256 MiB in float32, and on a CPU 32 MiB, whose memory is used again by the
# next chunk instead of being returned to the kernel. The same on every CPU and every accelerator, so that sums are too.
BLOCK_NUMBERS, CPU_BLOCK_NUMBERS = 2**26, 2**23
MIN_CHUNK_ROWS = 16
STATE_TENSORS = 16  # about as many tensors [K · r, E] as unroll keeps for its gradient

Head = Callable[[Tensor], Tensor]


class DraftSums(NamedTuple):
    """The rows of a tensor [9, K] of sums. Micro-batches and ranks are added before anything is divided.

    Attributes:
        ce: [K] the weighted cross-entropy of the valid pairs whose target can be drafted.
        compared: [K] of the valid pairs, the weighted sum of the losses that compare with the base model.
        weighted_ce, weighted_compared: [K] the same with each pair's weight, where the objective has pair weights.
        covered: [K] number of valid pairs whose target can be drafted: all of them without a draft vocabulary.
        pairs: [K] number of valid pairs (`reference.drafted_pairs`).
        correct: [K] pairs whose most likely token is the target.
        reached: [K] pairs whose earlier depths were all correct.
        accepted: [K] pairs that were reached and are correct.
    """

    ce: Tensor
    compared: Tensor
    weighted_ce: Tensor
    weighted_compared: Tensor
    covered: Tensor
    pairs: Tensor
    correct: Tensor
    reached: Tensor
    accepted: Tensor

    def metrics(self, objective: Objective, *, draft_vocabulary: bool = False) -> dict[str, float]:
        """`speculator_loss`, `depth{k}_loss`, `depth{k}_accuracy`, `expected_accept_length`, and with a draft
        vocabulary `coverage`, the share of the targets that can be drafted.

        The expected acceptance length is 1 + Σ_k Π_{j≤k} a_j, where a_j is the share of rows correct at depth j among
        those correct at all earlier depths. A depth without a valid pair ends the sum and has no entry of its own.
        """
        ce_scale, scale = depth_scales(self.covered, self.pairs, objective)
        metrics = {"speculator_loss": float((self.weighted_ce * ce_scale + self.weighted_compared * scale).sum())}
        expected, chain = 1.0, 1.0
        for k, (pairs, reached) in enumerate(zip(self.pairs.tolist(), self.reached.tolist(), strict=True)):
            if pairs:
                metrics[f"depth{k}_loss"] = float(self.ce[k] / self.covered[k].clamp(min=1) + self.compared[k] / pairs)
                metrics[f"depth{k}_accuracy"] = float(self.correct[k]) / pairs
            chain *= float(self.accepted[k]) / reached if reached else 0.0
            expected += chain
        metrics["expected_accept_length"] = expected
        if draft_vocabulary:
            metrics["coverage"] = float(self.covered.sum() / self.pairs.sum().clamp(min=1))
        return metrics


def depth_scales(covered: Tensor, pairs: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """[K] each: `depth_scale` of the cross-entropy and of the losses that compare with the base model."""
    weights = objective.depths(len(pairs))
    return depth_scale(covered, weights), depth_scale(pairs, weights)


def depth_scale(counts: Tensor, weights: Sequence[float]) -> Tensor:
    """[K] the factor of each depth's summed loss: 1 / pairs for the mean over its valid pairs, times its share of the
    weights of the depths that have any. All zeros if none has.

    Args:
        counts: [K] valid pairs of each depth.
        weights: of each depth.
    """
    present = torch.tensor(weights, dtype=torch.float64, device=counts.device) * (counts > 0)
    return present / present.sum().clamp(min=torch.finfo(torch.float64).tiny) / counts.clamp(min=1)


def pair_counts(speculator: Speculator, targets: Tensor, valid: Tensor) -> Tensor:
    """[2, K] the number of pairs whose target can be drafted, and of all that can be reached in drafting.

    Args:
        speculator: knows its draft vocabulary.
        targets, valid: [K, R], as in `alignment.DraftRows`.
    """
    covered = speculator.rows_of(targets) >= 0
    pairs = drafted_pairs(valid, covered)
    return torch.stack([(pairs & covered).sum(1), pairs.sum(1)])


def speculator_loss(
    speculator: Speculator,
    hidden: Tensor,
    tokens: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_rows: Tensor | None = None,
    base_head: Tensor | Head | None = None,
    tables: Mapping[str, Tensor] | None = None,
    counts: Tensor | None = None,
    loss: str | dict[str, float] | Objective = "ce",
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a speculator over all rows and depths, differentiable in `hidden` and in its parameters.

    Under `torch.no_grad`, as in validation, no gradient is computed and no memory is allocated for one.

    Args:
        speculator: any family.
        hidden: [T, D] hidden states of the base model, or what else `unroll` reads; rows without a valid pair cost
            nothing.
        tokens: [T, K] the tokens x_{t+1} … x_{t+K}.
        targets: [T, K] the token that each depth predicts.
        valid: [T, K] bool, the pairs that count.
        teacher_hidden: [R, D] hidden states of the base model, for losses that compare with its distribution. They
            receive no gradient.
        teacher_rows: [T, K] the row of `teacher_hidden` at which the base model predicts the same token.
        base_head: the base model's LM head: its weight [V, D], or a function from states [n, D] to logits [n, V].
        tables: the base model's tables that the speculator uses, `Speculator.frozen_tables`; by default those that it
            was attached to. They receive no gradient.
        counts: [2, K] `pair_counts` of the global batch, of which these rows may be a part; by default those of these
            rows.
        loss: a name, weights by name, or an `Objective`.
        chunk_rows: rows of a chunk, each with all its depths; by default as many as give blocks of `BLOCK_NUMBERS`
            numbers in all.
        compiled: run unroll and closed forms through torch.compile, once for any number of rows.

    Returns:
        The loss, Σ_k Σ pair weight · (ce `depth_scale`_k + compared `depth_scale`_k), and the fields of `DraftSums` by
        name, without a gradient.

    Raises:
        ValueError: if the teacher is needed and not given, or chunk_rows is not positive.
    """
    objective = loss if isinstance(loss, Objective) else Objective.parse(loss)
    if objective.needs_teacher and (teacher_hidden is None or teacher_rows is None or base_head is None):
        raise ValueError("this loss compares with the base: teacher_hidden, teacher_rows and base_head are needed")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: expected at least 1")
    depths = valid.shape[1]
    if counts is None:
        counts = pair_counts(speculator, targets.T, valid.T)
    scales = torch.stack(depth_scales(*counts, objective))
    vocabulary = speculator.draft_tokens
    targets = speculator.rows_of(targets)
    if vocabulary is not None:
        valid = drafted_pairs(valid.T, targets.T >= 0).T

    if not isinstance(hidden, FakeTensor):  # fake tensors have shapes but no values: all rows are kept
        kept = valid.any(1).nonzero().squeeze(-1)
        hidden, tokens, targets, valid = hidden[kept], tokens[kept], targets[kept], valid[kept]
        teacher_rows = None if teacher_rows is None else teacher_rows[kept]
    if chunk_rows is None:  # blocks: the logits, the teacher's, its logarithms, and a soft cap's slopes
        weights, capped = dict(objective.weights), speculator.logit_cap is not None
        blocks = 1 + objective.needs_teacher + ("lk_pure" in weights) + capped
        numbers = blocks * depths * speculator.head_size  # of a row
        if vocabulary is not None and objective.needs_teacher:
            numbers += speculator.vocab_size  # the teacher's logits before they are restricted
        # With few rows in a head the states and activations of unroll are the larger part.
        numbers = max(numbers, STATE_TENSORS * depths * speculator.head(0).shape[1])
        on_cpu = hidden.device.type == "cpu" and not isinstance(hidden, FakeTensor)
        chunk_rows = max(MIN_CHUNK_ROWS, (CPU_BLOCK_NUMBERS if on_cpu else BLOCK_NUMBERS) // numbers)
    if isinstance(base_head, Tensor):
        weight = base_head.detach()
        base_head = lambda states: states @ weight.T  # noqa: E731
    chunked = _ChunkedPass(
        speculator=speculator,
        tokens=tokens,
        targets=targets,
        valid=valid,
        scales=scales,
        objective=objective,
        chunk_rows=chunk_rows,
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach(),
        teacher_rows=teacher_rows,
        base_head=base_head,
        tables=_unrolled_tables(speculator, _frozen_buffers(speculator) if tables is None else tables),
        # Asked here: inside an autograd function gradients are always off, and `needs_input_grad` ignores no_grad.
        needs_grad=torch.is_grad_enabled(),
        unroll=compile_once(_unroll) if compiled else _unroll,
        kernel=choose_kernel(objective, chunk_rows * depths, speculator.head_size, hidden.device.type, compiled),
    )
    total, sums = _ChunkedLoss.apply(chunked, hidden, *speculator.unroll_parameters().values())
    return total, DraftSums(*sums)._asdict()


class DraftLoss(nn.Module):
    """A speculator and its loss: unroll, head and loss in one module's forward, the unit that FSDP shards.

    Outside of that forward the parameters of a sharded speculator are shards, so nothing else may use them in training.

    Args:
        speculator: any family.
        objective: what is minimised.
        chunk_rows, compiled: as in `speculator_loss`.
    """

    def __init__(
        self,
        speculator: Speculator,
        objective: Objective | None = None,
        chunk_rows: int | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.speculator, self.objective = speculator, objective or Objective()
        self.chunk_rows, self.compiled = chunk_rows, compiled

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        targets: Tensor,
        valid: Tensor,
        *,
        batch: TokenBatch | None = None,
        teacher_rows: Tensor | None = None,
        tables: Mapping[str, Tensor] | None = None,
        **more: Any,
    ) -> dict[str, Tensor]:
        """
        Args:
            hidden: what `HiddenStateHook` took; without `batch` the states of the rows of `alignment.DraftRows` that
                `unroll` reads.
            tokens, targets, valid: [R, K], [K, R] and [K, R], as in `DraftRows`.
            batch: the tokens that the base model read, and the rows.
            teacher_rows: [K, R] the row of `teacher_hidden` that predicts each target.
            tables: of `speculator_loss`.
            more: `counts`, `teacher_hidden` and `base_head` of `speculator_loss`.

        Returns:
            `total`, which carries the gradient, and `sums` [9, K] for `DraftSums`. A dictionary, because sharding
            wrappers look for tensors in it but not in a class. Without any row the loss is 0 and its gradients are
            zeros, so that every rank takes part in every reduction.
        """
        if batch is not None:
            hidden = self.speculator.draft_states(hidden, tokens, batch, tables)
        options = {"loss": self.objective, "chunk_rows": self.chunk_rows, "compiled": self.compiled}
        teacher_rows = None if teacher_rows is None else teacher_rows.T
        total, sums = speculator_loss(
            self.speculator,
            hidden,
            tokens,
            targets.T,
            valid.T,
            teacher_rows=teacher_rows,
            tables=tables,
            **options,
            **more,
        )
        return {"total": total, "sums": torch.stack(tuple(sums.values()))}


@contextmanager
def _without_parameter_views(module: nn.Module) -> Iterator[None]:
    """Remove the tensors that FSDP1 sets as attributes over a module's parameters during its forward pass. Attributes
    are looked up before parameters, so the tensors that `functional_call` sets as parameters would not be used."""
    removed = []
    for part in module.modules():
        attributes = vars(part)
        removed += [(attributes, name, attributes.pop(name)) for name in part._parameters if name in attributes]
    try:
        yield
    finally:
        for attributes, name, tensor in removed:
            attributes[name] = tensor


def _frozen_buffers(speculator: Speculator) -> dict[str, Tensor]:
    """The base model's tables that a speculator is attached to, by the names of their buffers."""
    return {name: table.weight for name, table in tables_of(speculator).items() if table.source == BASE_FROZEN}


def _unrolled_tables(speculator: Speculator, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that `unroll` and heads use: one that reads the sequence has looked up its embeddings before."""
    layers, is_done = tables_of(speculator), speculator.reads_sequence
    return {name: table for name, table in tables.items() if not (is_done and layers[name].embeds)}


def _unroll(speculator: Speculator, parameters: dict[str, Tensor], hidden: Tensor, tokens: Tensor) -> Tensor:
    """[K, r, E] the states of a chunk, with `parameters` in place of the speculator's own."""
    return functional_call(speculator, parameters, (hidden, tokens))


def pair_weights(objective: Objective, acceptance: Tensor) -> Tensor:
    """[K, r] weights of pairs from α [K, r], as `Objective.pair_weights` defines them."""
    weights = torch.cat([torch.ones_like(acceptance[:1]), acceptance[:-1]]).cumprod(0)
    if objective.pair_weights == "gain":
        tail = torch.ones_like(acceptance[0])  # 1 + α_{k+1} + α_{k+1} α_{k+2} + …, from the last depth
        for k in range(len(acceptance) - 2, -1, -1):
            tail = 1 + acceptance[k + 1] * tail
            weights[k] *= tail
    return weights


class _ChunkedLoss(torch.autograd.Function):
    """The loss and its sums. `forward` computes the gradients, `backward` scales them."""

    @staticmethod
    def forward(ctx: Any, chunked: _ChunkedPass, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters[0].dtype
        with torch.autocast(device, enabled=False), _without_parameter_views(chunked.speculator):
            chunked.run(hidden.detach(), parameters, compute_dtype, ctx.needs_input_grad[1:])
        ctx.gradients, ctx.hidden_gradient = chunked.gradients, chunked.hidden_gradient
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.mark_non_differentiable(chunked.sums)
        sums, (ce_scale, scale) = DraftSums(*chunked.sums), chunked.scales.to(chunked.sums.dtype)
        return (sums.weighted_ce * ce_scale + sums.weighted_compared * scale).sum(), chunked.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden = None if ctx.hidden_gradient is None else ctx.hidden_gradient * scale.to(ctx.hidden_gradient.dtype)
        gradients = []
        for i, dtype in enumerate(ctx.dtypes):  # each float32 sum is freed before the next one is converted
            gradient, ctx.gradients[i] = ctx.gradients[i], None
            gradients.append(None if gradient is None else gradient.mul_(scale).to(dtype))
            del gradient
        return None, hidden, *gradients


@dataclass
class _ChunkedPass:
    """Everything that a loss is computed from and that receives no gradient, and one pass over all chunks.

    Embedding tables and heads, which are as large as the vocabulary, get one gradient in the accumulation dtype and no
    second one to be added to it: a table's is added row by row, a head's product is accumulated in place.

    Attributes, besides the arguments of `speculator_loss`:
        needs_grad: whether anything needs a gradient.
        sums: [9, K] of `DraftSums`, in the accumulation dtype.
        gradients: of each parameter, in the accumulation dtype; None where not needed.
        hidden_gradient: [T, D], or None.
    """

    speculator: Speculator
    tokens: Tensor
    targets: Tensor
    valid: Tensor
    scales: Tensor
    objective: Objective
    chunk_rows: int
    teacher_hidden: Tensor | None
    teacher_rows: Tensor | None
    base_head: Head | None
    tables: Mapping[str, Tensor]
    needs_grad: bool
    unroll: Callable[..., Tensor]
    kernel: Kernel

    def run(
        self, hidden: Tensor, parameters: Sequence[Tensor], compute_dtype: torch.dtype, needed: Sequence[bool]
    ) -> None:
        """Compute sums and gradients.

        Args:
            hidden: [T, D] without a graph.
            parameters: of the speculator, in the order of `unroll_parameters`.
            compute_dtype: of products.
            needed: whether `hidden`, then each parameter, needs a gradient where gradients are on.
        """
        needed = [self.needs_grad and each for each in needed]
        self.needs_grad, self.hidden = any(needed), hidden
        self.hidden_gradient = torch.zeros_like(hidden) if needed[0] else None
        dtype = torch.float32 if compute_dtype in (torch.bfloat16, torch.float16) else compute_dtype
        self.gradients = [
            torch.zeros(parameter.shape, dtype=dtype, device=parameter.device) if each else None
            for parameter, each in zip(parameters, needed[1:], strict=True)
        ]
        rows, depths = self.valid.shape
        self.sums = hidden.new_zeros(len(DraftSums._fields), depths, dtype=dtype)
        # After the parameters the base model's tables, which have no gradient, and of which an embedding is not cast:
        # only the rows that are looked up are.
        self.names = [*self.speculator.unroll_parameters(), *self.tables]
        layers = tables_of(self.speculator)
        self.layer_types = [type(layers[name]) if name in layers else None for name in self.names]
        self.gradients += [None] * len(self.tables)
        self.compute_dtype = compute_dtype
        self.parameters = [
            tensor.detach() if name in self.tables and layer is TokenEmbedding else tensor.detach().to(compute_dtype)
            for name, tensor, layer in zip(
                self.names, [*parameters, *self.tables.values()], self.layer_types, strict=True
            )
        ]
        # Consecutive depths with the same head are one product: (index of the parameter, slice of depths) each.
        indices = {id(layers[name].weight): i for i, name in enumerate(self.names) if name in layers}
        runs = groupby(range(depths), key=lambda k: indices[id(self.speculator.head(k))])
        runs = [(index, list(ks)) for index, ks in runs]
        self.heads = [(index, slice(ks[0], ks[-1] + 1)) for index, ks in runs]
        count = -(-rows // self.chunk_rows)  # chunks of nearly equal size: a small last one would waste a product
        for i in range(count):
            self._add(slice(i * rows // count, (i + 1) * rows // count))

    def _add(self, chunk: slice) -> None:
        """Add one chunk's losses and gradients to the sums."""
        tokens = self.tokens[chunk]
        leaves, leaf_tokens = self._leaves(tokens)
        # A copy: torch.compile would compile once more for a view of a tensor of another size.
        hidden = self.hidden[chunk].to(self.compute_dtype, copy=True)
        hidden.requires_grad_(self.hidden_gradient is not None)
        with torch.set_grad_enabled(self.needs_grad):
            states = self.unroll(self.speculator, dict(zip(self.names, leaves, strict=True)), hidden, leaf_tokens)
        state_gradients = self._loss_and_gradients(chunk, states.detach())
        trained = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        inputs = [leaves[i] for i in trained] + [hidden] * hidden.requires_grad
        if not inputs:
            return
        gradients = list(torch.autograd.grad(states, inputs, state_gradients, allow_unused=True))
        if self.hidden_gradient is not None:
            self.hidden_gradient[chunk] = gradients.pop()
        for i, gradient in zip(trained, gradients, strict=True):
            if gradient is None:  # with a single depth, parameters of later depths are not used
                continue
            if self.layer_types[i] is TokenEmbedding:
                self.gradients[i].index_add_(0, tokens.flatten(), gradient.to(self.sums.dtype))
            else:
                self.gradients[i].add_(gradient)

    def _leaves(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """The parameters as leaves of the chunk's own graph, and the token ids to call it with.

        An embedding table is replaced by the rows that the chunk looks up, in order, so that its gradient has as many
        rows as the chunk has tokens instead of V.
        """
        rows, leaves = tokens.flatten(), []
        for parameter, layer_type, gradient in zip(self.parameters, self.layer_types, self.gradients, strict=True):
            is_table = layer_type is TokenEmbedding
            leaf = F.embedding(rows, parameter).to(self.compute_dtype) if is_table else parameter.detach()
            leaves.append(leaf.requires_grad_(gradient is not None and layer_type is not OutputHead))
        return leaves, torch.arange(rows.shape[0], device=rows.device).view_as(tokens)

    def _loss_and_gradients(self, chunk: slice, states: Tensor) -> Tensor | None:
        """Add the losses and head gradients of states [K, r, E]; the gradient of the total by the states [K, r, E]."""
        depths, rows, _ = states.shape
        valid, targets = self.valid[chunk].T, self.targets[chunk].T
        covered, targets = valid & (targets >= 0), targets.flatten()
        logits, cap, cap_slope = self._logits(states), self.speculator.logit_cap, None
        if cap is not None:  # c·tanh(z/c), whose slope is 1 − tanh²(z/c)
            logits = logits.div_(cap).tanh_()
            cap_slope = 1 - logits * logits if self.needs_grad else None
            logits.mul_(cap)
        correct = valid & (logits.argmax(-1) == targets).view(depths, rows)
        teacher = self._teacher(chunk)
        # The kernel's gradient is multiplied by the scale of one of the two losses, so that of the other is relative.
        (ce_scale, scale), ce_factor = self.scales.to(self.sums.dtype), None
        if not self.objective.needs_teacher:
            scale, counted = ce_scale, covered
        else:
            counted = valid
            if self.speculator.draft_tokens is not None and "ce" in dict(self.objective.weights):
                relative = torch.where(scale > 0, ce_scale / scale, 0)
                ce_factor = (covered * relative.unsqueeze(-1)).flatten()
        arguments = (targets.clamp(min=0), teacher, self.objective, self.needs_grad, ce_factor)
        ce, compared, gradient, acceptance = self.kernel(logits, *arguments)
        del teacher, logits, arguments
        ce, compared = (
            torch.where(covered, ce.view(depths, rows), 0),
            torch.where(valid, compared.view(depths, rows), 0),
        )
        weights = counted.to(self.sums.dtype)
        if acceptance is not None:
            weights = weights * pair_weights(self.objective, acceptance.view(depths, rows) * counted)
        accepted = correct.cummin(0).values
        reached = valid & torch.cat([torch.ones_like(accepted[:1]), accepted[:-1]])
        weighted = (ce * weights, compared * weights)
        per_pair = DraftSums(ce, compared, *weighted, covered, valid, correct, reached, accepted)
        for total, values in zip(self.sums, per_pair, strict=True):
            total += values.sum(1)
        if not self.needs_grad:
            return None
        gradient = gradient if cap_slope is None else gradient.mul_(cap_slope)
        weights = weights * scale.unsqueeze(-1)
        return self._state_gradients(states, gradient.mul_(weights.reshape(-1, 1)).view(depths, rows, -1))

    def _logits(self, states: Tensor) -> Tensor:
        """[K · r, V′] in the accumulation dtype, depth by depth."""
        depths, rows, _ = states.shape
        products = (states[ks].flatten(0, 1) @ self.parameters[index].T for index, ks in self.heads)
        if len(self.heads) == 1:
            return next(products).to(self.sums.dtype)
        logits = states.new_empty(depths * rows, self.speculator.head_size, dtype=self.sums.dtype)
        for (_, ks), product in zip(self.heads, products, strict=True):
            logits[ks.start * rows : ks.stop * rows] = product
        return logits

    def _state_gradients(self, states: Tensor, gradient: Tensor) -> Tensor:
        """[K, r, E] the gradient by the states, from that by the logits [K, r, V′]; adds the gradients of the heads."""
        state_gradients = states.new_empty(states.shape)  # contiguous, for the products to be written into it
        for index, ks in self.heads:
            logit_gradient, total = gradient[ks].flatten(0, 1), self.gradients[index]
            if total is not None:  # in the accumulation dtype: rounding to bf16 before the product would lose digits
                total.addmm_(logit_gradient.T, states[ks].flatten(0, 1).to(total.dtype))
            out = state_gradients[ks].flatten(0, 1)
            torch.mm(logit_gradient.to(states.dtype), self.parameters[index], out=out)
        return state_gradients

    def _teacher(self, chunk: slice) -> Teacher:
        """The base model's distribution for each pair of a chunk, [K · r, V′] depth by depth.

        Depth k at row t and depth k − 1 at row t + 1 compare with the same distribution, so it is computed for each
        distinct row of the teacher once.
        """
        if not self.objective.needs_teacher:
            return {}
        rows = self.teacher_rows[chunk]
        if isinstance(rows, FakeTensor):  # as many distinct rows as r consecutive positions of one document have
            distinct, index = rows.new_zeros(rows.shape[0] + rows.shape[1] - 1), rows
        else:
            rows = torch.where(self.valid[chunk], rows, rows[:, :1])
            distinct, index = rows.unique(return_inverse=True)
        with torch.no_grad():
            logits = self.base_head(self.teacher_hidden[distinct]).to(self.sums.dtype)
            teacher = teacher_distribution(logits, self.objective, self.speculator.draft_tokens)
        del logits
        index = index.T.flatten()
        return {temperature: distribution.rows(index) for temperature, distribution in teacher.items()}
