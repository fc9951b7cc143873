"""What conversations need of a tokenizer: a chat template, and the tokens that end an assistant's turn."""

from __future__ import annotations

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
