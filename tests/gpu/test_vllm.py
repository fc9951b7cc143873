"""Our drafter in a real vLLM: the same text with and without it, and the acceptance of our own decoder.

Needs vLLM in the environment, its build for CUDA or its build for CPUs (docs/rollout.md); skipped without.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from engines import drafting, engine_settings, on_cuda, run, start

from helpers.drafters import load_base
from helpers.training_runs import overrides, script
from verl_speculator import load_speculator
from verl_speculator.decoding import speculative_generate

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (docs/rollout.md)"),
    pytest.mark.slow,
]

DRAFTS, COUNT = 3, 64
WIDTHS = {"inner_dim": 128, "emb_dim": 128, "proj_dim": 128}
FAMILIES = {
    "sum_rnn": {"method": "sum_rnn", **WIDTHS, "scale_input": True},
    "sum_lstm": {"method": "sum_lstm", **WIDTHS, "tie_lstm_embs": True},
    "medusa": {"method": "medusa"},
}


@pytest.fixture(scope="module")
def real(request) -> Path | None:
    """gsm8k-4m with its data where shared/ exists next to the project."""
    found = Path(__file__).resolve().parents[3] / "shared"
    return found if found.is_dir() else None


@pytest.fixture(scope="module")
def served(real, tokenizer, tmp_path_factory) -> Path:
    """A base with heads as wide as an engine's kernels want them."""
    if real is not None:
        return real / "models" / "gsm8k-4m"
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("served") / "base"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(real, chat) -> Path:
    return chat if real is None else real / "data" / "gsm8k" / "train.parquet"


@pytest.fixture(scope="module")
def prompts(served, data) -> list[list[int]]:
    """More requests than an engine takes at once, of many lengths."""
    import pandas as pd
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served)
    rows = pd.read_parquet(data)["messages"][-20:]
    return [
        tokenizer.apply_chat_template([dict(row[0])], add_generation_prompt=True, return_dict=False) for row in rows
    ]


class Trained(dict):
    """Checkpoints by family, trained by the launcher when they are asked for."""

    def __init__(self, base: Path, data: Path, root: Path) -> None:
        super().__init__()
        self.base, self.data, self.root = base, data, root

    def __missing__(self, name: str) -> Path:
        told = {f"model__speculator__{key}": value for key, value in FAMILIES[name].items()}
        steps = {"trainer__total_training_steps": 40, "trainer__save_freq": 40, "trainer__total_epochs": 30}
        more = {"data__micro_batch_size_per_gpu": 8, "model__speculator__n_predict": DRAFTS, "optim__lr": 1e-2}
        lines = overrides(self.base, self.data, **steps, **more, **told)
        if name == "medusa":
            lines = [line for line in lines if not line.split("=")[0].endswith("_dim")]
        done = script(1, self.root / name, *lines)
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
        self[name] = self.root / name / "global_step_40"
        return self[name]


