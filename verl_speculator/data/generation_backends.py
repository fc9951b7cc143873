"""Who generates: Hugging Face's loop in batches, or vLLM. Both give tokens up to the first end token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from verl_speculator.utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from verl_speculator.decoding.sampling_policy import SamplingPolicy


class Answer(NamedTuple):
    """What came of one prompt.

    Attributes:
        index: of the prompt.
        tokens: without the end token.
        finished: whether an end token came.
    """

    index: int
    tokens: list[int]
    finished: bool


class Backend(Protocol):
    """One way to generate for many prompts.

    Attributes:
        limit: positions of the base, None if it names none.
    """

    limit: int | None

    def generate(self, prompts: Sequence[list[int]], *, max_new_tokens: int, seeds: Sequence[int]) -> Iterator[Answer]:
        """Answers in any order. What is drawn for a prompt follows from the arguments alone.

        Args:
            prompts: token ids, each shorter than `limit`.
            max_new_tokens: the most tokens of an answer; an answer also ends with the base's last position.
            seeds: one for each prompt.
        """
        ...


def room(limit: int | None, prompt: list[int], max_new_tokens: int) -> int:
    """How many tokens may follow a prompt."""
    return max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))


def cut(tokens: Sequence[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Tokens before the first end token, and whether there is one."""
    for i, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:i]), True
    return list(tokens), False


class HuggingFaceBackend:
    """`base.generate` over batches padded on the left.

    Args:
        base: directory or hub name.
        device, dtype: as they were chosen.
        policy: of sampling.
        ends: tokens that end an answer; none if it is empty.
        pad: token that fills a batch up.
        batch_size: prompts at a time.

    Raises:
        UserError: if the base cannot be loaded.
    """

    def __init__(
        self,
        base: str,
        *,
        device: str,
        dtype: torch.dtype,
        policy: SamplingPolicy,
        ends: Sequence[int],
        pad: int | None,
        batch_size: int,
    ) -> None:
        from verl_speculator.base_model.loading import load_base
        from verl_speculator.decoding.target import position_limit

        self.base = load_base(base, device=device, dtype=dtype)
        self.limit = position_limit(self.base)
        self.policy, self.ends, self.batch_size = policy, tuple(ends), batch_size
        self.pad = pad if pad is not None else next(iter(self.ends), 0)

    def generate(self, prompts: Sequence[list[int]], *, max_new_tokens: int, seeds: Sequence[int]) -> Iterator[Answer]:
        """`Backend.generate`"""
        rooms = [room(self.limit, prompt, max_new_tokens) for prompt in prompts]
        # The longest first: where memory runs out, it does so at once. A batch shares one room, since none of its rows
        # may go past the base's last position; only prompts near it have less than `max_new_tokens`.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for size, group in itertools.groupby(order, key=rooms.__getitem__):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                texts = self._batch([prompts[i] for i in batch], size, seeds[batch[0]])
                for i, tokens in zip(batch, texts, strict=True):
                    yield Answer(i, *cut(tokens, self.ends))

    def _batch(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> list[list[int]]:
        """What follows each prompt, whatever stands behind an end token included."""
        import torch

        from verl_speculator.decoding.generate import generation_settings

        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self.base.device
        torch.manual_seed(seed)
        settings = {"max_new_tokens": max_new_tokens, "eos_token_id": list(self.ends) or None, "pad_token_id": self.pad}
        try:
            with generation_settings(self.base, self.policy, **settings):
                texts = self.base.generate(ids.to(device), attention_mask=mask.to(device))
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_size={self.batch_size}: out of memory with prompts of up to {width} tokens; expected a smaller "
                "--batch-size"
            ) from None
        return texts[:, width:].tolist()


class VllmBackend:
    """vLLM, which batches by itself.

    Args:
        base: directory or hub name.
        dtype: as it was chosen.
        policy: of sampling.
        ends: tokens that end an answer.
        seed: of the engine; every prompt has its own besides.
        arguments: further ones for `vllm.LLM`, such as tensor_parallel_size.

    Raises:
        UserError: if vLLM cannot load the base.
    """

    def __init__(
        self,
        base: str,
        *,
        dtype: torch.dtype,
        policy: SamplingPolicy,
        ends: Sequence[int],
        seed: int,
        arguments: dict[str, Any],
    ) -> None:
        from vllm import LLM

        # generation_config="vllm": nothing from the base's own, which may hold penalties.
        settings = {"dtype": str(dtype).removeprefix("torch."), "seed": seed, "generation_config": "vllm"}
        try:
            self.engine = LLM(model=base, **(settings | arguments))
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"base={base}: vLLM cannot load it: {reason}") from None
        self.limit = self.engine.llm_engine.model_config.max_model_len
        self.policy, self.ends = policy, tuple(ends)

    def generate(self, prompts: Sequence[list[int]], *, max_new_tokens: int, seeds: Sequence[int]) -> Iterator[Answer]:
        """`Backend.generate`"""
        from vllm import SamplingParams

        wishes = [
            SamplingParams(
                max_tokens=room(self.limit, prompt, max_new_tokens),
                temperature=self.policy.temperature,
                top_p=self.policy.top_p,
                top_k=self.policy.top_k or -1,
                seed=seed,
                stop_token_ids=list(self.ends),
                detokenize=False,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        for i, done in enumerate(self.engine.generate(given, wishes, use_tqdm=False)):
            first = done.outputs[0]
            tokens, ended = cut(first.token_ids, self.ends)
            yield Answer(i, tokens, ended or first.finish_reason == "stop")
