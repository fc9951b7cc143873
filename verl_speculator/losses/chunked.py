"""The speculator's loss in row chunks, with the gradients made in the forward pass.

Logits of K depths are the largest tensors of training: K·T·V numbers, and as many gradients. Here a chunk of rows runs
through unroll, head and loss, gives its gradients, and is gone before the next one; nothing is computed twice. Sums
over chunks are kept in float32, in place, and become gradients in the parameters' type one tensor at a time.

Shapes: T rows, K depths, D base width, E speculator width, V vocabulary, R rows of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from verl_speculator.config.objective import Objective
from verl_speculator.losses.closed_form import Kernel, Teacher, choose_kernel, compile_once, teacher_distribution
from verl_speculator.models.layers import OutputHead, TokenEmbedding
from verl_speculator.models.speculator import Speculator

# Numbers in one block of logits: 256 MiB in float32. Independent of the machine, so that sums are too.
BLOCK = 2**26
LEAST_ROWS = 16

Head = Callable[[Tensor], Tensor]


def default_chunk_rows(vocab_size: int, depths: int, objective: Objective, *, capped: bool = False) -> int:
    """Rows of a chunk whose blocks of logits, the teacher's and a soft cap's slopes among them, have a bounded size."""
    blocks = 1 + objective.needs_teacher + ("lk_pure" in dict(objective.weights)) + capped
    return max(LEAST_ROWS, BLOCK // (vocab_size * depths) // blocks)


def depth_scale(counts: Tensor, weights: Sequence[float]) -> Tensor:
    """[K] what a depth's summed loss is multiplied with: the mean over its valid pairs, then by weight over the depths
    that have any. All zeros where none has.

    Args:
        counts: [K] valid pairs of each depth.
        weights: of each depth.
    """
    present = torch.tensor(weights, dtype=torch.float64, device=counts.device) * (counts > 0)
    return present / present.sum().clamp(min=torch.finfo(torch.float64).tiny) / counts.clamp(min=1)


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
    counts: Tensor | None = None,
    loss: str | dict[str, float] | Objective = "ce",
    chunk_rows: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a speculator over all rows and depths, differentiable in `hidden` and in its parameters.

    Where gradients are switched off (`torch.no_grad`), as in validation, none is computed and no room is made for any.

    The sum over each depth's valid pairs is divided by the depth's count and averaged over the depths that have any,
    by the objective's depth weights.

    Args:
        speculator: any family.
        hidden: [T, D] the base's states after its final norm. Rows without a valid pair cost nothing.
        tokens: [T, K] the tokens x_{t+1} … x_{t+K}.
        targets: [T, K] the token that each depth predicts.
        valid: [T, K] bool, the pairs that count.
        teacher_hidden: [R, D] states of the base, for losses that compare with its distribution. No gradient flows
            into them.
        teacher_rows: [T, K] the row of `teacher_hidden` at which the base predicts the same token.
        base_head: the base's output head, as a weight [V, D] or as a function from states [r, D] to logits [r, V].
        counts: [K] valid pairs of each depth in the whole batch, of which this may be a part; those of `valid` by
            default.
        loss: a name, weights by name, or an `Objective`.
        chunk_rows: rows at a time, each with all its depths; `default_chunk_rows` by default.
        compiled: run unroll and closed forms through torch.compile, which fuses norms, activations and the passes over
            the logits. Any number of rows runs through the same code.

    Returns:
        The loss, and per depth, without a gradient, [K] each: `loss` (summed), `weighted` (the same with each pair's
        weight, if it has one), `pairs`, `correct`, `reached`, `accepted`.

    Raises:
        ValueError: if the teacher is asked for and not given, or chunk_rows is not positive.
    """
    objective = loss if isinstance(loss, Objective) else Objective.parse(loss)
    if objective.needs_teacher and (teacher_hidden is None or teacher_rows is None or base_head is None):
        raise ValueError("this loss compares with the base: teacher_hidden, teacher_rows and base_head are needed")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: expected at least 1")
    counts = valid.sum(0) if counts is None else counts
    scale = depth_scale(counts, objective.depths(valid.shape[1]))

    # Where shapes are only reckoned with, which rows are valid is not known: all are kept.
    if not isinstance(hidden, FakeTensor):
        kept = valid.any(1).nonzero().squeeze(-1)
        hidden, tokens, targets, valid = hidden[kept], tokens[kept], targets[kept], valid[kept]
        teacher_rows = None if teacher_rows is None else teacher_rows[kept]
    capped = speculator.logit_cap is not None
    rows = chunk_rows or default_chunk_rows(speculator.vocab_size, valid.shape[1], objective, capped=capped)
    if isinstance(base_head, Tensor):
        weight = base_head.detach()
        base_head = lambda states: states @ weight.T  # noqa: E731
    job = _LossInputs(
        speculator=speculator,
        tokens=tokens,
        targets=targets,
        valid=valid,
        scale=scale,
        objective=objective,
        chunk_rows=rows,
        teacher_hidden=None if teacher_hidden is None else teacher_hidden.detach(),
        teacher_rows=teacher_rows,
        base_head=base_head,
        # Within an autograd function gradients are always off, and `needs_input_grad` does not know whether they were.
        training=torch.is_grad_enabled(),
        unroll=compile_once(_unroll) if compiled else _unroll,
        kernel=choose_kernel(objective, rows * valid.shape[1], speculator.vocab_size, hidden.device.type, compiled),
    )
    total, *sums = _ChunkedLoss.apply(job, hidden, *speculator.unroll_parameters().values())
    return total, dict(zip(SUMS, sums, strict=True))


