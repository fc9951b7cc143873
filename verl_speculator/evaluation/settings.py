"""What an evaluation is asked to do, checked before anything heavy loads."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_speculator.base_model.loading import BaseModelFormat
from verl_speculator.checkpoint.format import CheckpointInfo, read_checkpoint_info
from verl_speculator.decoding.draft_length import DraftLength
from verl_speculator.decoding.sampling_policy import SamplingPolicy
from verl_speculator.decoding.tree import DraftTree, check_beside, read_tree
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.errors import UserError, nearest

BASELINES = ("none", "prompt_lookup", "random")
# Hugging Face's own loop without drafts: only by name, since the base alone is measured anyway.
OPTIONAL_BASELINES = ("generate",)


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that decides what is measured; all of it is recorded.

    Attributes:
        base: directory or hub name.
        speculators: checkpoints, runs, or patterns of them.
        prompts: prompt files, each reported apart.
        out: directory of the results.
        texts: held-out text, None to leave quality out.
        num_prompts: prompts of each file, at even distances; 0 for all.
        num_texts: rows of the held-out text, likewise.
        num_trials: runs of each prompt.
        warmup_steps: generations before anything is timed.
        max_new_tokens: the most tokens of an answer.
        temperature, top_p, top_k: the sampling policy.
        draft_length: γ, "auto", or None for each speculator's own `n_predict`.
        draft_trees: files of trees; each is another row of every speculator, beside its chain.
        kl_temperature: for `kl_training_temperature`; None for what a checkpoint was trained with, 1 if it names none.
        dtype, device: `auto` or a name.
        seed: of sampling, of the random baseline and of the bootstrap.
        baselines: of BASELINES and OPTIONAL_BASELINES. The base alone is run beside each of the others in any case.
        quantization, gguf_file: the form in which the base is held.
        allow_other_base: evaluate speculators on a base with other weights than they were trained for.
        allow_untrained: evaluate checkpoints that no training step has changed.
    """

    base: str
    speculators: tuple[str, ...]
    prompts: tuple[Path, ...]
    out: Path
    texts: Path | None = None
    num_prompts: int = 0
    num_texts: int = 0
    num_trials: int = 1
    warmup_steps: int = 3
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    draft_length: DraftLength = None
    draft_trees: tuple[Path, ...] = ()
    kl_temperature: float | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    baselines: tuple[str, ...] = BASELINES
    quantization: str | None = None
    gguf_file: str | None = None
    allow_other_base: bool = False
    allow_untrained: bool = False

    def __post_init__(self) -> None:
        self.policy  # noqa: B018
        self.form.check()
        self.form.check_file(self.base)
        for name, least in (
            ("num_prompts", 0),
            ("num_texts", 0),
            ("num_trials", 1),
            ("warmup_steps", 0),
            ("max_new_tokens", 2),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: expected a number ≥ {least}")
        if self.kl_temperature is not None and not self.kl_temperature > 0:
            raise UserError(f"kl_temperature={self.kl_temperature}: expected a number > 0")
        if isinstance(self.draft_length, int) and self.draft_length < 1:
            raise UserError(f"draft_length={self.draft_length}: expected a number ≥ 1")
        if self.draft_trees:
            check_beside(None, self.temperature)
            if not self.speculators:
                raise UserError(f"draft_tree={self.draft_trees[0]}: there is no speculator to draft with")
        if not self.prompts:
            raise UserError("prompts: expected at least one file")
        for name in self.baselines:
            if name not in (*BASELINES, *OPTIONAL_BASELINES):
                accepted = (*BASELINES, *OPTIONAL_BASELINES)
                raise UserError(f"baselines={name}: expected {', '.join(accepted)}{nearest(name, accepted)}")

    @property
    def policy(self) -> SamplingPolicy:
        """Temperature, top-p and top-k."""
        return SamplingPolicy(self.temperature, self.top_p, self.top_k)

    @property
    def form(self) -> BaseModelFormat:
        """In which the base is held."""
        return BaseModelFormat(self.quantization, self.gguf_file)

    def check_output(self) -> None:
        """Refuse an output directory that cannot be written to, without making it."""
        check_writable(f"out={self.out}", self.out)

    def trees(self) -> dict[Path, DraftTree]:
        """Every tree under its file.

        Raises:
            UserError: if a file holds none.
        """
        return {path: read_tree(path) for path in self.draft_trees}

    def checkpoints(self) -> dict[str, CheckpointInfo]:
        """Every checkpoint under the name it was given by; a run's folder means its latest step.

        Raises:
            UserError: if a pattern fits none, one is no checkpoint, or drafts fewer tokens than asked for; or if a
                file holds no tree.
        """
        found, trees = {name: read_checkpoint_info(name) for name in expand(self.speculators)}, self.trees()
        for name, info in found.items():
            if isinstance(self.draft_length, int) and self.draft_length > info.config.n_predict:
                raise UserError(
                    f"draft_length={self.draft_length}: {name} was trained to draft {info.config.n_predict} (n_predict)"
                )
            for tree in trees.values():
                tree.check(info.config, info.vocab_size)
        return found


def expand(names: Sequence[str]) -> list[str]:
    """Directories that names and patterns stand for, each once, in order."""
    found: dict[str, None] = {}
    for name in names:
        found_here = sorted(path for path in glob.glob(str(Path(name).expanduser())) if Path(path).is_dir())
        matches = found_here if glob.has_magic(name) else [name]
        if not matches:
            raise UserError(f"speculator={name}: no directory fits this pattern")
        found |= dict.fromkeys(matches)
    return list(found)
