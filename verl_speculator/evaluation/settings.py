"""Settings of an evaluation, checked before anything heavy loads."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from verl_speculator.base_model.loading import BaseModelFormat
from verl_speculator.checkpoint.format import CheckpointInfo, read_checkpoint_info
from verl_speculator.decoding.options import DraftLength, SamplingPolicy, read_length
from verl_speculator.decoding.tree import DraftTree, check_tree_settings, read_tree
from verl_speculator.utils.atomic_io import check_writable
from verl_speculator.utils.settings import (
    AllowOtherBase,
    BaseModel,
    Device,
    Dtype,
    GgufFile,
    Option,
    Quantization,
    Temperature,
    TopK,
    TopP,
    UserError,
    check_minimums,
    nearest,
)

BASELINES = ("none", "prompt_lookup", "random")
# Hugging Face's loop without drafts runs only if it is named, since the base model alone is measured anyway.
ALL_BASELINES = (*BASELINES, "generate")


def split_names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(filter(None, map(str.strip, text.split(","))))


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that decides what is measured; all of it but `plots` is recorded."""

    base: BaseModel
    prompts: Annotated[tuple[Path, ...], Option("parquet or jsonl of prompts; may be given again")]
    out: Annotated[Path, Option("directory of results.csv and plots/; go on in it to add rows")]
    speculators: Annotated[
        tuple[str, ...], Option("checkpoint, run or quoted pattern; may be given again", flag="--speculator")
    ] = ()
    texts: Annotated[Path | None, Option("held-out text for CE, KL and accuracy", flag="--text")] = None
    num_prompts: Annotated[int, Option("prompts of each file, at even distances; 0 for all", minimum=0)] = 0
    num_texts: Annotated[int, Option("rows of the held-out text, likewise", minimum=0)] = 0
    num_trials: Annotated[int, Option("runs of each prompt", minimum=1)] = 1
    warmup_steps: Annotated[int, Option("generations before anything is timed", minimum=0)] = 3
    max_new_tokens: Annotated[int, Option("the most tokens of an answer", minimum=2)] = 128
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    draft_length: Annotated[
        DraftLength, Option("drafts per round, or auto [each one's n_predict]", parse=read_length, minimum=1)
    ] = None
    draft_trees: Annotated[
        tuple[Path, ...],
        Option("file of a tree: another row of each speculator; may be given again", flag="--draft-tree"),
    ] = ()
    kl_temperature: Annotated[float | None, Option("for kl_training_temperature [as trained, or 1]")] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: Annotated[int, Option("of sampling, the random baseline and the intervals")] = 0
    # The base model alone is measured with each of the others in any case.
    baselines: Annotated[tuple[str, ...], Option(f"comma-separated: {', '.join(ALL_BASELINES)}", parse=split_names)] = (
        BASELINES
    )
    plots: Annotated[bool, Option("draw the pictures too")] = True
    quantization: Quantization = None
    gguf_file: GgufFile = None
    allow_other_base: AllowOtherBase = False
    allow_untrained: Annotated[bool, Option("checkpoints that training never changed")] = False

    def __post_init__(self) -> None:
        self.policy  # noqa: B018
        self.form.check()
        self.form.check_file(self.base)
        check_minimums(self)
        if self.kl_temperature is not None and not self.kl_temperature > 0:
            raise UserError(f"kl_temperature={self.kl_temperature}: expected a number > 0")
        if self.draft_trees:
            check_tree_settings(None, self.temperature)
            if not self.speculators:
                raise UserError(f"draft_tree={self.draft_trees[0]}: there is no speculator to draft with")
        if not self.prompts:
            raise UserError("prompts: expected at least one file")
        for name in self.baselines:
            if name not in ALL_BASELINES:
                expected = f"{', '.join(ALL_BASELINES)}{nearest(name, ALL_BASELINES)}"
                raise UserError(f"baselines={name}: expected {expected}")

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

        Raises UserError if a pattern matches nothing, a directory is no checkpoint, a checkpoint drafts fewer tokens
        than asked for, or a file holds no tree that it can draft.
        """
        infos, trees = {name: read_checkpoint_info(name) for name in expand(self.speculators)}, self.trees()
        for name, info in infos.items():
            most = info.config.n_predict
            if isinstance(self.draft_length, int) and self.draft_length > most:
                raise UserError(f"draft_length={self.draft_length}: {name} was trained to draft {most} (n_predict)")
            for tree in trees.values():
                tree.check(info.config, info.vocab_size)
        return infos


def expand(names: Sequence[str]) -> list[str]:
    """The names, with each pattern replaced by the directories that it matches; each once, in order."""
    expanded: list[str] = []
    for name in names:
        found = [name]
        if glob.has_magic(name):
            found = sorted(filter(os.path.isdir, glob.glob(str(Path(name).expanduser()))))
        if not found:
            raise UserError(f"speculator={name}: no directory fits this pattern")
        expanded += found
    return list(dict.fromkeys(expanded))
