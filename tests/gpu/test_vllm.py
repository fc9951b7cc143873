"""Speculators in a real vLLM, on both of its runners: the same text with and without drafts, and the acceptance of our
own decoder.

Needs vLLM, its build for CUDA or its build for CPUs, in this environment or in those that `engines` names
(docs/rollout.md); what cannot run is skipped with the reason.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from engines import (
    V1,
    V2,
    chat_prompts,
    draft_counts,
    drafting,
    eagle3_drafting,
    engine_settings,
    missing,
    on_cuda,
    run,
    start,
)

from helpers.drafters import load_base
from helpers.training_runs import overrides, script
from verl_speculator import SpeculatorConfig, build_speculator, load_speculator, save_speculator
from verl_speculator.checkpoint.format import WEIGHTS_FILE, read_checkpoint_info
from verl_speculator.decoding import speculative_generate
from verl_speculator.models.layers import copy_base_tables

pytestmark = pytest.mark.slow

DRAFTS, COUNT = 3, 64
WIDTHS = {"inner_dim": 128, "emb_dim": 128, "proj_dim": 128}
FAMILIES = {
    "sum_rnn": {"method": "sum_rnn", **WIDTHS, "scale_input": True},
    "sum_lstm": {"method": "sum_lstm", **WIDTHS, "tie_lstm_embs": True},
    "medusa": {"method": "medusa"},
}
SINGLE = "a_single_draft"  # V2 has another class for it
SETTINGS = FAMILIES | {SINGLE: {"method": "sum_rnn", "n_predict": 1, **WIDTHS}}


@pytest.fixture(scope="module", params=[V1, V2])
def route(request) -> str:
    """vLLM's V1 runner with our proposer, or its V2 runner with our draft model."""
    if (reason := missing(request.param)) is not None:
        pytest.skip(reason)
    return request.param


def interpreted(route: str) -> bool:
    """Whether Triton's interpreter runs the sampling of vLLM, which then takes a hundred times as long."""
    return route == V2 and not on_cuda()


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
    return chat_prompts(served, data)[-20:]


class Trained(dict):
    """Checkpoints by family, trained by the launcher when they are asked for."""

    def __init__(self, base: Path, data: Path, root: Path) -> None:
        super().__init__()
        self.base, self.data, self.root = base, data, root

    def __missing__(self, name: str) -> Path:
        settings = {"n_predict": DRAFTS} | SETTINGS[name]
        told = {f"model__speculator__{key}": value for key, value in settings.items()}
        steps = {"trainer__total_training_steps": 40, "trainer__save_freq": 40, "trainer__total_epochs": 30}
        more = {"data__micro_batch_size_per_gpu": 8, "optim__lr": 1e-2}
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
def alone(route, served, prompts, tmp_path_factory) -> list[list[int]]:
    """What the engine says without drafts."""
    steps = [{"generate": prompts, "max_tokens": COUNT}]
    return run(route, tmp_path_factory.mktemp("alone"), engine_settings(served), steps)[0]["tokens"]


class Ours(dict):
    """By family the text in our own decoder, and how its drafts are accepted."""

    def __init__(self, base: Path, prompts: list[list[int]], trained: Trained) -> None:
        super().__init__()
        self.base, self.prompts, self.trained = base, prompts, trained

    def __missing__(self, name: str) -> tuple[list[list[int]], dict[str, float]]:
        base, speculator = load_base(self.base, torch.float32), load_speculator(self.trained[name], base=self.base)
        texts = [speculative_generate(base, speculator, prompt, max_new_tokens=COUNT) for prompt in self.prompts]
        self[name] = [text.tokens for text in texts], draft_counts(texts, DRAFTS)
        return self[name]


@pytest.fixture(scope="module")
def ours(served, prompts, trained) -> Ours:
    return Ours(served, prompts, trained)


def rate(counts) -> float:
    return counts["accepted"] / counts["drafted"]


def two_steps(prompts):
    return [{"generate": prompts, "max_tokens": COUNT}, {"counts": True}]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_the_bases_and_acceptance_our_decoders(name, route, served, prompts, trained, alone, ours, tmp_path):
    expected, counts = ours[name]
    assert expected == alone, "our decoder and vLLM disagree without drafts"
    assert 0.05 < rate(counts) < 0.95, "a rate that says nothing"
    result, seen = run(
        route, tmp_path, engine_settings(served) | drafting(route, trained[name], DRAFTS), two_steps(prompts)
    )
    assert result["tokens"] == expected
    assert rate(seen) == pytest.approx(rate(counts), rel=0.02)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy_drafts", "sampled_drafts"])
