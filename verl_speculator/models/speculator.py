"""The contract of a speculator family. A model computes hidden states and logits; it never sees a loss or an optimizer.

Shapes: T rows, K depths, D base width, E speculator width, M merge width, V vocabulary, V′ draft vocabulary: the part
of the vocabulary that the speculator can draft, V′ = V without one.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from verl_speculator.base_model.hidden_states import POST_NORM
from verl_speculator.config.schema import SpeculatorConfig

FACTOR, DIVISOR, CAP = "factor", "divisor", "cap"
# By model type: a setting of its transformers configuration, and what the architecture's code does with it. The name of
# a setting does not tell: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X, and MPT never reads its
# `logit_scale`.
TRANSFORMS = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), ("logit_scale", FACTOR)),
    "falcon_h1": ("lm_head_multiplier", FACTOR),
    "hyperclovax": ("logits_scaling", FACTOR),
    **dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), ("logits_scaling", DIVISOR)),
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "nanochat", "vaultgemma"),
        ("final_logit_softcapping", CAP),
    ),
    "recurrent_gemma": ("logits_soft_cap", CAP),
    "xlstm": ("output_logit_soft_cap", CAP),
}


class LogitTransform(NamedTuple):
    """logits = cap · tanh(scale · W h / cap); without a cap scale · W h.

    Attributes:
        scale: the factor, which can be folded into W.
        cap: the soft cap, or None.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """[..., V] logits from the products W h."""
        return soft_cap(products if self.scale == 1 else products * self.scale, self.cap)


def logit_transform(config: Any) -> LogitTransform:
    """Scale and cap of a Hugging Face configuration by TRANSFORMS; neither for a model type without a row."""
    settings = config.get_text_config()
    name, kind = TRANSFORMS.get(settings.model_type, (None, None))
    value = None if name is None else getattr(settings, name, None)
    if not value:
        return LogitTransform()
    if kind == CAP:
        return LogitTransform(cap=float(value))
    return LogitTransform(float(value) if kind == FACTOR else 1 / float(value))


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), or the logits themselves."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Slot(NamedTuple):
    """Where the module holds a tensor of a checkpoint.

    Attributes:
        parameter: name of the parameter.
        part: (axis, start, length) of the tensor within the parameter; None for all of it. Tensors that take part in
            one matrix product or one lookup are parts of one parameter.
    """

    parameter: str
    part: tuple[int, int, int] | None = None

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """A view of the tensor in a state dictionary of the module."""
        parameter = state[self.parameter]
        return parameter if self.part is None else parameter.narrow(*self.part)


class TokenBatch(NamedTuple):
    """A batch of documents as the base model reads it, flattened to N tokens.

    Attributes:
        tokens: [N]
        documents: [B, 2] the first token of each document, ascending, and their number. Other tokens are padding.
        rows: [R] the tokens to draft after, ascending.
    """

    tokens: Tensor
    documents: Tensor
    rows: Tensor

    @property
    def positions(self) -> Tensor:
        """[N] the place of each token in its document."""
        index, starts = torch.arange(len(self.tokens), device=self.tokens.device), self.documents[:, 0]
        document = torch.searchsorted(starts, index.to(starts), right=True) - 1
        return index - starts[document.clamp(min=0)]

    def without_padding(self) -> tuple[Tensor, TokenBatch]:
        """The indices [n] of the tokens that are part of documents, and the batch of these alone."""
        starts, lengths = self.documents.to(self.tokens.device).unbind(1)
        ends = lengths.cumsum(0)
        shifts = (starts - ends + lengths).repeat_interleave(lengths)
        index = torch.arange(len(shifts), device=shifts.device) + shifts
        documents = torch.stack([ends - lengths, lengths], dim=1)
        return index, TokenBatch(self.tokens[index], documents, torch.searchsorted(index, self.rows))


class DraftState(NamedTuple):
    """What a draft carries from one depth to the next.

    Attributes:
        output: [T, E] the state that the head of the depth is multiplied with; before the first step the hidden state
            [T, D].
        cell: [T, M] further state of the family (an LSTM's cell, the hidden state itself), or None.
        depth: the depth that the next step computes.
        recurrent: [T, E] the state that the next step reads, where it is not `output`.
        sequence: what the draft reads of the tokens before, the same for all rows that continue one sequence.
    """

    output: Tensor
    cell: Tensor | None
    depth: int
    recurrent: Tensor | None = None
    sequence: Any = None

    @property
    def carried(self) -> Tensor:
        """[T, E] the state that the next step reads."""
        return self.output if self.recurrent is None else self.recurrent


