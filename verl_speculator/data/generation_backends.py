"""Generation for many prompts: Hugging Face's loop in batches, or vLLM. Both give tokens up to the first end token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from verl_speculator.base_model.loading import load_base
from verl_speculator.utils.settings import UserError, one_line

if TYPE_CHECKING:
    import torch

    from verl_speculator.data.regenerate import RegenerateSettings


class Answer(NamedTuple):
    """The tokens generated for a prompt, without the end token; `finished` if there was an end token."""

    index: int
    tokens: list[int]
    finished: bool


class Backend:
    """One way to generate for many prompts. An answer ends at any of `end_tokens`.

    Attributes:
        limit: the number of positions, None if the base model names none.
    """

    limit: int | None

    def __init__(self, settings: RegenerateSettings, end_tokens: Sequence[int]) -> None:
        self.settings, self.end_tokens = settings, tuple(end_tokens)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        """Answers of at most `max_new_tokens` tokens, in any order. What is drawn follows from the arguments alone.

        Args:
            prompts: token ids, each shorter than `limit`; answers end with the last position.
            seeds: one for each prompt.
        """
        raise NotImplementedError

    def max_tokens(self, prompt: list[int]) -> int:
        """How many tokens may follow a prompt."""
        maximum = self.settings.max_new_tokens
        return maximum if self.limit is None else min(maximum, self.limit - len(prompt))


def cut_at_end(tokens: Sequence[int], end_tokens: Sequence[int]) -> tuple[list[int], bool]:
    """Tokens before the first end token, and whether there is one."""
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), None)
    return list(tokens[:end]), end is not None


class HuggingFaceBackend(Backend):
    """`generate` of transformers over batches padded on the left."""

    def __init__(
        self,
        settings: RegenerateSettings,
        device: str,
        dtype: torch.dtype,
        end_tokens: Sequence[int],
        pad_token: int | None,
    ) -> None:
        from verl_speculator.decoding.target import position_limit

        super().__init__(settings, end_tokens)
        self.base = load_base(settings.base, device=device, dtype=dtype)
        self.limit = position_limit(self.base)
        self.pad_token = pad_token if pad_token is not None else next(iter(self.end_tokens), 0)

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[Answer]:
        """`Backend.generate`"""
        max_tokens = list(map(self.max_tokens, prompts))
        # The longest first: if memory runs out, it does so at once. A batch has one limit of new tokens, since no row
        # may pass the last position; it is less than `max_new_tokens` only for prompts near that position.
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
        import torch

        from verl_speculator.decoding.generate import generation_settings

        pad, device = self.pad_token, self.base.device
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        torch.manual_seed(seed)
        options = {"max_new_tokens": max_new_tokens, "eos_token_id": list(self.end_tokens) or None, "pad_token_id": pad}
        try:
            with generation_settings(self.base, self.settings.policy, **options):
                texts = self.base.generate(ids.to(device), attention_mask=mask.to(device))
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_size={self.settings.batch_size}: out of memory with prompts of up to {width} tokens; expected "
                "a smaller --batch-size"
            ) from None
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
