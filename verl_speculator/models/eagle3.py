"""EAGLE-3: a decoder layer that reads the sequence, on three of the base model's hidden states (Li et al. 2025, arXiv
2503.01840), as vLLM's `LlamaForCausalLMEagle3` computes it.

At position t the first depth reads the token x_{t+1} and a fusion g_t of the base model's states; depth j reads the
token x_{t+1+j} and the draft's own state z of the depth before, at RoPE position t + j. Every depth attends to the
entries of all positions up to t, which were made from the base model's states, and to those of its own earlier depths:

    g_t = fc(cat_l a^l_t)                                   a^l the residual stream before decoder layer l
    z = layer(cat(norm(emb(x)), norm(s)), s)                s = g_t at first, then z of the depth before
    logits = W norm(z)

Training runs the depths one after the other on the draft's own states (training-time test): what depth j computes at
row t is what drafting j tokens after t computes, given the text's own tokens.

Shapes: n entries, R rows to draft for, N tokens of a batch, D width, G heads of keys, each for Q queries of width h,
j earlier depths, K depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from verl_speculator.base_model.hidden_states import BLOCK_INPUTS, FrozenNorm, final_norm
from verl_speculator.config.families import OWN
from verl_speculator.config.schema import LayerShape, SpeculatorConfig
from verl_speculator.models.layers import OutputHead, SpeculatorWithTables, TokenEmbedding
from verl_speculator.models.speculator import DraftState, Slot, TokenBatch

EMBEDDING = "embedding.weight"  # the base model's table among those of a training step
# With more numbers than this in the activations of all depths, training computes them again in the backward pass.
KEPT_NUMBERS = 2**28
# Rows whose scores are in memory at once, where they are computed again in the backward pass.
BLOCK = 256


class Span(NamedTuple):
    """Rows `first` to `end` of one document, and the entries `start` to `stop` that the last of them attends to."""

    first: int
    end: int
    start: int
    stop: int

    @property
    def scores(self) -> int:
        """Their number for each head."""
        return (self.end - self.first) * (self.stop - self.start)


def row_spans(rows: Tensor, documents: Tensor) -> list[Span]:
    """Blocks of the rows [R], ascending, each inside one of the documents [B, 2] of `TokenBatch`."""
    last, starts, ends = rows.tolist(), documents[:, 0].contiguous().to(rows), documents.sum(1).to(rows)
    borders = torch.stack([torch.searchsorted(rows, starts), torch.searchsorted(rows, ends), starts], dim=1)
    return [
        Span(first, min(first + BLOCK, stop), start, last[min(first + BLOCK, stop) - 1] + 1)
        for begin, stop, start in borders.tolist()
        for first in range(begin, stop, BLOCK)
    ]


class Rotation:
    """RoPE at some positions: `cos` and `sin` are [R, h], or [1, h] where all rows have the same one."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos[:, None], sin[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """[R, heads, h] turned, as Llama's code does."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos.to(x.dtype) + torch.cat([-right, left], dim=-1) * self.sin.to(x.dtype)