@contextmanager
def _parameters_alone(module: nn.Module) -> Iterator[None]:
    """Without the plain tensors that FSDP1 lays over a module's parameters during its forward pass: an attribute is
    found before a parameter of its name, so that `functional_call` would put its tensors where nobody looks."""
    hidden = []
    for part in module.modules():
        attributes = vars(part)
        hidden += [(attributes, name, attributes.pop(name)) for name in part._parameters if name in attributes]
    try:
        yield
    finally:
        for attributes, name, tensor in hidden:
            attributes[name] = tensor


def _unroll(speculator: Speculator, parameters: dict[str, Tensor], state: Tensor, tokens: Tensor) -> Tensor:
    """[K, r, E] the states of a chunk, with these parameters in the place of the speculator's own."""
    return functional_call(speculator, parameters, (state, tokens))


def pair_weights(objective: Objective, acceptance: Tensor) -> Tensor:
    """[K, r] weights of pairs from α [K, r], as `Objective.pair_weights` defines them."""
    weights = torch.cat([torch.ones_like(acceptance[:1]), acceptance[:-1]]).cumprod(0)
    if objective.pair_weights == "gain":
        tail = torch.ones_like(acceptance[0])
        for k in range(len(acceptance) - 2, -1, -1):
            tail = 1 + acceptance[k + 1] * tail
            weights[k] *= tail
    return weights


SUMS = ("loss", "weighted", "pairs", "correct", "reached", "accepted")


