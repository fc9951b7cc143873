"""Training with a draft vocabulary: from counting its tokens to a checkpoint that decodes."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch

from helpers.drafters import alone, load_base
from helpers.training_runs import overrides, script, train
from verl_speculator import load_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.config.draft_vocabulary import DraftVocabulary, most_used, vocabulary_digest
from verl_speculator.config.hydra import load_run_config
from verl_speculator.decoding import speculative_generate
from verl_speculator.preflight.base_model import check_base, check_checkpoints
from verl_speculator.utils.settings import UserError

SIZE, STEPS = 40, 4


def options(base, chat, size=SIZE, **more):
    settings = {"trainer__total_training_steps": STEPS, "trainer__save_freq": 2, "data__train_max_samples": 40}
    mix = {"model__speculator__loss": "{ce: 1, kl: 0.5, tv: 0.5}", "model__speculator__draft_vocab_size": size}
    return overrides(base, chat, **(settings | mix | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def metrics(folder, base, chat):
    return train(1, folder / "one", options(base, chat, data__val_files=chat, data__val_max_samples=9))


def test_the_vocabulary_is_that_of_the_answers(metrics, folder, chat, tokenizer, base):
    """Against a count by hand: the assistant's turns as the chat template writes them."""
    counts = Counter()
    for row in pq.read_table(chat)["messages"].to_pylist()[:40]:
        for i, message in enumerate(row):
            if message["role"] == "assistant":
                texts = [
                    tokenizer.apply_chat_template(row[:end], tokenize=False, add_generation_prompt=end == i)
                    for end in (i, i + 1)
                ]
                prompt, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
                counts.update(whole[len(prompt) :])
    vocabulary = DraftVocabulary.read(folder / "one" / "draft_vocabulary.json")
    size = load_base(base).config.vocab_size
    found, outside = set(vocabulary.tokens), set(range(size)) - set(vocabulary.tokens)
    assert len(found) == SIZE and vocabulary.vocab_size == size
    assert vocabulary.tokenizer == vocabulary_digest(tokenizer)
    by_count = [counts[token] for token in range(size)]
    assert vocabulary.tokens == most_used(by_count, SIZE, {tokenizer.eos_token_id} & found)
    assert max(counts[t] for t in outside) <= min(counts[t] for t in found - {tokenizer.eos_token_id})
    share = sum(counts[t] for t in found) / counts.total()
    assert vocabulary.coverage == pytest.approx(share, abs=1e-9) and share < 1


def test_loss_falls_and_coverage_is_reported(metrics):
    assert metrics[STEPS]["train/loss"] < metrics[1]["train/loss"]
    assert 0 < metrics[1]["train/coverage"] < 1 and 0 < metrics[STEPS]["val/coverage"] < 1


def test_checkpoint_has_the_vocabulary_and_decodes_losslessly(metrics, folder, base):
    checkpoint = folder / "one" / f"global_step_{STEPS}"
    speculator = load_speculator(checkpoint, base=base, dtype=torch.float64)
    tokens = DraftVocabulary.read(folder / "one" / "draft_vocabulary.json").tokens
    assert tuple(speculator.draft_tokens.tolist()) == tokens
    on_disk = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    assert (on_disk["d2t"] + torch.arange(SIZE)).tolist() == list(tokens) and len(on_disk["head.0.weight"]) == SIZE
    assert json.loads((checkpoint / "config.json").read_text())["draft_vocab_size"] == SIZE
    model, prompt = load_base(base), [5, 6, 7, 8]
    result = speculative_generate(model, speculator, prompt, max_new_tokens=40, eos_token_id=())
    assert result.tokens == alone(model, prompt, 40, eos_token_id=None)


def test_resuming_continues_the_run(metrics, folder, base, chat):
    shutil.copytree(folder / "one" / "global_step_2", folder / "again" / "global_step_2")
    (folder / "again" / "latest_checkpointed_iteration.txt").write_text("2")
    again = train(1, folder / "again", options(base, chat))
    assert sorted(again) == [3, 4]
    for step, found in again.items():
        for key in ("train/loss", "train/grad_norm", "train/coverage"):
            assert found[key] == pytest.approx(metrics[step][key], rel=1e-5), (step, key)


def test_two_processes_give_the_numbers_of_one(metrics, folder, base, chat):
    two = train(2, folder / "two", options(base, chat))
    vocabularies = [DraftVocabulary.read(folder / name / "draft_vocabulary.json") for name in ("one", "two")]
    assert vocabularies[0] == vocabularies[1]
    for step, found in two.items():
        for key in ("train/loss", "train/grad_norm", "train/coverage", "train/expected_accept_length"):
            assert found[key] == pytest.approx(metrics[step][key], rel=1e-4), (step, key)


def test_a_file_takes_the_place_of_the_count(metrics, folder, base, chat, tmp_path):
    file = folder / "one" / "draft_vocabulary.json"
    settings = options(base, chat, "null", model__speculator__draft_vocab_file=file, trainer__save_freq=-1)
    found = train(1, tmp_path / "run", settings)
    assert found[STEPS]["train/loss"] == pytest.approx(metrics[STEPS]["train/loss"], rel=1e-6)
    assert read_checkpoint_info(tmp_path / "run").config.draft_vocab_size == SIZE
    other, vocabulary = tmp_path / "other.json", DraftVocabulary.read(file)
    outside = min(set(range(vocabulary.vocab_size)) - set(vocabulary.tokens))
    tokens = tuple(sorted([outside, *(t for t in vocabulary.tokens if t != vocabulary.tokens[1])]))
    DraftVocabulary(tokens, vocabulary.vocab_size, vocabulary.tokenizer, 0.5).write(other)
    changed = options(base, chat, "null", model__speculator__draft_vocab_file=other)
    run = load_run_config([*changed, f"trainer.default_local_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"the run differs .*: the tokens of model.speculator.draft_vocab_file;"):
        check_checkpoints(run, check_base(run), 40)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"size": 400}, "model.speculator.draft_vocab_size=400: the base has"),
        ({"size": 1}, "model.speculator.draft_vocab_size=1: the end tokens alone are 1; expected more than that"),
        ({"size": "many"}, "model.speculator.draft_vocab_size=many: expected an integer of at least 1, or null"),
    ],
)
def test_bad_sizes_end_in_one_line(base, chat, tmp_path, more, words):
    result = script(1, tmp_path / "out", *options(base, chat, **more))
    assert result.returncode == 2 and result.stderr.startswith(f"error: {words}"), result.stderr
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_refused_on_resuming(metrics, folder, base, chat):
    result = script(1, folder / "one", *options(base, chat, SIZE + 1))
    assert result.returncode == 2
    assert f"draft_vocab_size ({SIZE}, {SIZE + 1})" in result.stderr
    result = script(1, folder / "one", *options(base, chat, "null"))
    assert result.returncode == 2 and f"draft_vocab_size ({SIZE}, None)" in result.stderr