def test_sampled_text_accepts_as_often(sampled, route, served, prompts, trained, tmp_path):
    """At temperature 1 vLLM keeps a draft as often as our decoder does with drafts of the same kind: what it checks
    them against is the base's distribution. Two samples of some thousand drafts each, so within 15 %."""
    base, speculator = load_base(served, torch.float32), load_speculator(trained["sum_rnn"], base=served)
    settings = {"temperature": 1.0, "sampled_drafts": sampled, "max_new_tokens": COUNT}
    texts = [speculative_generate(base, speculator, prompt, seed=i, **settings) for i, prompt in enumerate(prompts * 2)]
    copies = 1 if interpreted(route) else 4
    steps = [{"generate": prompts * copies, "max_tokens": COUNT, "temperature": 1.0}, {"counts": True}]
    engine = engine_settings(served) | drafting(route, trained["sum_rnn"], DRAFTS, sampled=sampled)
    _, seen = run(route, tmp_path, engine, steps)
    assert rate(seen) == pytest.approx(rate(draft_counts(texts, DRAFTS)), rel=0.15), seen


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy_drafts", "sampled_drafts"])
def test_first_tokens_have_the_bases_distribution(sampled, route, served, prompts, trained, tmp_path):
    """Chi-square tests of the first two and three tokens of many answers to one prompt, at temperature 1. The first
    token is sampled before anything is drafted, the others are accepted drafts or their replacements. What is expected
    of the most likely beginnings follows from the base model's own distributions; all others are one class."""
    draws = 400 if interpreted(route) else 1500
    limit = 0.01 / 8  # 1 % over both kinds of drafts, both routes, two lengths
    prompt = prompts[0]
    gate = {"draft_up_to": 64} if route == V1 else {}
    engine = engine_settings(served, max_num_seqs=64, seed=0) | drafting(
        route, trained["sum_rnn"], DRAFTS, sampled=sampled, **gate
    )
    steps = [{"generate": [prompt] * draws, "max_tokens": 3, "temperature": 1.0}, {"counts": True}]
    result, counts = run(route, tmp_path, engine, steps)
    assert 0.05 < rate(counts) < 0.95 and counts["rounds"] >= 0.9 * draws
    answers = [tuple(tokens) for tokens in result["tokens"]]
    expected = likely_beginnings(load_base(served, torch.float32), prompt, 3, least=5 / draws)
    for length in (2, 3):
        chances = {beginning: chance for beginning, chance in expected.items() if len(beginning) == length}
        seen = Counter(answer[:length] for answer in answers)
        observed = [seen[beginning] for beginning in chances]
        p_value = chi_square_p_value([*observed, draws - sum(observed)], [*chances.values(), 1 - sum(chances.values())])
        assert len(chances) >= 5, "too few classes"
        assert p_value > limit, (length, p_value)


@torch.no_grad()
def likely_beginnings(base, prompt: list[int], length: int, *, least: float) -> dict[tuple[int, ...], float]:
    """Every beginning of an answer of up to `length` tokens whose probability is `least` or more."""
    found: dict[tuple[int, ...], float] = {}
    front: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for beginning, chance in front.items():
            probabilities = chance * base(torch.tensor([[*prompt, *beginning]])).logits[0, -1].softmax(-1)
            likely = (probabilities >= least).nonzero().flatten().tolist()
            longer |= {(*beginning, token): probabilities[token].item() for token in likely}
        found |= longer
        front = {beginning: chance for beginning, chance in longer.items() if beginning[-1] not in end_tokens(base)}
    return found


def end_tokens(base) -> list[int]:
    end = base.generation_config.eos_token_id
    return end if isinstance(end, list) else [end]