@pytest.fixture(scope="module")
def trained(served, data, tmp_path_factory) -> Trained:
    return Trained(served, data, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def alone(served, prompts, tmp_path_factory) -> list[list[int]]:
    """What the engine says without a drafter."""
    steps = [{"generate": prompts, "max_tokens": COUNT}]
    return run(tmp_path_factory.mktemp("alone"), engine_settings(served), steps)[0]["tokens"]


class Ours(dict):
    """By family the text and the accepted share of drafts in our own decoder."""

    def __init__(self, base: Path, prompts: list[list[int]], trained: Trained) -> None:
        super().__init__()
        self.base, self.prompts, self.trained = base, prompts, trained

    def __missing__(self, name: str) -> tuple[list[list[int]], float]:
        base, speculator = load_base(self.base, torch.float32), load_speculator(self.trained[name], base=self.base)
        texts = [speculative_generate(base, speculator, prompt, max_new_tokens=COUNT) for prompt in self.prompts]
        self[name] = [text.tokens for text in texts], accept_rate(texts)
        return self[name]


@pytest.fixture(scope="module")
def ours(served, prompts, trained) -> Ours:
    return Ours(served, prompts, trained)


def accept_rate(texts) -> float:
    """The accepted share of all drafts."""
    rounds = [each for text in texts for each in text.rounds[1:]]
    return sum(each.accepted for each in rounds) / sum(each.drafted for each in rounds)


def check(result, stats, expected, rate, *, within: float = 0.02) -> None:
    """The same tokens, and drafts that are accepted as often."""
    assert result["tokens"] == expected
    assert stats["drafted"] > 0
    assert stats["accepted"] / stats["drafted"] == pytest.approx(rate, rel=within), stats


def two_steps(prompts):
    return [{"generate": prompts, "max_tokens": COUNT}, {"call": "acceptance_stats"}]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_the_bases_and_acceptance_our_decoders(name, served, prompts, trained, alone, ours, tmp_path):
    expected, rate = ours[name]
    assert expected == alone, "our decoder and vLLM disagree without a drafter"
    assert 0.05 < rate < 0.95, "a rate that says nothing"
    engine = engine_settings(served) | drafting(trained[name], DRAFTS)
    result, (stats,) = run(tmp_path, engine, two_steps(prompts))
    check(result, stats, expected, rate)


def test_sampled_text_accepts_as_often(served, prompts, trained, tmp_path):
    """At temperature 1 vLLM keeps a draft as often as our decoder does with the same greedy drafts: what it checks them
    against is the base's distribution. Two samples of some thousand drafts each, so within 15 %."""
    base, speculator = load_base(served, torch.float32), load_speculator(trained["sum_rnn"], base=served)
    settings = {"temperature": 1.0, "sampled_drafts": False, "max_new_tokens": COUNT}
    texts = [speculative_generate(base, speculator, prompt, seed=i, **settings) for i, prompt in enumerate(prompts * 2)]
    rate = accept_rate(texts)
    steps = [{"generate": prompts * 4, "max_tokens": COUNT, "temperature": 1.0}, {"call": "acceptance_stats"}]
    _, (stats,) = run(tmp_path, engine_settings(served) | drafting(trained["sum_rnn"], DRAFTS), steps)
    assert stats["accepted"] / stats["drafted"] == pytest.approx(rate, rel=0.15), (stats, rate)


def test_prompts_in_pieces_and_a_cache_that_is_too_small(served, prompts, trained, alone, ours, tmp_path):
    """Steps in which requests get no token: a prompt is read in pieces of 32, and requests are preempted."""
    engine = engine_settings(served, max_num_batched_tokens=32, num_gpu_blocks_override=24, enable_prefix_caching=False)
    result, (stats,) = run(tmp_path, engine | drafting(trained["sum_rnn"], DRAFTS), two_steps(prompts))
    assert result["tokens"] == alone
    # What a preempted request had drafted is drafted anew.
    assert stats["accepted"] / stats["drafted"] == pytest.approx(ours["sum_rnn"][1], rel=0.1)


def test_compiled(served, prompts, trained, alone, ours, tmp_path):
    engine = engine_settings(served) | drafting(trained["sum_lstm"], DRAFTS, compile=True)
    result, (stats,) = run(tmp_path, engine, two_steps(prompts))
    check(result, stats, alone, ours["sum_lstm"][1])


def test_two_tensor_parallel_workers(served, prompts, trained, alone, ours, tmp_path):
    """Both hold the speculator, and count the same."""
    if on_cuda() and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    engine = engine_settings(served, tensor_parallel_size=2) | drafting(trained["sum_rnn"], DRAFTS)
    result, stats = run(tmp_path, engine, two_steps(prompts))
    assert stats[0] == stats[1]
    check(result, stats[0], alone, ours["sum_rnn"][1])


def test_a_newer_speculator_takes_over(served, prompts, trained, alone, ours, tmp_path):
    """First one that knows nothing, then the trained one from its file; the text stays what it is."""
    from verl_speculator import build_speculator, save_speculator
    from verl_speculator.checkpoint.format import read_checkpoint_info

    info = read_checkpoint_info(trained["sum_rnn"])
    base = load_base(served, torch.float32)
    vocab, width = base.get_output_embeddings().weight.shape
    blank = build_speculator(info.config, hidden_size=width, vocab_size=vocab, seed=0)
    folder = save_speculator(blank, tmp_path / "blank")
    steps = [
        *two_steps(prompts),
        {"call": "update_speculator", "arguments": [str(trained["sum_rnn"]), 7]},
        *two_steps(prompts),
    ]
    first, (before,), updated, second, (after,) = run(
        tmp_path, engine_settings(served) | drafting(folder, DRAFTS), steps
    )
    assert first["tokens"] == second["tokens"] == alone
    assert before["version"] == 0 and updated == [7] and after["version"] == 7
    assert before["accepted"] / before["drafted"] < 0.02
    assert after["accepted"] / after["drafted"] == pytest.approx(ours["sum_rnn"][1], rel=0.02)


@pytest.mark.skipif(not on_cuda(), reason="only on CUDA an engine sleeps")
@pytest.mark.parametrize("level", [1, 2])
def test_the_speculator_outlives_sleep(level, served, prompts, trained, alone, ours, tmp_path):
    steps = [*two_steps(prompts), {"sleep": level}, {"wake": True}]
    steps += [] if level == 1 else [{"call": "reload_weights"}]
    engine = engine_settings(served, enable_sleep_mode=True) | drafting(trained["sum_rnn"], DRAFTS)
    results = run(tmp_path, engine, [*steps, *two_steps(prompts)])
    check(results[-2], results[-1][0], alone, ours["sum_rnn"][1])


@pytest.mark.parametrize(
    ("drafts", "more", "told"),
    [
        (2, {}, "speculative_config.num_speculative_tokens=2: expected 3"),
        (3, {"additional_config": {"verl_speculator": {"path": "relative/checkpoint"}}}, "expected an absolute path"),
    ],
    ids=["another_number_of_drafts", "a_relative_path"],
)
def test_refused_before_the_base_is_loaded(drafts, more, told, served, trained, tmp_path):
    engine = engine_settings(served) | drafting(trained["sum_rnn"], drafts) | more
    done = start(tmp_path, engine, [])
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert "Starting to load model" not in done.stdout + done.stderr


def test_medusa_heads_in_vllms_own_drafter(served, prompts, trained, alone, ours, tmp_path):
    """The checkpoint as it was trained, without our code in the engine."""
    config = {"method": "medusa", "model": str(trained["medusa"]), "num_speculative_tokens": DRAFTS}
    if not on_cuda():
        pytest.skip("vLLM's Medusa runs on CUDA")
    engine = engine_settings(served, speculative_config=config, disable_log_stats=False)
    (result,) = run(tmp_path, engine, [{"generate": prompts, "max_tokens": COUNT}])
    assert result["tokens"] == alone
