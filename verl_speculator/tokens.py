"""What training needs of a tokenizer: a chat template, the tokens that end a turn, and plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """All tokens that end a turn: those of the generation configuration and the tokenizer's own."""
    found: set[int] = set()
    for source in (generation_config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return tuple(sorted(int(i) for i in found))


def tokenize_texts(tokenizer: Any, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
    """Token ids of each text.

    Args:
        tokenizer: of the base.
        texts: plain documents, or conversations that the chat template has rendered.
        plain: a document begins as the tokenizer begins one, and is closed with its end token. What a template has
            rendered is complete.
    """
    rows = tokenizer(list(texts), add_special_tokens=plain)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids if not plain or end is None or ids[-1:] == [end] else [*ids, end] for ids in rows]
