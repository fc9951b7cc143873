"""What is known of a base without loading it: its name, its width, its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_speculator.base_form import AS_IT_LIES, BaseForm
from verl_speculator.errors import UserError


def check_base_name(base: str | Path) -> None:
    """Refuse what can only be a directory, and is none: a hub would be asked for it in vain, and for a long time.

    Raises:
        UserError: naming the directory.
    """
    path, text = Path(base).expanduser(), str(base)
    local = text.startswith((".", "/", "~")) or text.count("/") != 1 or path.parent.is_dir()
    if local and "/" in text and not path.is_dir():
        raise UserError(
            f"base={base}: no such directory; expected one, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct"
        )


def base_shape(base: Any, form: BaseForm = AS_IT_LIES) -> tuple[int, int]:
    """(D, V) of a base given as a model, a Hugging Face configuration, or the path or name of one in this form."""
    if isinstance(base, (str, Path)):
        check_base_name(base)
        form.check_file(base)
        from transformers import AutoConfig

        try:
            base = AutoConfig.from_pretrained(base, **form.reading)
        except (OSError, ValueError) as error:
            raise UserError(f"base={base}: no model there: {' '.join(str(error).split())[:200]}") from None
    if hasattr(base, "get_output_embeddings"):
        return base.config.get_text_config().hidden_size, base.get_output_embeddings().weight.shape[0]
    text_config = base.get_text_config()
    return text_config.hidden_size, text_config.vocab_size


def base_path(base: Any) -> str:
    """Where a model or a Hugging Face configuration was read from, empty if it was made in memory."""
    return (base.config if hasattr(base, "get_output_embeddings") else base).name_or_path


def base_architectures(base: str | Path) -> tuple[str, ...]:
    """`architectures` of the base at a path or of a hub name, as in its `config.json`."""
    from transformers import AutoConfig

    return tuple(AutoConfig.from_pretrained(base).architectures or ())