class Speculator(nn.Module, abc.ABC):
    """A draft model that predicts tokens from one hidden state of the base model.

    Args:
        config: family and widths.
        hidden_size: D.
        vocab_size: V, the number of rows of the base model's LM head.

    Attributes:
        draft_tokens: [V′] the token of each row of a head, ascending; None without a draft vocabulary.
    """

    method: ClassVar[str]
    # Which hidden state of the base model it reads (`base_model.hidden_states`).
    hidden_state_source: str = POST_NORM
    # Number of the base model's first decoder layers that the draft runs; None if it reads one hidden state.
    shared_layers: int | None = None
    # Whether the state of a depth depends on the tokens before it.
    reads_tokens: ClassVar[bool] = True
    # Whether a draft depends on the states and tokens of all positions before it, not on one state alone.
    reads_sequence: ClassVar[bool] = False
    # Number of its own attention layers, each with a cache of the sequence in decoding.
    cache_layers: int = 0
    # Whether the heads read states like the base model's. A head copied from the LM head then keeps its scale, with
    # the base model's logit scale folded in, and the logits get the base model's soft cap.
    keeps_head_scale: ClassVar[bool] = False
    # Soft cap of the logits, for families with `keeps_head_scale`. It is not linear, so no head can hold it.
    logit_cap: float | None = None
    # Where a head holds only some rows (vLLM's tensor parallelism): from their logits [..., R] to all [..., V′].
    gather_logits: Callable[[Tensor], Tensor] | None = None
    # The product of states [..., E] with a head [V′, E], where a CPU computes it from another layout (`PackedHeads`).
    head_product: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.config, self.hidden_size, self.vocab_size = config, hidden_size, vocab_size
        self.n_predict = config.n_predict  # K, the largest draft length
        self.depths = config.depths  # number of depths that are trained and that `unroll` returns
        self.head_size = config.draft_vocab_size or vocab_size  # V′
        tokens = None if config.draft_vocab_size is None else torch.zeros(self.head_size, dtype=torch.long)
        self.register_buffer("draft_tokens", tokens)

    def attach(self, base: nn.Module, *, tables: bool = True) -> None:
        """Take what the speculator needs of the base model besides its hidden states. Called before the first forward.

        Args:
            base: a Hugging Face causal language model.
            tables: whether to take the tables of `embedding` or `head`=base_frozen. In training each call of the loss
                gets them: they may be sharded, or change.
        """

    def frozen_tables(self, base: nn.Module) -> dict[str, Tensor]:
        """The base model's tables that the speculator uses as they are, by the names of the buffers that they fill."""
        return {}

    def copy_block(self, base: nn.Module) -> None:
        """Initialise the trained decoder layer, if there is one, from the base model's."""

    def draft_states(
        self, taken: Any, tokens: Tensor, batch: TokenBatch, tables: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What `unroll` reads for each row.

        Args:
            taken: what `HiddenStateHook` took of the base model, for all tokens of the batch.
            tokens: [R, K] the tokens after each row.
            batch: its tokens, documents and rows.
            tables: as in `losses.speculator_loss`.

        Returns:
            [R, D] hidden states. A family that reads the sequence computes all depths here: [R, K, D].
        """
        return taken.reshape(-1, taken.shape[-1])[batch.rows]

    def unroll_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that `unroll` and `head` use, by name."""
        return dict(self.named_parameters())

    def start(self, hidden: Tensor) -> DraftState:
        """The state before the first step, from the hidden state [T, D] (`hidden_state_source`)."""
        return DraftState(hidden, None, 0)

    def begin(self, hidden: Tensor, tokens: Tensor, caches: Sequence[Any] = ()) -> DraftState:
        """The state before the first step of a draft in one sequence.

        Args:
            hidden: [n, D] the hidden states that the base model has computed since the last draft, in the dtype of the
                parameters; a family that does not read the sequence uses the last one alone.
            tokens: [n] the token after each; the base model has not read the last one yet.
            caches: `cache_layers` cache layers of transformers, which hold the positions before. They are extended.
        """
        return self.start(hidden[-1:])

    @abc.abstractmethod
    def step(self, state: DraftState, token: Tensor) -> DraftState:
        """Advance by one depth, reading the newest token [T]. `head(state.depth)` reads the output of the result."""

    @abc.abstractmethod
    def head(self, depth: int) -> Tensor:
        """[V′, E] weight of the head; its product with the state of the depth gives the logits before a soft cap."""

    def draft_logits(self, depth: int, states: Tensor) -> Tensor:
        """[..., V′] logits of the draft vocabulary from the states [..., E] of a depth."""
        head = self.head(depth)
        logits = states @ head.T if self.head_product is None else self.head_product(states, head)
        return soft_cap(logits if self.gather_logits is None else self.gather_logits(logits), self.logit_cap)

    def logits(self, depth: int, states: Tensor) -> Tensor:
        """[..., V] logits of the whole vocabulary, −inf for tokens outside of the draft vocabulary."""
        return self.over_vocabulary(self.draft_logits(depth, states))

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """[..., V] logits [..., V′] of the draft vocabulary, and −inf for all other tokens."""
        if self.draft_tokens is None:
            return logits
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return whole.index_copy_(-1, self.draft_tokens, logits)

    def most_likely(self, depth: int, states: Tensor) -> Tensor:
        """[...] the token with the largest logit."""
        return self.tokens_of(self.draft_logits(depth, states).argmax(-1))

    def tokens_of(self, rows: Tensor) -> Tensor:
        """[...] the token that each row of a head stands for."""
        return rows if self.draft_tokens is None else self.draft_tokens[rows]

    def rows_of(self, tokens: Tensor) -> Tensor:
        """[...] the row of a head that stands for each token, −1 for tokens outside of the draft vocabulary."""
        if self.draft_tokens is None:
            return tokens
        rows = torch.searchsorted(self.draft_tokens, tokens.contiguous()).clamp(max=self.head_size - 1)
        return torch.where(self.draft_tokens[rows] == tokens, rows, -1)

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """All depths at once, for training.

        Args:
            hidden: [T, D] hidden state at position t, as `hidden_state_source` names it; what `draft_states` returns.
            tokens: [T, K] the tokens x_{t+1} … x_{t+K}.

        Returns:
            [K, T, E] the state of every depth; `states[k] @ head(k).T` are its logits.
        """
        state, outputs = self.start(hidden), []
        for token in tokens.unbind(1):
            state = self.step(state, token)
            outputs.append(state.output)
        return torch.stack(outputs)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """`unroll`, under the name that `torch.func.functional_call` uses."""
        return self.unroll(hidden, tokens)

    def draft(
        self,
        state: DraftState | None,
        tokens: Tensor,
        count: int,
        *,
        choose: Callable[[Tensor], Tensor] | None = None,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Draft depth by depth: each token is chosen from the logits that follow the token before it.

        Args:
            state: of `start` or `begin`; unused with `read`.
            tokens: [T] the newest tokens; the base model has not read them yet.
            count: draft length.
            choose: from logits [T, V] to tokens [T]; by default the most likely ones.
            read: for a family with `shared_layers`, whose every depth starts from a hidden state of its own: reads
                tokens [T] and returns their hidden states [T, D].

        Returns:
            [T, count] draft tokens.
        """
        drafts = []
        for depth in range(count):
            if read is not None:
                state = self.start(read(tokens))
            state = self.step(state, tokens)
            if choose is None:
                tokens = self.most_likely(depth, state.output)
            else:
                tokens = choose(self.logits(depth, state.output))
            drafts.append(tokens)
        return torch.stack(drafts, dim=1)

    def checkpoint_slots(self) -> dict[str, Slot]:
        """Every tensor name of a checkpoint, with its place in the module.

        A tied tensor appears under each of its names; the value under the first name is the one that is loaded.
        """
        return {name: Slot(name) for name, _ in self.named_parameters()}

    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are saved but never trained."""
        return frozenset()

    def constants(self) -> dict[str, float]:
        """Initial value of each parameter that starts as a constant."""
        return {n: 0.0 if n.endswith("bias") else 1.0 for n, p in self.named_parameters() if p.dim() == 1}

    def is_untrained(self) -> bool:
        """Whether every trained parameter that starts as a constant still is that constant.

        The first optimizer step changes all of them, whatever the seed of the matrices. False if there is none.
        """
        initial = {name: value for name, value in self.constants().items() if name not in self.frozen()}
        return bool(initial) and all(bool((self.get_parameter(name) == value).all()) for name, value in initial.items())

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise: `constants`, other vectors 0, matrices N(0, 1/√min(shape)) as in Snowflake's implementation."""
        state, constants = dict(self.named_parameters()), self.constants()
        for slot in dict.fromkeys(self.checkpoint_slots().values()):
            tensor = slot.of(state)
            if slot.parameter in constants or tensor.dim() < 2:
                tensor.fill_(constants.get(slot.parameter, 0.0))
            else:
                std = 1 / math.sqrt(min(tensor.shape))
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)
