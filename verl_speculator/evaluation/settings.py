"""Settings of an evaluation, checked before anything heavy loads."""

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
# Hugging Face's own loop without drafts runs only if it is named: the base model alone is measured anyway.
OPTIONAL_BASELINES = ("generate",)
LEAST = {"num_prompts": 0, "num_texts": 0, "num_trials": 1, "warmup_steps": 0, "max_new_tokens": 2}


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how.

    Attributes:
        base: directory or hub name.
        speculators: checkpoints, runs, or patterns of them.
        prompts: prompt files, each reported apart.
        out: directory of the results.
        texts: held-out text, None to leave quality out.
        num_prompts, num_texts: sample of each file, at even distances; 0 for all rows.
        num_trials: runs of each prompt.
        warmup_steps: generations before anything is timed.
        max_new_tokens: of an answer.
        temperature, top_p, top_k: the sampling policy.
        draft_length: γ, "auto", or None for each speculator's own `n_predict`.
        draft_trees: files of trees; each adds a row for every speculator.
        kl_temperature: of `kl_training_temperature`; None for the one that a checkpoint was trained with, else 1.
        dtype, device: `auto` or a name.
        seed: of sampling, of the random baseline and of the bootstrap.
        baselines: of BASELINES and OPTIONAL_BASELINES. Every method is compared with the base model alone in any case.
        quantization, gguf_file: format of the base model.
        allow_other_base: accept speculators that were trained for other weights of the base model.
        allow_untrained: accept checkpoints that no training step has changed.

    Raises:
        UserError: for a value out of range.
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
        for name, least in LEAST.items():
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
        accepted = (*BASELINES, *OPTIONAL_BASELINES)
        for name in self.baselines:
            if name not in accepted:
                raise UserError(f"baselines={name}: expected {', '.join(accepted)}{nearest(name, accepted)}")

    @property
    def policy(self) -> SamplingPolicy:
        """Temperature, top-p and top-k."""
        return SamplingPolicy(self.temperature, self.top_p, self.top_k)

    @property
    def form(self) -> BaseModelFormat:
        """The format of the base model."""
        return BaseModelFormat(self.quantization, self.gguf_file)

    def check_output(self) -> None:
        """Check that the output directory can be written to, without creating it."""
        check_writable(f"out={self.out}", self.out)

    def trees(self) -> dict[Path, DraftTree]:
        """The draft trees by file. Raises `UserError` for a file that holds none."""
        return {path: read_tree(path) for path in self.draft_trees}

    def checkpoints(self) -> dict[str, CheckpointInfo]:
        """The checkpoints by the name they were given by; a run directory stands for its latest step.

        Raises:
            UserError: if a pattern matches nothing, a directory is no checkpoint, a checkpoint drafts fewer tokens than
                asked for, or a file holds no tree that it can draft.
        """
        infos, trees = {name: read_checkpoint_info(name) for name in expand(self.speculators)}, self.trees()
        for name, info in infos.items():
            if isinstance(self.draft_length, int) and self.draft_length > info.config.n_predict:
                raise UserError(
                    f"draft_length={self.draft_length}: {name} was trained to draft {info.config.n_predict} (n_predict)"
                )
            for tree in trees.values():
                tree.check(info.config, info.vocab_size)
        return infos


def expand(names: Sequence[str]) -> list[str]:
    """The names, with each pattern replaced by the directories that it matches; each once, in order."""
    expanded: list[str] = []
    for name in names:
        directories = sorted(path for path in glob.glob(str(Path(name).expanduser())) if Path(path).is_dir())
        if glob.has_magic(name) and not directories:
            raise UserError(f"speculator={name}: no directory fits this pattern")
        expanded += directories if glob.has_magic(name) else [name]
    return list(dict.fromkeys(expanded))
