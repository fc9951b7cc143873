"""What is traced: a model, or a base with a speculator, drafting after fixed tokens."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from verl_speculator.decoding.drafters import SpeculatorDrafter
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.target import Target
from verl_speculator.models import Speculator
from verl_speculator.utils.errors import UserError


def parse_tokens(text: str) -> list[int]:
    """Token ids written as "5,9,23".

    Raises:
        UserError: for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f'tokens={text}: expected token ids joined by commas, such as "5,9,23"')
    return [int(part) for part in parts]


def import_external(name: str | None) -> None:
    """Import what brings own architectures, kernels or patches along, as verl's `model.external_lib` does.

    Args:
        name: of a module, or of a Python file; None for nothing.

    Raises:
        UserError: if it cannot be imported.
    """
    if name is None:
        return
    path = Path(name).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise UserError(f"external-lib={name}: no such file; expected a Python file, or the name of a module")
    try:
        if not is_file:
            importlib.import_module(name)
        elif path.stem not in sys.modules:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(path.stem if is_file else name, None)
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"external-lib={name}: cannot be imported: {told}") from error


class Subject(Protocol):
    """What can be traced while it drafts."""

    traced: nn.Module

    def draft(self, tokens: list[int], count: int) -> list[int]:
        """Draft tokens after these."""
        ...


class ModelSubject:
    """A causal language model that drafts by itself: greedily, with a KV cache of its own.

    Args:
        model: of Hugging Face, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.traced = model

    @torch.no_grad()
    def draft(self, tokens: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after these; with 0 the tokens are read and nothing is drafted."""
        model, found = self.traced, []
        ids = torch.tensor(tokens, device=model.device)
        with Target(model) as target:
            for _ in range(max(count, 1)):
                _, logits = target.read(ids)
                ids = logits[-1:].argmax(-1)
                found.append(int(ids))
        return found[:count]


class Pair(nn.Module):
    """A base and its speculator as one module, so that one trace holds both.

    Args:
        base: of Hugging Face.
        speculator: of this base.
    """

    def __init__(self, base: nn.Module, speculator: Speculator) -> None:
        super().__init__()
        self.base, self.speculator = base, speculator
        self.drafter = SpeculatorDrafter(speculator, SamplingPolicy(), sampled=False)

    def forward(self, input_ids: Tensor, count: int) -> dict[str, Tensor]:
        """Read the tokens [N], take the base's next one, and draft after it.

        Returns:
            `token` [1], `drafts` [count] and `logits` [1, V] of the base.
        """
        with Target(self.base, self.speculator.hidden_state_source) as target:
            hidden, logits = target.read(input_ids, last_only=True)
        token = logits.argmax(-1)
        drafts = self.drafter.propose(hidden, token, None, count).tokens
        return {"token": token, "drafts": drafts, "logits": logits}


class PairSubject:
    """A base with a speculator that drafts after its next token.

    Args:
        base: of Hugging Face.
        speculator: of this base.
    """

    def __init__(self, base: nn.Module, speculator: Speculator) -> None:
        self.traced = Pair(base, speculator).eval()

    @torch.no_grad()
    def draft(self, tokens: list[int], count: int) -> list[int]:
        """The drafts after the base's own next token."""
        ids = torch.tensor(tokens, device=self.traced.base.device)
        return self.traced(ids, min(count, self.traced.speculator.n_predict)).get("drafts").tolist()


def load_subject(
    *, model: str | None, base: str | None, speculator: str | None, device: str, dtype: str, tokens: list[int]
) -> Subject:
    """What the command line names: a model, or a base with a speculator.

    Raises:
        UserError: for neither or both, a model that cannot be loaded, or tokens that it does not have.
    """
    if (model is None) == (base is None) or (base is None) != (speculator is None):
        raise UserError("model: expected --model, or --base together with --speculator")
    from verl_speculator.base_model.loading import base_shape, choose_device, choose_dtype, load_base
    from verl_speculator.checkpoint.format import load_speculator, read_checkpoint_info

    width, vocabulary = base_shape(model or base)
    wrong = [token for token in tokens if token >= vocabulary]
    if wrong:
        raise UserError(f"tokens: {wrong[0]} is none of the model's; expected ids below {vocabulary}")
    if speculator is not None:
        read_checkpoint_info(speculator).check_base(width, vocabulary)
    device = choose_device(device)
    kind = choose_dtype(dtype, device)
    loaded = load_base(model or base, device=device, dtype=kind)
    if speculator is None:
        return ModelSubject(loaded)
    draft = load_speculator(speculator, device=device, dtype=kind)
    return PairSubject(loaded, draft.requires_grad_(False).eval())