def chi_square_p_value(observed: list[int], chances: list[float]) -> float:
    """Of Pearson's statistic, for classes of given chances."""
    draws = sum(observed)
    statistic = sum(
        (seen - chance * draws) ** 2 / (chance * draws) for seen, chance in zip(observed, chances, strict=True)
    )
    half = torch.tensor([(len(chances) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def test_prompts_in_pieces_and_a_cache_that_is_too_small(route, served, prompts, trained, alone, ours, tmp_path):
    """Steps in which requests get no token: a prompt is read in pieces of 32, and requests are preempted."""
    engine = engine_settings(served, max_num_batched_tokens=32, num_gpu_blocks_override=24, enable_prefix_caching=False)
    result, seen = run(route, tmp_path, engine | drafting(route, trained["sum_rnn"], DRAFTS), two_steps(prompts))
    assert result["tokens"] == alone
    # What a preempted request had drafted is drafted anew.
    assert rate(seen) == pytest.approx(rate(ours["sum_rnn"][1]), rel=0.1)


def test_a_single_draft(served, prompts, trained, ours, tmp_path):
    if (reason := missing(V2)) is not None:
        pytest.skip(reason)
    result, seen = run(V2, tmp_path, engine_settings(served) | drafting(V2, trained[SINGLE], 1), two_steps(prompts))
    expected, counts = ours[SINGLE]
    assert result["tokens"] == expected and rate(seen) == pytest.approx(rate(counts), rel=0.02)


@pytest.mark.skipif(not on_cuda(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("batch", [1, 16, 64, 256])
def test_bf16_with_cuda_graphs(batch, route, served, prompts, trained, ours, tmp_path):
    """In bf16 two tokens may tie, so that a text is another's from there on; most texts and the acceptance stay."""
    engine = engine_settings(served, max_num_seqs=batch, dtype="bfloat16", enforce_eager=False)
    many = (prompts * 13)[: max(batch, len(prompts))]
    (expected,) = run(route, tmp_path / "alone", engine, two_steps(many)[:1])
    engine |= drafting(route, trained["sum_rnn"], DRAFTS, **({"draft_up_to": batch} if route == V1 else {}))
    result, seen = run(route, tmp_path / "drafting", engine, two_steps(many))
    same = sum(a == b for a, b in zip(expected["tokens"], result["tokens"], strict=True))
    assert same >= 0.7 * len(many)
    assert rate(seen) == pytest.approx(rate(ours["sum_rnn"][1]), rel=0.1)


def test_compiled(served, prompts, trained, ours, tmp_path):
    if (reason := missing(V1)) is not None:
        pytest.skip(reason)
    engine = engine_settings(served) | drafting(V1, trained["sum_lstm"], DRAFTS, compile=True)
    result, seen = run(V1, tmp_path, engine, two_steps(prompts))
    expected, counts = ours["sum_lstm"]
    assert result["tokens"] == expected and rate(seen) == pytest.approx(rate(counts), rel=0.02)


def test_two_tensor_parallel_workers(route, served, prompts, trained, alone, ours, tmp_path):
    """Each holds a half of the tables."""
    if on_cuda() and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    engine = engine_settings(served, tensor_parallel_size=2) | drafting(route, trained["sum_rnn"], DRAFTS)
    result, seen = run(route, tmp_path, engine, two_steps(prompts))
    assert result["tokens"] == alone
    assert rate(seen) == pytest.approx(rate(ours["sum_rnn"][1]), rel=0.02)


EAGLE3 = {
    "one_layer": {"draft_vocab_size": 64},
    "two_layers": {"num_layers": 2, "embedding": "own", "norm_before_residual": True, "draft_vocab_size": 24},
    "whole_vocabulary": {},
}


class Eagle3Drafts(dict):
    """Untrained EAGLE-3 drafts by their settings, which draft the tokens that the base model's answers use most."""

    def __init__(self, base: Path, answers: list[list[int]], root: Path) -> None:
        super().__init__()
        self.base, self.answers, self.root = base, answers, root

    def __missing__(self, name: str) -> Path:
        self[name] = self.make(name, seed=0)
        return self[name]

    def make(self, name: str, seed: int) -> Path:
        """A draft of random layers that starts from the base model's tables and final norm."""
        from transformers import AutoConfig

        base, settings = load_base(self.base, torch.float32), EAGLE3[name]
        config = SpeculatorConfig(method="eagle3", n_predict=DRAFTS, **settings)
        vocab, width = base.get_output_embeddings().weight.shape
        tokens = None
        if (size := config.draft_vocab_size) is not None:
            counts = torch.bincount(
                torch.tensor([token for answer in self.answers for token in answer]), minlength=vocab
            )
            tokens = sorted(counts.topk(size).indices.tolist())
        shape = {"hidden_size": width, "vocab_size": vocab, "draft_tokens": tokens}
        draft = build_speculator(config.for_base(AutoConfig.from_pretrained(self.base)), **shape, seed=seed)
        draft.copy_block(base)
        copy_base_tables(draft, base)
        if tokens is None:  # vLLM replaces a head that equals its target's by that one
            draft.draft_head.weight.data.mul_(1.01)
        return save_speculator(draft, self.root / f"{name}_{seed}")


@pytest.fixture(scope="module")
def eagle3_drafts(served, alone, tmp_path_factory) -> Eagle3Drafts:
    return Eagle3Drafts(served, alone, tmp_path_factory.mktemp("eagle3"))


def our_eagle3(checkpoint: Path, base: Path, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, object]]:
    """The text in our own decoder, and how its drafts are accepted."""
    model = load_base(base, torch.float32)
    speculator = load_speculator(checkpoint)
    speculator.attach(model)
    texts = [speculative_generate(model, speculator, prompt, max_new_tokens=COUNT) for prompt in prompts]
    return [text.tokens for text in texts], draft_counts(texts, DRAFTS)


@pytest.mark.parametrize("name", EAGLE3)
def test_eagle3_in_vllms_own_drafter(name, route, served, prompts, eagle3_drafts, alone, tmp_path):
    """The text is the base's, and as many drafts are accepted at every position as in our decoder: with random layers
    few, but not the same few if a layer, a position or a state were another."""
    checkpoint = eagle3_drafts[name]
    expected, counts = our_eagle3(checkpoint, served, prompts)
    assert expected == alone and counts["accepted"] > 20
    engine = engine_settings(served) | eagle3_drafting(checkpoint, DRAFTS)
    result, seen = run(route, tmp_path, engine, two_steps(prompts))
    assert result["tokens"] == expected
    if on_cuda():
        assert rate(seen) == pytest.approx(rate(counts), rel=0.1)
    else:
        assert {key: seen[key] for key in counts} == counts


def test_vllms_own_update_of_eagle3(route, served, prompts, eagle3_drafts, tmp_path):
    """Another draft, then this one in three chunks, with the names of our checkpoint."""
    if route != V2:
        pytest.skip("vLLM updates draft models in its V2 runner")
    checkpoint, other = eagle3_drafts["one_layer"], eagle3_drafts.make("one_layer", seed=9)
    expected, counts = our_eagle3(checkpoint, served, prompts)
    chunks = [{"path": str(checkpoint / WEIGHTS_FILE), "index": i, "count": 3} for i in range(3)]
    steps = [
        *two_steps(prompts),
        {"call": "start_draft_weight_update"},
        *({"call": "update_weights", "arguments": [chunk]} for chunk in chunks),
        {"call": "finish_weight_update"},
        *two_steps(prompts),
    ]
    engine = engine_settings(served, weight_transfer_config={"backend": "file"}) | eagle3_drafting(other, DRAFTS)
    results = run(V2, tmp_path, engine, steps)
    assert results[0]["tokens"] == results[-2]["tokens"] == expected
    before, after = results[1], results[-1]
    assert before["accepted_per_position"] != counts["accepted_per_position"]
    assert after["accepted"] - before["accepted"] == pytest.approx(counts["accepted"], rel=0.02)


def untrained(checkpoint: Path, base: Path, folder: Path) -> Path:
    """Another checkpoint of the same configuration, with random weights."""
    config = read_checkpoint_info(checkpoint).config
    vocab, width = load_base(base, torch.float32).get_output_embeddings().weight.shape
    return save_speculator(build_speculator(config, hidden_size=width, vocab_size=vocab, seed=0), folder)


def test_a_newer_speculator_takes_over(route, served, prompts, trained, alone, ours, tmp_path):
    """The untrained speculator, then the trained one from its file; the text stays what it is."""
    folder = untrained(trained["sum_rnn"], served, tmp_path / "blank")
    steps = [
        *two_steps(prompts),
        {"call": "acceptance_stats"},
        {"call": "update_speculator", "arguments": [str(trained["sum_rnn"]), 7]},
        *two_steps(prompts),
        {"call": "acceptance_stats"},
    ]
    first, before, (old,), updated, second, after, (new,) = run(
        route, tmp_path, engine_settings(served) | drafting(route, folder, DRAFTS), steps
    )
    assert first["tokens"] == second["tokens"] == alone
    assert old["version"] == 0 and updated == [7] and new["version"] == 7
    assert rate(before) < 0.02
    since = {key: after[key] - before[key] for key in ("accepted", "drafted")}
    assert rate(since) == pytest.approx(rate(ours["sum_rnn"][1]), rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_vllms_own_weight_update(name, served, prompts, trained, ours, tmp_path):
    """The untrained speculator, then the trained one in three chunks."""
    if (reason := missing(V2)) is not None:
        pytest.skip(reason)
    blank = untrained(trained[name], served, tmp_path / "blank")
    chunks = [{"path": str(trained[name] / WEIGHTS_FILE), "index": i, "count": 3} for i in range(3)]
    steps = [
        *two_steps(prompts),
        {"call": "start_draft_weight_update"},
        *({"call": "update_weights", "arguments": [chunk]} for chunk in chunks),
        {"call": "finish_weight_update"},
        *two_steps(prompts),
    ]
    engine = engine_settings(served, weight_transfer_config={"backend": "file"}) | drafting(V2, blank, DRAFTS)
    results = run(V2, tmp_path, engine, steps)
    expected, counts = ours[name]
    assert results[0]["tokens"] == results[-2]["tokens"] == expected
    before, after = results[1], results[-1]
    assert rate(before) < rate(counts) / 2
    assert after["accepted"] - before["accepted"] == pytest.approx(counts["accepted"], rel=0.02)


@pytest.mark.skipif(not on_cuda(), reason="only on CUDA an engine sleeps")
@pytest.mark.parametrize("level", [1, 2])
def test_the_speculator_outlives_sleep(level, route, served, prompts, trained, alone, tmp_path):
    """After level 2 both models come back empty in V2: the target is loaded again, the speculator sent."""
    steps = [*two_steps(prompts), {"sleep": level}, {"wake": True}]
    if level == 2:
        steps += [{"call": "reload_weights"}, {"call": "update_speculator", "arguments": [str(trained["sum_rnn"])]}]
    engine = engine_settings(served, enable_sleep_mode=True) | drafting(route, trained["sum_rnn"], DRAFTS)
    first, before, *_, second, after = run(route, tmp_path, engine, [*steps, *two_steps(prompts)])
    assert first["tokens"] == second["tokens"] == alone
    assert after["accepted"] == 2 * before["accepted"]


@pytest.mark.parametrize(
    ("route", "drafts", "more", "told", "early"),
    [
        (V1, 2, {}, "speculative_config.num_speculative_tokens=2: expected 3", True),
        (V1, 3, {"additional_config": {"verl_speculator": {"path": "a/b"}}}, "expected an absolute path", True),
        (V2, 2, {}, "speculative_config.num_speculative_tokens=2: expected 3", False),
        (V2, 3, {"load_format": "dummy"}, "load_format=dummy: the draft model's weights would be random", False),
    ],
    ids=["another_draft_length", "a_relative_path", "another_draft_length_in_v2", "dummy_weights"],
)
def test_refused(route, drafts, more, told, early, served, trained, tmp_path):
    """In V1 before the target is loaded; in V2 vLLM builds the draft model after it."""
    if (reason := missing(route)) is not None:
        pytest.skip(reason)
    engine = engine_settings(served) | drafting(route, trained["sum_rnn"], drafts) | more
    done = start(route, tmp_path, engine, [])
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
    assert not early or "Starting to load model" not in done.stdout + done.stderr


def refusal(route, folder, engine, **variables) -> str:
    if (reason := missing(route)) is not None:
        pytest.skip(reason)
    done = start(route, folder, engine, [], **variables)
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_an_export_in_the_v1_runner_is_refused(served, trained, tmp_path):
    engine = engine_settings(served) | drafting(V2, trained["sum_rnn"], DRAFTS)
    assert "SpeculatorDraftModel runs in vLLM's V2 runner alone" in refusal(V1, tmp_path, engine)


def test_a_truncated_export_is_refused(served, trained, tmp_path):
    engine = engine_settings(served) | drafting(V2, trained["sum_rnn"], DRAFTS, export_to=tmp_path / "export")
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights}: truncated, or not a file of tensors" in refusal(V2, tmp_path, engine)


def test_another_bases_speculator_is_refused(served, trained, tmp_path):
    config = read_checkpoint_info(trained["sum_rnn"]).config
    narrow = build_speculator(config, hidden_size=64, vocab_size=96, seed=0)
    checkpoint = save_speculator(narrow, tmp_path / "narrow")
    engine = engine_settings(served) | drafting(V2, checkpoint, DRAFTS)
    assert "trained for a base of width (hidden_size) 64, this base has" in refusal(V2, tmp_path, engine)


def test_without_the_plugin_vllm_names_what_it_does_not_know(served, trained, tmp_path):
    engine = engine_settings(served) | drafting(V2, trained["sum_rnn"], DRAFTS)
    output = refusal(V2, tmp_path, engine, VLLM_PLUGINS="")
    assert "mtp" in output and "Starting to load model" not in output


def test_medusa_heads_in_vllms_own_drafter(served, prompts, trained, alone, tmp_path):
    """The checkpoint as it was trained, without our code in the engine."""
    config = {"method": "medusa", "model": str(trained["medusa"]), "num_speculative_tokens": DRAFTS}
    if not on_cuda():
        pytest.skip("vLLM's Medusa runs on CUDA")
    engine = engine_settings(served, speculative_config=config, disable_log_stats=False)
    (result,) = run(V1, tmp_path, engine, [{"generate": prompts, "max_tokens": COUNT}])
    assert result["tokens"] == alone