class Attention(nn.Module):
    """The projections of grouped attention over inputs of `inputs` numbers."""

    def __init__(self, inputs: int, width: int, shape: LayerShape) -> None:
        super().__init__()
        self.groups, self.head_dim = shape.num_key_value_heads, shape.head_dim
        queries = shape.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(inputs, queries, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(inputs, self.groups * self.head_dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(queries, width, bias=False)

    def query(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[R, G, Q, h] queries, grouped by the keys that they read."""
        return rotation(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).unflatten(1, (self.groups, -1))

    def entries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[R, 2, G, h] keys and values."""
        key, value = (p(x).unflatten(-1, (self.groups, self.head_dim)) for p in (self.k_proj, self.v_proj))
        return torch.stack([rotation(key), value], dim=1)


class MLP(nn.Module):
    """down(SiLU(gate x) ⊙ up x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """Llama's decoder layer, of which the first also reads the token's embedding.

    Args:
        width: D.
        shape: of heads and MLP.
        is_first: whether it reads cat(norm(embedding), norm(state)); a further layer reads norm(state).
        norm_before_residual: whether the first one adds to the normalised state instead of the state.
    """

    def __init__(self, width: int, shape: LayerShape, *, is_first: bool, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, shape.rms_norm_eps) for _ in range(2))
        self.hidden_norm = nn.RMSNorm(width, shape.rms_norm_eps) if is_first else None
        self.self_attn = Attention(2 * width if is_first else width, width, shape)
        self.mlp = MLP(width, shape.intermediate_size)

    def inputs(self, embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the projections read, [R, 2D] or [R, D], and the residual [R, D]."""
        if self.hidden_norm is None:
            return self.input_layernorm(state), state
        normed = self.hidden_norm(state)
        inputs = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
        return inputs, normed if self.norm_before_residual else state

    def output(self, attended: Tensor, residual: Tensor) -> Tensor:
        """[R, D] from the values that attention averaged, [R, G, Q, h]."""
        y = residual + self.self_attn.o_proj(attended.flatten(1))
        return y + self.mlp(self.post_attention_layernorm(y))


@dataclass(frozen=True)
class Prefix:
    """The positions of a sequence, or of several documents, up to the rows that are drafted after.

    Attributes:
        positions: [R] RoPE position of each row, or [1] if all rows have the same one.
        embed: the token embedding, from [R] to [R, D].
        rows: [R] the last entry that each row attends to, ascending; None if every row attends to all entries.
        spans: of the rows; without `rows` there are none.
        recomputes: whether scores are computed again in the backward pass.
        entries: of each layer keys and values, [G, n, h].
    """

    positions: Tensor
    embed: Callable[[Tensor], Tensor]
    rows: Tensor | None = None
    spans: Sequence[Span] = ()
    recomputes: bool = False
    entries: Sequence[tuple[Tensor, Tensor]] = ()

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Causal attention within documents.

        Args:
            query: [R, G, Q, h]
            keys, values: [G, n, h] of the entries.

        Returns:
            The averaged values [R, G, Q, h], and the logarithm of the sum of the exponentials of the scores, [R, G, Q].
        """
        averages, totals = [query[:0]], [query[:0, ..., 0]]
        spans = [Span(0, len(query), 0, keys.shape[1])] if self.rows is None else self.spans
        for first, end, start, stop in spans:
            last = None if self.rows is None else self.rows[first:end] - start
            arguments = (query[first:end], keys[:, start:stop], values[:, start:stop], last)
            parts = checkpoint(attention, *arguments, use_reentrant=False) if self.recomputes else attention(*arguments)
            averages.append(parts[0])
            totals.append(parts[1])
        return torch.cat(averages), torch.cat(totals)


def attention(query: Tensor, key: Tensor, value: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `Prefix.attend`, of rows that attend to the entries up to their `last` one."""
    scores = query.transpose(0, 1).flatten(1, 2) @ key.mT  # [G, r·Q, T]
    scores = (scores * query.shape[-1] ** -0.5).to(torch.promote_types(scores.dtype, torch.float32))
    if last is not None:
        later = torch.arange(key.shape[1], device=last.device) > last[:, None]
        scores = scores.masked_fill(later.repeat_interleave(query.shape[2], 0), -torch.inf)
    total = scores.logsumexp(-1)
    average = (scores - total.unsqueeze(-1)).exp().to(value.dtype) @ value
    by_row = (len(query), -1)
    average, total = average.unflatten(1, by_row).transpose(0, 1), total.unflatten(1, by_row).transpose(0, 1)
    return average, total.to(query.dtype)


def attend_to_depths(query: Tensor, own: Tensor, average: Tensor, total: Tensor) -> Tensor:
    """Attention to the entries of a row's own earlier depths, joined with that to the sequence.

    Args:
        query: [R, G, Q, h]
        own: [R, 2, j, G, h] keys and values of the depths.
        average, total: of `Prefix.attend`.

    Returns:
        The averaged values of both, [R, G, Q, h].
    """
    key, value = own.unbind(1)
    scores = torch.einsum("rgqh,rjgh->rgqj", query, key) * query.shape[-1] ** -0.5
    weights = torch.cat([total.unsqueeze(-1), scores], dim=-1)
    weights = weights.softmax(-1, dtype=torch.promote_types(weights.dtype, torch.float32)).to(value.dtype)
    return weights[..., :1] * average + torch.einsum("rgqj,rjgh->rgqh", weights[..., 1:], value)


class Eagle3(SpeculatorWithTables):
    """EAGLE-3's draft. Tensors on disk have the names that vLLM and SGLang read."""

    method = "eagle3"
    reads_sequence: ClassVar[bool] = True

    def __init__(self, config: SpeculatorConfig, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(config, hidden_size=hidden_size, vocab_size=vocab_size)
        self.shape = LayerShape(**config.layer)
        self.embedding = TokenEmbedding(vocab_size, hidden_size, source=config.embedding)
        self.fc = nn.Linear(len(config.aux_layers) * hidden_size, hidden_size, bias=False)
        options = {"norm_before_residual": config.norm_before_residual}
        self.layers = nn.ModuleList(
            DraftLayer(hidden_size, self.shape, is_first=not i, **options) for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, self.shape.rms_norm_eps)
        # Not `lm_head`: verl makes every module of that name a sharding unit.
        self.draft_head = OutputHead(self.head_size, hidden_size, source=config.head)
        self.__dict__["_rope"] = None  # built where it is used first: no submodule, and no tensor of a checkpoint

    @property
    def hidden_state_source(self) -> str:
        return ".".join([BLOCK_INPUTS, *map(str, self.config.aux_layers)])

    @property
    def cache_layers(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def copy_block(self, base: nn.Module) -> None:
        """Start from the base model: the fusion passes on the last of its states, and the final norm is a copy unless
        the head is of another kind."""
        fusion = self.get_parameter("fc.weight")
        fusion.zero_()
        fusion[:, -self.hidden_size :].fill_diagonal_(1.0)
        if self.config.head != OWN:
            norm = FrozenNorm(self.hidden_size)
            norm.copy_from(final_norm(base))
            self.norm.weight.copy_(norm.weight)

    def rotation(self, positions: Tensor) -> Rotation:
        """RoPE at positions [R]."""
        if self._rope is None or self._rope.inv_freq.device != positions.device:
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            self.__dict__["_rope"] = LlamaRotaryEmbedding(self.shape.llama_config(self.hidden_size)).to(
                positions.device
            )
        cos, sin = self._rope(torch.empty(0, device=positions.device), positions[None])
        return Rotation(cos[0], sin[0])

    def enter(
        self,
        hidden: Tensor,
        tokens: Tensor,
        prefix: Prefix,
        extend: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Make the entries of positions, as the first depth does.

        Args:
            hidden: [n, A·D] the base model's states.
            tokens: [n] the token after each.
            prefix: of these positions, without entries.
            extend: takes the number of a layer and its new entries [n, 2, G, h], and returns keys and values of all
                entries.

        Returns:
            The fused states [n, D], and keys and values of each layer.
        """
        fused = state = self.fc(hidden.to(self.norm.weight.dtype))
        embedding, rotation, entries = prefix.embed(tokens), self.rotation(prefix.positions), []
        for i, layer in enumerate(self.layers):
            x, residual = layer.inputs(embedding, state)
            entries.append(extend(i, layer.self_attn.entries(x, rotation)))
            if i + 1 < len(self.layers):  # of the last layer nothing else is needed
                average, _ = prefix.attend(layer.self_attn.query(x, rotation), *entries[i])
                state = layer.output(average, residual)
        return fused, entries

    def begin(self, hidden: Tensor, tokens: Tensor, caches: Sequence[Any] = ()) -> DraftState:
        length = caches[0].get_seq_length()
        index = torch.arange(length, length + len(tokens), device=tokens.device)

        def extend(layer: int, entries: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = caches[layer].update(*entries.permute(1, 2, 0, 3).unsqueeze(1))
            return keys[0], values[0]

        new = Prefix(index, self.embedding, index, [Span(0, len(tokens), 0, length + len(tokens))])
        fused, entries = self.enter(hidden, tokens, new, extend)
        return DraftState(fused[-1:], None, 0, sequence=Prefix(index[-1:], self.embedding, entries=entries))

    def start(self, hidden: Tensor) -> DraftState:
        raise TypeError("a draft of eagle3 begins with all states and tokens of the sequence: call begin()")

    def step(self, state: DraftState, token: Tensor) -> DraftState:
        prefix, x = state.sequence, state.carried
        embedding, rotation = prefix.embed(token), self.rotation(prefix.positions + state.depth)
        own = []
        for i, layer in enumerate(self.layers):
            inputs, residual = layer.inputs(embedding, x)
            query = layer.self_attn.query(inputs, rotation)
            average, total = prefix.attend(query, *prefix.entries[i])
            if state.depth:  # the entry of the first depth is part of the sequence
                new = layer.self_attn.entries(inputs, rotation).unsqueeze(2)
                own.append(new if state.cell is None else torch.cat([state.cell[:, i], new], dim=2))
                average = attend_to_depths(query, own[i], average, total)
            x = layer.output(average, residual)
        cell = torch.stack(own, dim=1) if own else None  # [R, layers, 2, j, G, h]
        return DraftState(self.norm(x), cell, state.depth + 1, x, prefix)

    def draft_states(
        self, taken: Tensor, tokens: Tensor, batch: TokenBatch, tables: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """[R, K, D] the state z of every depth, before the norm."""
        table = (tables or {}).get(EMBEDDING, self.embedding.weight)
        embed = lambda tokens: F.embedding(tokens, table).to(self.norm.weight.dtype)  # noqa: E731
        hidden, (kept, batch) = taken.reshape(-1, taken.shape[-1]), batch.without_padding()
        if len(kept) < len(hidden):  # numbers in padding may be anything, NaN too
            hidden = hidden[kept]
        positions, index = batch.positions, torch.arange(len(kept), device=tokens.device)
        every = row_spans(index, batch.documents) if len(self.layers) > 1 else []
        spans = row_spans(batch.rows, batch.documents)
        recomputes = torch.is_grad_enabled() and self.kept_numbers(tokens, [*every, *spans]) > KEPT_NUMBERS
        whole = Prefix(positions, embed, index, every, recomputes)
        rows = Prefix(positions[batch.rows], embed, batch.rows, spans, recomputes)
        # The last entry of a document has no token of its own after it, and no row attends to it.
        return self.sequence_states(hidden, batch.tokens.roll(-1), tokens, whole, rows)

    def sequence_states(self, hidden: Tensor, following: Tensor, tokens: Tensor, whole: Prefix, rows: Prefix) -> Tensor:
        """The training-time test.

        Args:
            hidden: [N, A·D] the base model's states.
            following: [N] the token after each.
            tokens: [R, K] the tokens after each row.
            whole: of all positions.
            rows: of those to draft after.

        Returns:
            [R, K, D] the state z of every depth.
        """
        fused, entries = self.enter(hidden, following, whole, lambda _, new: new.permute(1, 2, 0, 3).unbind())
        state, states = DraftState(fused[rows.rows], None, 0, sequence=replace(rows, entries=entries)), []
        for token in tokens.unbind(1):
            if rows.recomputes:
                state = checkpoint(self.step, state, token, use_reentrant=False)
            else:
                state = self.step(state, token)
            states.append(state.carried)
        return torch.stack(states, dim=1)

    def kept_numbers(self, tokens: Tensor, spans: Sequence[Span]) -> int:
        """About how many numbers autograd keeps of all steps, for tokens [R, K], if nothing is computed again."""
        heads = self.shape.num_attention_heads
        of_row = 10 * self.hidden_size + 4 * heads * self.shape.head_dim + 4 * self.shape.intermediate_size
        scores = 3 * heads * sum(span.scores for span in spans)
        return len(self.layers) * (tokens.numel() * of_row + tokens.shape[1] * scores)

    def unroll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[K, R, D] the normalised states, from those of `draft_states` [R, K, D]."""
        return self.norm(hidden).transpose(0, 1)

    def unroll_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name.startswith(("norm.", "draft_head."))}

    def head(self, depth: int) -> Tensor:
        return self.draft_head.weight

    def checkpoint_slots(self) -> dict[str, Slot]:
        names = {"draft_head": "lm_head", "embedding": "embed_tokens"}
        if len(self.layers) == 1:
            names["layers.0"] = "midlayer"
        slots = {}
        for name, _ in self.named_parameters():
            module = next((m for m in names if name.startswith(m + ".")), None)
            slots[name if module is None else names[module] + name.removeprefix(module)] = Slot(name)
        return slots

    def is_untrained(self) -> bool:
        """Whether all norms of the layers are as they were initialised; the last one may be a copy."""
        norms = [p for name, p in self.layers.named_parameters() if p.dim() == 1]
        return all(bool((p == 1).all()) for p in norms)
