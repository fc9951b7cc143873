"""States of the base on disk: what is kept, what is read, and what never is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import verl_speculator.preflight.launch as launch
from helpers.training_runs import environment, overrides, read_log, script, train
from verl_speculator.data.alignment import align, states_read
from verl_speculator.data.hidden_state_cache import CHECKSUMS, MANIFEST, STATES, StateCache, check_directory
from verl_speculator.utils.settings import UserError

IDENTITY = {"the base's weights": "1", "data": {"max_length": 8}, "the contents of data.train_files": ["x"]}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 4))
@settings(deadline=None)
def test_all_that_valid_pairs_read_is_kept(masks, depths):
    mask = torch.tensor([bit for one in masks for bit in one]).long()
    borders = torch.tensor([0, *map(len, masks)]).cumsum(0)
    kept = set(states_read(mask, borders).tolist())
    rows = align(torch.ones_like(mask), mask, borders, depths, [])
    assert set(rows.positions.tolist()) <= kept
    assert set(rows.teachers[rows.valid].tolist()) <= kept
    # And no more than one state for each token of the assistant's, in its own document.
    assert kept == {t - 1 for t in mask.nonzero().flatten().tolist() if t not in borders.tolist()}


def fill(cache, rows):
    for row in rows:
        cache.write(row, torch.full((int(cache.lengths[row]), cache.width), float(row + 1)))


def test_rows_come_back_as_they_were_written(tmp_path):
    cache = StateCache.create(tmp_path / "c", IDENTITY, [2, 0, 3, 1], 4)
    assert cache.size == 6 * 4 * 2 == (tmp_path / "c" / STATES).stat().st_size
    assert not any(cache.has([row]) for row in range(4))
    fill(cache, [2, 0, 1])
    assert cache.has([0, 1, 2]) and not cache.has([0, 3])
    again = StateCache(tmp_path / "c")
    assert again.has([2, 0, 1]) and not again.has([3])
    read = again.read([2, 1, 0])
    assert read.dtype == torch.bfloat16 and read[:, 0].tolist() == [3, 3, 3, 1, 1]
    assert check_directory(tmp_path / "c", IDENTITY)
    with pytest.raises(ValueError, match="row 3"):
        cache.write(3, torch.zeros(2, 4))


def test_a_row_torn_by_a_crash_is_written_anew(tmp_path):
    fill(StateCache.create(tmp_path / "c", IDENTITY, [2, 3], 4), [0, 1])
    with (tmp_path / "c" / STATES).open("r+b") as file:
        file.seek(2 * 4 * 2 + 5)
        file.write(b"\x99")
    cache = StateCache(tmp_path / "c")
    assert cache.has([0]) and not cache.has([1])
    fill(cache, [1])
    assert StateCache(tmp_path / "c").has([0, 1])


def test_read_only_files_are_read(tmp_path, monkeypatch):
    fill(StateCache.create(tmp_path / "c", IDENTITY, [2, 3], 4), [0])
    # The superuser, as whom tests may run, could write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    cache = StateCache(tmp_path / "c")
    fill(cache, [1])
    assert cache.has([0]) and not cache.has([1])


def test_directories_that_hold_something_else(tmp_path):
    folder = tmp_path / "c"
    assert not check_directory(folder, IDENTITY)
    folder.mkdir()
    assert not check_directory(folder, IDENTITY)
    fill(StateCache.create(folder, IDENTITY, [2, 3], 4), [0])
    for changed, words in (
        ({"the base's weights": "2"}, r"holds other states \(its own, this run's\): the base's weights; remove it"),
        ({"data": {"max_length": 9, "x": 1}}, r"data.max_length \(8, 9\), data.x \(None, 1\); remove it"),
        ({"the contents of data.train_files": ["y"]}, "the contents of data.train_files; remove it, or name another"),
        ({"versions": {"transformers": "9"}}, "versions"),
    ):
        with pytest.raises(UserError, match=words):
            check_directory(folder, IDENTITY | changed)
    for name in (STATES, CHECKSUMS):
        torn = shutil.copytree(folder, tmp_path / name)
        os.truncate(torn / name, 3)
        with pytest.raises(UserError, match=f"torn, {name} has 3 bytes, expected"):
            check_directory(torn, IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file, expected a directory"):
        check_directory(tmp_path / "file", IDENTITY)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="torn, Expecting property name"):
        check_directory(folder, IDENTITY)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="so it is no cache"):
        check_directory(folder, IDENTITY)
    with pytest.raises(UserError, match="cannot be written to"):
        check_directory(Path("/proc/states"), IDENTITY)


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(UserError, match=r"needs 0.0 MB, the disk has 0.0 MB left"):
        StateCache.create(tmp_path / "c", IDENTITY, [2, 3], 4)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        StateCache.create(tmp_path / "c", IDENTITY, [2, 3], 4)
    assert not list(tmp_path.iterdir())


# In training.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def make(base, chat, runs):
    """Settings of a run of two epochs of five steps, with states in `runs / name`."""

    def settings(name, **more):
        cache = {} if name is None else {"data__cache_hidden_states": runs / name}
        loss = {"model__speculator__loss": "{ce: 0.5, kl: 1.0}", "trainer__total_epochs": 2}
        return overrides(base, chat, **(cache | loss | more))

    return settings


@pytest.fixture(scope="module")
def written(runs, make):
    """A run of two processes that made the cache."""
    return train(2, runs / "writing", make("states"))


def losses(log):
    return [log[step]["train/loss"] for step in sorted(log)]


def test_a_run_that_reads_all_equals_the_one_that_wrote(written, runs, make):
    """Through the launcher, in one process, in other micro-batches."""
    before = (runs / "states" / STATES).read_bytes()
    checksums = np.fromfile(runs / "states" / CHECKSUMS, np.uint32)
    assert len(checksums) == 40 and checksums.all()
    manifest = json.loads((runs / "states" / MANIFEST).read_text())
    assert manifest["identity"]["data"]["max_length"] == 1024 and manifest["rows"] == 40
    log = {"VERL_FILE_LOGGER_PATH": str(runs / "log.jsonl")}
    settings = make("states", trainer__logger="file", data__micro_batch_size_per_gpu=2)
    result = script(1, runs / "reading", *settings, **log)
    assert result.returncode == 0, result.stderr
    assert "states of 40 of 40 rows are cached" in result.stderr
    assert losses(read_log(runs / "log.jsonl")) == pytest.approx(losses(written), rel=1e-3)
    assert (runs / "states" / STATES).read_bytes() == before


@pytest.mark.parametrize("settings", [{}, {"method": "eagle3", "loss": "ce"}, {"method": "eagle3", "loss": "kl"}])
def test_the_base_rests(tmp_path, base, gloo, rows, settings):
    """Counted in the engine itself: no forward pass of the base once its states are there. eagle3 reads the states of
    all tokens, of three layers, and a fourth one for any teacher."""
    from helpers.engine_harness import build_engine, make_batch, run_batch

    engine = build_engine(base, speculator=settings)
    reads_sequence = engine.speculator.reads_sequence
    lengths = [
        len(states_read(row["loss_mask"], torch.tensor([0, len(row["loss_mask"])]), whole=reads_sequence))
        for row in rows
    ]
    assert not reads_sequence or lengths == [len(row["input_ids"]) for row in rows]
    width = 32 * engine.model_config.speculator_config.cached_states
    assert width == (128 if reads_sequence else 32)
    engine.state_cache = StateCache.create(tmp_path / "counted", IDENTITY, lengths, width)
    calls = []
    engine.base.base_model.register_forward_hook(lambda *_: calls.append(1))
    numbered = [row | {"row": torch.tensor([i])} for i, row in enumerate(rows)]
    first = run_batch(engine, make_batch(numbered, micro=4))["metrics"]["draft_sums"]
    made = len(calls)
    assert made == (4 if settings.get("loss") != "kl" else 6)  # with a teacher two more check its head
    plain = run_batch(build_engine(base, speculator=settings), make_batch(rows, micro=4))["metrics"]["draft_sums"]
    which = 1 if settings.get("loss") == "kl" else 0  # of the sums
    assert first[which] == pytest.approx(plain[which], rel=1e-2) and first[which] != plain[which]
    for more in ({"micro": 4}, {"micro": 4, "packed": False}):
        again = run_batch(engine, make_batch(numbered, **more))["metrics"]["draft_sums"]
        assert len(calls) == made
        torch.testing.assert_close(torch.tensor(again), torch.tensor(first), rtol=1e-5, atol=1e-5)
    half = build_engine(base, speculator=settings)
    half.state_cache = StateCache.create(tmp_path / "padded", IDENTITY, lengths, width)
    run_batch(half, make_batch(numbered, micro=4, packed=False))
    torch.testing.assert_close(
        half.state_cache.read(range(16)), engine.state_cache.read(range(16)), rtol=0.02, atol=0.02
    )


def test_killed_while_writing(written, runs, make):
    """Whatever had been written by then is whole, and a new run finishes the rest."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
        *("-m", "verl_speculator.train", f"trainer.default_local_dir={runs / 'killed'}"),
        *make("torn", data__train_batch_size=4, data__micro_batch_size_per_gpu=1),
    ]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    sums = runs / "torn" / CHECKSUMS
    deadline = time.monotonic() + 120
    while not (sums.exists() and np.fromfile(sums, np.uint32).any()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    subprocess.run(["pkill", "-KILL", "-f", str(runs / "killed")], check=True)
    process.wait()
    assert not np.fromfile(sums, np.uint32).all()
    assert losses(train(1, runs / "after", make("torn"))) == pytest.approx(losses(written), rel=1e-5)


def test_the_launcher_refuses_before_anything_loads(written, runs, make, bases, monkeypatch):
    def refused(words, *settings):
        with pytest.raises(UserError, match=words):
            launch.launch(["1", str(runs / "refused"), *settings])
        assert not (runs / "refused").exists()

    refused("the base's weights", *make("states", model__partial_pretrain=bases["qwen2_untied"]))
    refused(r"data.train_max_samples \(-1, 39\)", *make("states", data__train_max_samples=39))
    refused("the states of a base that is trained change", *make("new", model__freeze_base_model="false"))
    refused("expected a directory, or null", *make(None), "data.cache_hidden_states=3")
    (runs / "other").mkdir()
    (runs / "other" / "file").write_text("")
    refused("so it is no cache", *make("other"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    size = (runs / "states" / STATES).stat().st_size / 1e6
    refused(f"needs about {size:.1f} MB, the disk has 0.0 MB left", *make("new"))
