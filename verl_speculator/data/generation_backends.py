"""Generation for many prompts: a Hugging Face model in batches, or vLLM. Both give tokens up to the first end token."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache

from verl_speculator.base_model.cpu import optimize_for_cpu
from verl_speculator.base_model.loading import check_rollback, load_base
from verl_speculator.decoding.generate import generation_settings
from verl_speculator.decoding.target import CHUNK, RollbackLayer, position_limit
from verl_speculator.decoding.verification import draw
from verl_speculator.utils.settings import UserError, one_line

if TYPE_CHECKING:
    from verl_speculator.data.regenerate import RegenerateSettings

# Finished rows are replaced, or dropped from the batch, once they are this part of it.
REFILL_SHARE = 1 / 8


class Answer(NamedTuple):
    """The tokens generated for a prompt, without the end token; `finished` if there was an end token."""

    index: int
    tokens: list[int]
    finished: bool


class Backend(abc.ABC):
    """One way to generate for many prompts. An answer ends at any of `end_tokens`.

    Attributes:
        limit: the number of positions, None if the base model names none.
    """

    limit: int | None

    def __init__(self, settings: RegenerateSettings, end_tokens: Sequence[int]) -> None:
        self.settings, self.end_tokens = settings, tuple(end_tokens)

    @abc.abstractmethod
    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        """Answers of at most `max_new_tokens` tokens, in any order. What is drawn follows from the arguments alone.

        Args:
            prompts: token ids, each shorter than `limit`; answers end with the last position.
            seeds: one for each prompt.
        """

    def max_tokens(self, prompt: list[int]) -> int:
        """How many tokens may follow a prompt."""
        maximum = self.settings.max_new_tokens
        return maximum if self.limit is None else min(maximum, self.limit - len(prompt))


def cut_at_end(tokens: Sequence[int], end_tokens: Sequence[int]) -> tuple[list[int], bool]:
    """Tokens before the first end token, and whether there is one."""
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), None)
    return list(tokens[:end]), end is not None


class Rows(RollbackLayer):
    """Keys and values of one layer for several texts, which end in the same column: a shorter one has columns in front
    of it that the mask hides."""

    def rearrange(self, kept: Tensor, width: int, joined: Rows | None) -> None:
        """Keep these rows [N], with the last `width` columns of each, and put the rows of another layer behind them."""
        layers = [(self, kept)] if joined is None else [(self, kept), (joined, slice(None))]
        buffers = []
        for i in range(len(self.buffers)):
            parts = []
            for layer, rows in layers:
                part = layer.buffers[i][rows, :, max(0, layer.length - width) : layer.length]
                parts.append(F.pad(part, (0, 0, width - part.shape[-2], 0)))
            rows = torch.cat(parts) if len(parts) > 1 else parts[0]
            buffers.append(F.pad(rows, (0, 0, 0, -(-width // CHUNK) * CHUNK - width)))
        self.buffers = tuple(buffers)
        self._set_length(width)


@dataclass
class GeneratedRow:
    """A text that is being generated.

    Attributes:
        index: of its prompt.
        length: of its prompt.
        limit: the most new tokens.
        generator: of its draws, None for a greedy policy.
        tokens: the new ones.
    """

    index: int
    length: int
    limit: int
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)


class HuggingFaceBackend(Backend):
    """A Hugging Face model over batches whose finished rows are replaced by the next prompts (continuous batching, Yu
    et al. 2022, Orca). Base models with a recurrent state run by transformers' `generate` instead."""

    def __init__(
        self,
        settings: RegenerateSettings,
        device: str,
        dtype: torch.dtype,
        end_tokens: Sequence[int],
        pad_token: int | None,
    ) -> None:
        super().__init__(settings, end_tokens)
        self.base = load_base(settings.base, device=device, dtype=dtype)
        self.limit = position_limit(self.base)
        if device == "cpu":
            optimize_for_cpu(self.base)
        # The last states of a batch are a slice, for each row of which torch would copy the LM head's weight.
        self.base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.pad_token = pad_token if pad_token is not None else next(iter(self.end_tokens), 0)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        """`Backend.generate`"""
        try:
            check_rollback("", type(self.base), self.base.config)
        except UserError:
            yield from self._generate_in_batches(prompts, seeds)
        else:
            yield from self._generate_continuously(prompts, seeds)

    # The longest prompts first: if memory runs out, it does so at once, and prompts of a batch have similar lengths.

    @torch.inference_mode()
    def _generate_continuously(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size, rows, cache = self.settings.batch_size, [], None
        while waiting or any(row is not None for row in rows):
            running = [i for i, row in enumerate(rows) if row is not None]
            # Replacing rows copies the cache, so several are replaced, or only dropped, at a time.
            if len(running) > (1 - REFILL_SHARE) * (size if waiting else len(rows)):
                yield from self._extend(rows, 0, self._step(rows, cache))
                continue
            new = [waiting.pop() for _ in range(min(size - len(running), len(waiting)))]
            joined, joined_cache = [self._row(i, prompts[i], seeds[i]) for i in new], None
            if new:
                logits, joined_cache = self._prefill([prompts[i] for i in new])
            cache = self._rearrange(cache, rows, running, joined, joined_cache)
            rows = [*(rows[i] for i in running), *joined]
            if new:
                yield from self._extend(rows, len(running), logits)

    def _row(self, index: int, prompt: list[int], seed: int) -> GeneratedRow:
        generator = None if self.settings.policy.greedy else torch.Generator().manual_seed(seed)
        return GeneratedRow(index, len(prompt), self.max_tokens(prompt), generator)

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """[N, T] each: the prompts with padding in front of the shorter ones, and their mask."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_token] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return ids, mask

    def _prefill(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Cache]:
        """[N, V] logits after each prompt, and the cache of their rows."""
        cache, (ids, mask) = Cache(layer_class_to_replicate=Rows), self._padded(prompts)
        return self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache), cache

    def _step(self, rows: Sequence[GeneratedRow | None], cache: Cache) -> Tensor:
        """[N, V] logits after the newest token of each row. A row that is finished reads a token that nobody uses."""
        lengths = torch.tensor([1 if row is None else row.length + len(row.tokens) for row in rows])
        columns = cache.get_seq_length() + 1
        mask = (torch.arange(columns) >= columns - lengths[:, None]).long()
        ids = torch.tensor([[self.pad_token if row is None else row.tokens[-1]] for row in rows])
        return self._forward(ids, mask, lengths[:, None] - 1, cache)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        device = self.base.device
        settings = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.base.forward).parameters else {}
        try:
            output = self.base(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
                **settings,
            )
        except torch.OutOfMemoryError:
            raise self._out_of_memory(mask.shape[1]) from None
        return output.logits[:, -1]

    def _out_of_memory(self, width: int) -> UserError:
        return UserError(
            f"batch_size={self.settings.batch_size}: out of memory with texts of up to {width} tokens; expected a "
            "smaller --batch-size"
        )

    def _rearrange(
        self,
        cache: Cache | None,
        rows: Sequence[GeneratedRow],
        running: Sequence[int],
        joined: Sequence[GeneratedRow],
        joined_cache: Cache | None,
    ) -> Cache:
        """The cache of the running rows, with those that join them behind."""
        if not running:
            return joined_cache
        # The newest token of a running row is not in the cache yet.
        lengths = [rows[i].length + len(rows[i].tokens) - 1 for i in running] + [row.length for row in joined]
        kept = torch.tensor(running, device=self.base.device)
        for i, layer in enumerate(cache.layers):
            if layer.is_initialized:  # some layers use another's cache
                layer.rearrange(kept, max(lengths), None if joined_cache is None else joined_cache.layers[i])
        return cache

    def _extend(self, rows: list[GeneratedRow | None], first: int, logits: Tensor) -> Iterator[Answer]:
        """Add a token to each row from `first` on, from logits [N, V]; the answers that end, which leave the list."""
        tokens = self._choose(rows[first:], logits)
        for i, token in enumerate(tokens, first):
            if (row := rows[i]) is None:
                continue
            if token in self.end_tokens or len(row.tokens) + 1 == row.limit:
                finished = token in self.end_tokens
                yield Answer(row.index, row.tokens if finished else [*row.tokens, token], finished)
                rows[i] = None
            else:
                row.tokens.append(token)

    def _choose(self, rows: Sequence[GeneratedRow | None], logits: Tensor) -> list[int]:
        policy = self.settings.policy
        if policy.greedy:
            return logits.argmax(-1).tolist()
        # Each row draws with a generator of its own, so that no text depends on which others are beside it.
        uniforms = [
            0.0 if row is None else float(torch.rand((), generator=row.generator, dtype=torch.float64)) for row in rows
        ]
        return draw(policy.probabilities(logits), torch.tensor(uniforms, device=logits.device)).tolist()

    def _generate_in_batches(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        max_tokens = list(map(self.max_tokens, prompts))
        # A batch has one limit of new tokens, since no row may pass the last position; it is less than
        # `max_new_tokens` only for prompts near that position.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for size, group in itertools.groupby(order, key=max_tokens.__getitem__):
            members = list(group)
            for start in range(0, len(members), self.settings.batch_size):
                batch = members[start : start + self.settings.batch_size]
                texts = self._generate_batch([prompts[i] for i in batch], size, seeds[batch[0]])
                for i, tokens in zip(batch, texts, strict=True):
                    yield Answer(i, *cut_at_end(tokens, self.end_tokens))

    def _generate_batch(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        """What follows each prompt, including the tokens behind an end token."""
        pad, device, (ids, mask) = self.pad_token, self.base.device, self._padded(prompts)
        width = ids.shape[1]
        torch.manual_seed(seed)
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": list(self.end_tokens) or None, "pad_token_id": pad}
        try:
            with generation_settings(self.base, self.settings.policy, **options):
                texts = self.base.generate(ids.to(device), attention_mask=mask.to(device))
        except torch.OutOfMemoryError:
            raise self._out_of_memory(width) from None
        return texts[:, width:].tolist()


class VllmBackend(Backend):
    """vLLM, which batches by itself."""

    def __init__(self, settings: RegenerateSettings, dtype: torch.dtype, end_tokens: Sequence[int]) -> None:
        from vllm import LLM

        super().__init__(settings, end_tokens)
        # generation_config="vllm": nothing from the base model's own, which may hold penalties.
        arguments = {
            "dtype": str(dtype).removeprefix("torch."),
            "seed": settings.seed,
            "generation_config": "vllm",
            **settings.vllm_args,
        }
        try:
            self.engine = LLM(model=settings.base, **arguments)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"base={settings.base}: vLLM cannot load it: {one_line(error)}") from None
        self.limit = self.engine.llm_engine.model_config.max_model_len

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        """`Backend.generate`"""
        from vllm import SamplingParams

        policy = self.settings.policy
        sampling_params = [
            SamplingParams(
                max_tokens=self.max_tokens(prompt),
                temperature=policy.temperature,
                top_p=policy.top_p,
                top_k=policy.top_k or -1,
                seed=seed,
                stop_token_ids=list(self.end_tokens),
                detokenize=False,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        for i, request in enumerate(self.engine.generate(inputs, sampling_params, use_tqdm=False)):
            output = request.outputs[0]
            tokens, ended = cut_at_end(output.token_ids, self.end_tokens)
            yield Answer(i, tokens, ended or output.finish_reason == "stop")