@dataclass
class _LossInputs:
    """All of a loss that carries no gradient."""

    speculator: Speculator
    tokens: Tensor
    targets: Tensor
    valid: Tensor
    scale: Tensor
    objective: Objective
    chunk_rows: int
    teacher_hidden: Tensor | None
    teacher_rows: Tensor | None
    base_head: Head | None
    training: bool
    unroll: Callable[..., Tensor]
    kernel: Kernel

    def chunks(self) -> Iterator[slice]:
        """Of nearly the same size, so that none is too small to be worth a product."""
        rows = self.tokens.shape[0]
        count = -(-rows // self.chunk_rows)
        return (slice(i * rows // count, (i + 1) * rows // count) for i in range(count))

    def teacher(self, chunk: slice, dtype: torch.dtype) -> tuple[Teacher, Tensor | None]:
        """The base's distribution at every state that a chunk compares with, each computed once, and [r, K] which of
        them each pair's is: the rows of a document share all but the last of theirs."""
        if not self.objective.needs_teacher:
            return {}, None
        rows = self.teacher_rows[chunk]
        if isinstance(rows, FakeTensor):  # as many as a document's consecutive rows have
            distinct, which = rows.new_zeros(rows.shape[0] + rows.shape[1] - 1), rows
        else:
            rows = torch.where(self.valid[chunk], rows, rows[:, :1])
            distinct, which = rows.unique(return_inverse=True)
        with torch.no_grad():
            logits = self.base_head(self.teacher_hidden[distinct]).to(dtype)
            return teacher_distribution(logits, self.objective), which


class _ChunkedLoss(torch.autograd.Function):
    """Loss and sums; the gradients are made here and only scaled on the way back."""

    @staticmethod
    def forward(ctx: Any, job: _LossInputs, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters[0].dtype
        with torch.autocast(device, enabled=False), _parameters_alone(job.speculator):
            wanted = [job.training and want for want in ctx.needs_input_grad[1:]]
            run = _ChunkedPass(job, hidden.detach(), parameters, compute, wanted)
            for chunk in job.chunks():
                run.chunk(chunk)
        ctx.gradients, ctx.hidden_gradient = run.gradients, run.hidden_gradient
        ctx.dtypes = [p.dtype for p in parameters]
        total = (run.sums["weighted"] * job.scale.to(run.wide)).sum()
        found = tuple(run.sums[name] for name in SUMS)
        ctx.mark_non_differentiable(*found)
        return total, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden = None if ctx.hidden_gradient is None else ctx.hidden_gradient * scale.to(ctx.hidden_gradient.dtype)
        found = []
        for i, dtype in enumerate(ctx.dtypes):
            total, ctx.gradients[i] = ctx.gradients[i], None
            found.append(None if total is None else total.mul_(scale).to(dtype))
            del total
        return None, hidden, *found


class _ChunkedPass:
    """One pass over all chunks, and what it adds up.

    Tables and heads, which are as large as the vocabulary, are never there twice: a table's gradient is added row by
    row, a head's product is added into the sum.

    Args:
        job: what is computed.
        hidden: [T, D] without a gradient.
        parameters: of the speculator, in its order.
        compute: the type to multiply in.
        wanted: whether the gradient of `hidden`, then of each parameter, is asked for.

    Attributes:
        sums: [K] for each name of SUMS.
        gradients: of each parameter, in float32 at least; None where not asked for.
        hidden_gradient: [T, D], or None.
        wide: the type of sums and logits.
    """

    def __init__(
        self,
        job: _LossInputs,
        hidden: Tensor,
        parameters: Sequence[Tensor],
        compute: torch.dtype,
        wanted: Sequence[bool],
    ) -> None:
        self.job, self.hidden = job, hidden
        self.wide = torch.float32 if compute in (torch.bfloat16, torch.float16) else compute
        self.training = any(wanted)
        self.cap = job.speculator.logit_cap
        self.parameters = [p.detach().to(compute) for p in parameters]
        self.hidden_gradient = torch.zeros_like(hidden) if wanted[0] else None
        self.gradients = [
            torch.zeros(p.shape, dtype=self.wide, device=p.device) if want else None
            for p, want in zip(parameters, wanted[1:], strict=True)
        ]
        self.sums = {name: hidden.new_zeros(job.valid.shape[1], dtype=self.wide) for name in SUMS}
        modules = job.speculator.modules()
        kinds = {id(m.weight): type(m) for m in modules if isinstance(m, (TokenEmbedding, OutputHead))}
        self.names, own = zip(*job.speculator.unroll_parameters().items(), strict=True)
        self.kinds = [kinds.get(id(p)) for p in own]
        places = {id(p): i for i, p in enumerate(own)}
        heads = [places[id(job.speculator.head(k))] for k in range(job.valid.shape[1])]
        # Depths that share a head follow each other: one product serves all of them.
        self.heads = list(_runs(heads))

    def chunk(self, chunk: slice) -> None:
        """Add one chunk's losses and gradients to the sums."""
        job, tokens = self.job, self.job.tokens[chunk]
        leaves, numbers = self._leaves(tokens)
        # A copy: torch.compile would make code of its own for a view of a tensor of another size.
        state = self.hidden[chunk].to(self.parameters[0].dtype, copy=True)
        if self.hidden_gradient is not None:
            state = state.requires_grad_()
        with torch.set_grad_enabled(self.training):
            states = job.unroll(job.speculator, dict(zip(self.names, leaves, strict=True)), state, numbers)
        backs = self._loss_and_gradients(chunk, states.detach())
        if self.training:
            self._backward(chunk, states, backs, state, leaves, tokens)

    def _loss_and_gradients(self, chunk: slice, states: Tensor) -> Tensor | None:
        """Heads and losses for states [K, r, E]; [K, r, E] the gradient of the total by the states, in training."""
        job = self.job
        depths, rows, _ = states.shape
        valid, targets = job.valid[chunk].T, job.targets[chunk].T.flatten()
        logits, slope = self._logits(states), None
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_()
            slope = 1 - logits * logits if self.training else None
            logits.mul_(self.cap)
        hit = (logits.argmax(-1) == targets).view(depths, rows)
        teacher, which = job.teacher(chunk, self.wide)
        said = {temperature: base.rows(which.T.flatten()) for temperature, base in teacher.items()}
        del teacher
        losses, gradient, acceptance = job.kernel(logits, targets, said, job.objective, self.training)
        del said, logits
        losses, weights = torch.where(valid, losses.view(depths, rows), 0), valid.to(self.wide)
        if acceptance is not None:
            weights = weights * pair_weights(job.objective, acceptance.view(depths, rows) * valid)
        accepted = (hit & valid).cummin(0).values
        reached = valid & torch.cat([torch.ones_like(accepted[:1]), accepted[:-1]])
        found = (losses, losses * weights, valid, hit & valid, reached, accepted)
        for name, per_pair in zip(SUMS, found, strict=True):
            self.sums[name] += per_pair.sum(1)
        if not self.training:
            return None
        weights = weights * job.scale.to(self.wide).unsqueeze(-1)
        gradient = gradient if slope is None else gradient.mul_(slope)
        return self._backs(states, gradient.mul_(weights.reshape(-1, 1)).view(depths, rows, -1))

    def _backs(self, states: Tensor, gradient: Tensor) -> Tensor:
        """[K, r, E] the gradient by the states from that by the logits [K, r, V]; the heads' own are added up."""
        backs = torch.empty_like(states)
        for at, ks in self.heads:
            part = gradient[ks].flatten(0, 1)
            if self.gradients[at] is not None:
                add_product_(self.gradients[at], part, states[ks].flatten(0, 1))
            torch.mm(part.to(states.dtype), self.parameters[at], out=backs[ks].flatten(0, 1))
        return backs

    def _logits(self, states: Tensor) -> Tensor:
        """[K · r, V] in the wide type, depth by depth."""
        depths, rows, _ = states.shape
        products = (states[ks].flatten(0, 1) @ self.parameters[at].T for at, ks in self.heads)
        if len(self.heads) == 1:
            return next(products).to(self.wide)
        logits = states.new_empty(depths * rows, self.job.speculator.vocab_size, dtype=self.wide)
        for (_, ks), product in zip(self.heads, products, strict=True):
            logits[ks.start * rows : ks.stop * rows] = product
        return logits

    def _leaves(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """The parameters as the chunk's own leaves, and the token numbers that go with them.

        A table is replaced by the rows that this chunk looks up, in order, so that its gradient is as small as they
        are.
        """
        rows, leaves = tokens.flatten(), []
        for parameter, kind, total in zip(self.parameters, self.kinds, self.gradients, strict=True):
            leaf = F.embedding(rows, parameter) if kind is TokenEmbedding else parameter.detach()
            leaves.append(leaf.requires_grad_(self.training and total is not None and kind is not OutputHead))
        return leaves, torch.arange(rows.shape[0], device=rows.device).view_as(tokens)

    def _backward(
        self, chunk: slice, states: Tensor, backs: Tensor, state: Tensor, leaves: list[Tensor], tokens: Tensor
    ) -> None:
        """Through the chunk's unroll, into the sums."""
        inputs = [(i, leaf) for i, leaf in enumerate(leaves) if leaf.requires_grad]
        asked = [leaf for _, leaf in inputs] + [state] * (self.hidden_gradient is not None)
        if not asked:
            return
        found = list(torch.autograd.grad(states, asked, backs, allow_unused=True))
        if self.hidden_gradient is not None:
            self.hidden_gradient[chunk] = found.pop()
        for (i, _), gradient in zip(inputs, found, strict=True):
            if gradient is None:  # at a single depth the later depths' parameters rest
                continue
            if self.kinds[i] is TokenEmbedding:
                self.gradients[i].index_add_(0, tokens.flatten(), gradient.to(self.gradients[i].dtype))
            else:
                self.gradients[i].add_(gradient)


def _runs(values: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each run of equal values, and where it stands."""
    start = 0
    for value, run in groupby(values):
        stop = start + len(list(run))
        yield value, slice(start, stop)
        start = stop


def add_product_(total: Tensor, gradient: Tensor, output: Tensor) -> None:
    """total += gradientᵀ · output, in the type of `total` and in place: rounding to a half type would lose digits.

    Args:
        total: [V, E]
        gradient: [r, V] in the type of `total`.
        output: [r, E]
    """
    total.addmm_(gradient.T, output.to(total.dtype))
