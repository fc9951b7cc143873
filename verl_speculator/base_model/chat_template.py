"""What training needs of a tokenizer: a chat template, the tokens that end a turn, and plain text."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from verl_speculator.utils.settings import UserError

logger = logging.getLogger(__name__)
# An assistant's content that no chat template writes by itself.
PROBE = "Zq7 probe"
# A part of an answer that is reasoning. Where the prompt opens it, the answer holds its end alone; where the answer was
# cut, its beginning alone.
THINKING = re.compile(r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)", re.DOTALL)
# Every message closes with the end token, so that the turns of a conversation tokenize alike alone and together.
DEFAULT_CHAT_TEMPLATE = (
    "{%- if bos_token %}{{- bos_token }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- message['role'] | capitalize + ': ' + message['content'] }}{{- eos_token if eos_token else '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer the plain default template if it has none; whether it had none."""
    if getattr(tokenizer, "chat_template", None):
        return False
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return True


def end_token_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """All tokens that end a turn; one line of the log names them.

    They are the end tokens of the generation configuration, and the token with which the chat template closes an
    assistant's turn. The tokenizer's own end token counts only if the generation configuration has none: from a GGUF
    file it may be that of another tokenizer (SmolLM2's becomes `<|im_start|>`).
    """
    eos_ids = _eos_ids(tokenizer)
    ids = {*(_eos_ids(generation_config) or eos_ids), *closing_token_ids(tokenizer)}
    ends = tuple(sorted(ids))
    named, named_eos = (", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in x) for x in (ends, eos_ids))
    logger.info("a turn ends at %s", named or "no token: generation stops at its length")
    if ends and eos_ids and not ids & set(eos_ids):
        message = "the tokenizer's eos_token %s ends no turn: generation config and chat template say %s"
        logger.warning(message, named_eos, named)
    return ends


def closing_token_ids(tokenizer: Any) -> list[int]:
    """The first special token that the chat template writes behind an assistant's content; empty if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        text = _render(tokenizer, messages, add_generation_prompt=False)
    except UserError:  # raised again when the user's conversations are rendered
        return []
    _, probe, behind = text.rpartition(PROBE)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if probe else []
    return [token for token in ids if token in special][:1]


def _eos_ids(source: Any) -> list[int]:
    ids = getattr(source, "eos_token_id", None)
    return [int(i) for i in (ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])]


def tokenize_texts(tokenizer: Any, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
    """Token ids of each text. A plain document begins as the tokenizer begins one, and is closed with its end token; a
    conversation that the chat template has rendered is complete."""
    # verbose=False: texts that are too long are reported by the code that cuts or refuses them.
    rows = tokenizer(list(texts), add_special_tokens=plain, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids if not plain or end is None or ids[-1:] == [end] else [*ids, end] for ids in rows]


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    options = {"tokenize": False, "return_dict": False, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def tokenize_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation that the assistant is to continue. Raises UserError if the chat template refuses the
    messages."""
    (ids,) = tokenize_texts(tokenizer, [_render(tokenizer, messages, add_generation_prompt=True)], plain=False)
    return ids


def tokenize_conversation(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of a conversation, as verl's dataset makes them for training.

    The mask is 1 for the tokens that an assistant's message adds to the template's prompt for it, including the end
    token and a line break after it. The first message of a conversation has mask 0. Raises UserError if the chat
    template refuses the messages, or renders earlier ones differently once others follow.
    """
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    answers = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    before = [_render(tokenizer, messages[:i], add_generation_prompt=True) for i in answers]
    after = [_render(tokenizer, messages[: i + 1], add_generation_prompt=False) for i in answers]
    ids, *parts = tokenize_texts(tokenizer, [whole, *before, *after], plain=False)
    mask = [0] * len(ids)
    starts, ends = parts[: len(answers)], parts[len(answers) :]
    for i, prompt, text, start, end in zip(answers, before, after, starts, ends, strict=True):
        # Only the end has to fall between two tokens: as in verl's mask, an answer's first characters may merge into
        # the last token of the prompt for it, and are then no target.
        if not (text.startswith(prompt) and whole.startswith(text) and ids[: len(end)] == end):
            what = f"the chat template writes messages[{i}] otherwise alone than in the whole conversation"
            raise UserError(f"{what}, so that its tokens cannot be told apart; expected a template that only appends")
        mask[len(start) : len(end)] = [1] * (len(end) - len(start))
    return ids, mask


def thinking_tokens(tokenizer: Any, answer: Sequence[int]) -> list[int]:
    """Indices of the tokens of an answer that belong to its reasoning, `<think>` and `</think>` included."""
    # Token by token, so that each has a place in the text, whatever its neighbours are.
    pieces = [tokenizer.decode([token]) for token in answer]
    ends = list(accumulate(map(len, pieces)))
    spans = [match.span() for match in THINKING.finditer("".join(pieces))]
    return [
        i
        for i, (piece, end) in enumerate(zip(pieces, ends, strict=True))
        if any(begin < end and end - len(piece) < stop for begin, stop in spans)
    ]
