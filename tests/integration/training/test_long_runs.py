"""What takes minutes: `make test-slow`."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.training_runs import environment, overrides, train
from verl_speculator.checkpoint.format import latest_step, read_checkpoint_info, read_weights
from verl_speculator.utils.atomic_io import TEMPORARY

KILLS = 10


def weight(path: Path) -> int:
    """Bytes in a file or a directory, whatever comes and goes meanwhile."""
    total = 0
    for entry in [path, *path.rglob("*")]:
        with contextlib.suppress(OSError):
            total += entry.stat().st_size if entry.is_file() else 0
    return total


@pytest.mark.slow
def test_killed_during_a_save_ten_times(base, chat, tmp_path):
    """SIGKILL at a random moment of a save; what is there afterwards is whole, and resuming goes on from it."""
    run = tmp_path / "run"
    settings = overrides(
        base,
        chat,
        # Wide enough for a save to take a while: 300 MB with the optimizer's state.
        **{f"model__speculator__{name}_dim": 2048 for name in ("inner", "emb", "proj")},
        model__speculator__tie_weights="false",
        model__speculator__n_predict=5,
        trainer__total_training_steps=400,
        trainer__save_freq=1,
        trainer__max_ckpt_to_keep=3,
        optim__lr=1e-3,
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", "verl_speculator.train", f"trainer.default_local_dir={run}", "trainer.logger=console", *settings]
    rng = random.Random(0)
    reached, during = [], 0
    for kill in range(KILLS):
        before, doomed = latest_step(run) or 0, []
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            os.set_blocking(process.stdout.fileno(), False)
            wanted = before + rng.randint(1, 3)  # let it get somewhere first, so that there is something to resume
            deadline = time.monotonic() + 120
            while (latest_step(run) or 0) < wanted or not list(run.glob(f"{TEMPORARY}*")):
                process.stdout.read()
                assert process.poll() is None, "training ended by itself"
                assert time.monotonic() < deadline, "no save in two minutes"
                time.sleep(0.001)
            doomed = psutil.Process(process.pid).children(recursive=True)
            # A random share of what a whole checkpoint weighs: a moment of the save, however fast the disk is.
            share = rng.random() * (weight(run / f"global_step_{latest_step(run)}") if latest_step(run) else 0)
            while any(weight(entry) < share for entry in run.glob(f"{TEMPORARY}*")):
                pass
        finally:
            for one in doomed:  # the worker, that saves, first: it lives in a session of its own
                one.kill()
            process.kill()
            process.communicate()
        during += bool(list(run.glob(f"{TEMPORARY}*")))
        step = latest_step(run)
        assert step is not None and step > before, f"kill {kill}: resuming made no progress"
        info = read_checkpoint_info(run)
        read_weights(info)
        assert info.provenance["training"]["step"] == step
        reached.append(step)
    assert during >= KILLS // 2, f"only {during} of {KILLS} kills fell into a save"
    last = reached[-1] + 2
    found = train(1, run, [*settings, f"trainer.total_training_steps={last}"])
    assert sorted(found) == [reached[-1] + 1, last]
    assert not list(run.glob(f"{TEMPORARY}*")), "temporaries of killed saves are still there"
