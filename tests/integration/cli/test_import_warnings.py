"""What a user reads on standard error: what concerns the run, and nothing of what verl says while it is imported."""

from __future__ import annotations

import subprocess
import sys

from helpers.training_runs import environment, overrides, script

# Our own lines, and the bars of transformers and tqdm.
WANTED = ("verl_speculator.", "Epoch ", "Loading weights", "Writing model shards")
IMPORT = "import verl_speculator.training.plugin"


def run_python(*statements: str) -> str:
    """Standard error of a process that starts as a training process on a CPU does."""
    command = [sys.executable, "-c", "; ".join(statements)]
    result = subprocess.run(command, env=environment(VERL_PLATFORM="cpu"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_training_on_a_cpu_prints_only_what_concerns_the_run(base, chat, tmp_path):
    steps = {"trainer__total_training_steps": 1}
    result = script(1, tmp_path / "out", *overrides(base, chat, **steps))
    assert result.returncode == 0, result.stderr
    before, summary = result.stderr.split("╭", 1)
    assert "speculator trained" in summary and summary.splitlines()[-1].startswith("verl-speculator serve")
    lines = [line for text in before.splitlines() for line in text.split("\r") if line.strip()]
    assert any(line.startswith("verl_speculator.train: device cpu") for line in lines)
    assert [line for line in lines if not line.startswith(WANTED)] == []


def test_importing_the_engine_prints_nothing():
    assert run_python(IMPORT) == ""


def test_other_messages_of_the_same_loggers_are_printed():
    stderr = run_python(
        IMPORT,
        "import logging, warnings",
        "logging.getLogger('verl.plugin.platform.platform_manager').warning('No accelerator found')",
        "logging.getLogger('torch.fx._symbolic_trace').warning('cannot trace')",
        "warnings.warn('torchtitan engine is slow')",
    )
    assert all(words in stderr for words in ("No accelerator found", "cannot trace", "torchtitan engine is slow"))
