"""The evaluation: figures from counts, quality against the definitions, and whole runs on a tiny base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.drafters import load_base, train_quickly
from helpers.tiny_models import write_parquet
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.data.alignment import align
from verl_speculator.decoding.options import SamplingPolicy
from verl_speculator.evaluation.metrics import Document, acceptance, bootstrap, quality, speed, verdict, weighted_median
from verl_speculator.evaluation.report import ResultsLog
from verl_speculator.evaluation.run import HuggingFaceMethod, SpeculativeMethod, evaluate
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.losses import DraftLoss, DraftSums
from verl_speculator.utils.process import evenly_spaced
from verl_speculator.utils.settings import UserError

PROMPT = [5, 17, 40, 80, 121, 9, 33]


# Figures.


def test_acceptance_ten_rounds_equals_hand_calculation():
    """Ten rounds of three drafts: four accept none, three one, two two, one all."""
    result = acceptance(np.array([4, 3, 2, 1]), np.array([6.5, 2.0, 0.5]))
    expected = {
        "accepted": 1.0,
        "tau": 2.0,
        "target_calls_per_token": 0.5,
        "accept_rate": 1 / 3,
        "accept_depth_0": 6 / 10,
        "accept_depth_1": 3 / 6,
        "accept_depth_2": 1 / 3,
        "overlap": 9 / 19,
        "tv": 10 / 19,
    }
    assert {name: pytest.approx(value) for name, value in expected.items()} == result


@given(st.lists(st.integers(0, 50), min_size=2, max_size=7).filter(lambda h: sum(h) > 0))
@settings(deadline=None)
def test_acceptance_tau_is_the_sum_over_depths(histogram):
    result = acceptance(np.array(histogram), np.zeros(len(histogram) - 1))
    chain, expected = 1.0, 1.0
    for k in range(len(histogram) - 1):
        chain *= np.nan_to_num(result[f"accept_depth_{k}"])
        expected += chain
    assert result["tau"] == pytest.approx(expected)
    assert result["tau"] * result["target_calls_per_token"] == pytest.approx(1)


def test_acceptance_without_rounds_is_nan():
    assert all(np.isnan(value) for value in acceptance(np.zeros(4), np.zeros(3)).values())


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 10**6))
@settings(deadline=None)
def test_weighted_median_equals_median_of_repeated_values(values, seed):
    weights = np.random.default_rng(seed).integers(0, 4, len(values))
    repeated = np.repeat(values, weights)
    result = weighted_median(np.array(values, dtype=float), weights[None])[0]
    assert (np.isnan(result) and not len(repeated)) or result == np.median(repeated)


def test_speed_returns_medians_over_pairs():
    alone, own = np.array([[100.0, 50.0], [100.0, 200.0]]), np.array([[150.0, 100.0], [120.0, 200.0]])
    result = speed(alone, own, np.ones(2))
    assert result["speedup"] == pytest.approx((1.2 + 1.5) / 2)
    assert result["vanilla_tokens_per_s"] == pytest.approx(100)
    # With the first prompt alone in the sample, the second one's pairs are gone.
    assert speed(alone, own, np.array([[2, 0]]))["speedup"] == pytest.approx(1.75)


def test_verdict_names_the_tau_from_which_it_pays():
    assert verdict(1.8, 1.5, 0.1) == "1.50 times as fast as the base model alone: τ 1.80, break-even here 1.20"
    slow = "0.55 times as fast, so slower than the base model alone: τ 1.14, break-even here 2.07"
    assert verdict(1.14, 0.55) == verdict(1.14, 0.55, 1.0) == slow
    assert verdict(1.14, 0.55, 0.05) == f"{slow}; trained on 5% of its data"


def test_bootstrap_intervals_contain_the_figure_and_narrow_with_more_prompts():
    widths = []
    for count in (10, 400):
        rounds = np.random.default_rng(0).multinomial(20, [0.4, 0.3, 0.2, 0.1], size=count)

        def figures(weights, rounds=rounds):
            return acceptance(weights @ rounds, weights @ np.zeros((len(rounds), 3)))

        tau = figures(np.ones(count))["tau"]
        result = bootstrap(count, figures, seed=1)
        assert result["tau_lo"] < tau < result["tau_hi"]
        widths.append(result["tau_hi"] - result["tau_lo"])
    assert widths[1] < widths[0] / 4
    assert bootstrap(10, lambda w: {"x": w.sum(-1)}, seed=3) == {"x_lo": 10, "x_hi": 10}


def test_quality_pools_pairs():
    pairs = np.array([30.0, 10.0])
    result = quality(pairs, {"ce": np.array([60.0, 40.0]), "top1": np.array([15.0, 1.0])})
    assert result["ce"] == 2.5 and result["perplexity"] == pytest.approx(np.exp(2.5))
    assert result["ce_depth_1"] == 4.0 and result["top1"] == pytest.approx(0.4)


# Quality on a text.


def test_measure_equals_training_loss_and_definition_of_kl(base, rows):
    model = load_base(base, torch.float32)
    config = SpeculatorConfig(n_predict=3, inner_dim=16, emb_dim=16, proj_dim=16)
    vocab = model.get_output_embeddings().weight.shape[0]
    speculator = build_speculator(config, hidden_size=32, vocab_size=vocab, seed=0)
    ends = (model.generation_config.eos_token_id,)
    ids, mask = rows[0]["input_ids"].tolist(), rows[0]["loss_mask"].tolist()
    result = Document(model, ids, mask).measure(speculator, ends, 2.0)

    draft = align(rows[0]["input_ids"], rows[0]["loss_mask"], torch.tensor([0, len(ids)]), 3, ends)
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
        hidden, logits = out.hidden_states[-1][0], out.logits[0]
        output = DraftLoss(speculator)(hidden[draft.positions], draft.tokens, draft.targets, draft.valid)
        sums = DraftSums(*output["sums"])
        states = speculator.unroll(hidden[draft.positions], draft.tokens)
    assert result["pairs"] == sums.pairs.tolist() and sum(result["pairs"]) > 0
    assert result["top1"] == sums.correct.tolist()
    assert result["ce"] == pytest.approx(sums.ce.tolist(), rel=1e-5)
    for name, temperature in (("kl", 1.0), ("kl_training_temperature", 2.0)):
        expected = [0.0] * 3
        for k in range(3):
            for r, t in enumerate(draft.positions.tolist()):
                if draft.valid[k, r]:
                    assert ids[t + 2 + k] == draft.targets[k, r]
                    p = (logits[t + 1 + k] / temperature).double().softmax(-1)
                    q = ((states[k, r] @ speculator.head(k).T) / temperature).double().softmax(-1)
                    expected[k] += float((p * (p.log() - q.log())).sum())
        assert result[name] == pytest.approx(expected, rel=1e-4)
    assert all(a <= b for a, b in zip(result["top1"], result["top5"], strict=True))


# Methods.


def test_methods_greedy_generate_the_text_of_the_base_model(base):
    model = load_base(base, torch.float64)
    alone = SpeculativeMethod(model, None, SamplingPolicy(), None, ())
    expected = alone.generate(PROMPT, max_new_tokens=30, seed=0)
    assert expected.counts["histogram"] == [28] and len(expected.tokens) == 30
    trained = train_quickly(model, [PROMPT + expected.tokens])
    for method in (
        SpeculativeMethod(model, trained, SamplingPolicy(), 2, ()),
        HuggingFaceMethod(model, SamplingPolicy(), 0, ()),
        HuggingFaceMethod(model, SamplingPolicy(), 4, ()),
    ):
        run = method.generate(PROMPT, max_new_tokens=30, seed=0)
        assert run.tokens == expected.tokens
        assert len(run.counts["histogram"]) == method.max_draft_length + 1
        assert run.seconds["prefill"] > 0 and run.seconds["decode"] > 0
        # All but the first token and those of the last round come from counted rounds.
        counted = sum((j + 1) * count for j, count in enumerate(run.counts["histogram"]))
        assert 29 - method.max_draft_length - 1 <= counted <= 28
    assert model.generation_config.max_new_tokens is None


def test_hugging_face_method_error_restores_generation_config(base):
    model = load_base(base, torch.float64)
    before = model.generation_config
    with pytest.raises(IndexError):
        HuggingFaceMethod(model, SamplingPolicy(), 3, ()).generate([10**6], max_new_tokens=3, seed=0)
    assert model.generation_config is before and not model._forward_hooks


# Results logs.


def test_results_log_with_half_a_line_continues(tmp_path):
    origin = {"commit": "a"}
    log = ResultsLog.open(tmp_path, {"x": 1}, {"weights": "a"}, origin, [0, 1, 2])
    log.add(0, {"value": 1.5})
    log.add(1, {"value": float("nan")})
    with log.path.open("a") as file:
        file.write('{"index": 2, "val')
    again = ResultsLog.open(tmp_path, {"x": 1}, {"weights": "a"}, {"commit": "b"}, [0, 1, 2])
    assert again.missing() == [2] and again.measured()[0] == {"index": 0, "value": 1.5}
    assert again.origin == origin
    again.add(2, {"value": 3})
    assert ResultsLog.read(log.path).missing() == []
    assert [r["index"] for r in ResultsLog.open(tmp_path, {"x": 1}, {"weights": "a"}, origin, [0, 2]).measured()] == [
        0,
        2,
    ]
    # Other weights under the same name: nothing old counts.
    assert ResultsLog.open(tmp_path, {"x": 1}, {"weights": "b"}, origin, [0, 1]).missing() == [0, 1]
    assert ResultsLog.open(tmp_path, {"x": 2}, {"weights": "a"}, origin, [0]).path != log.path


def test_evenly_spaced_returns_evenly_spaced_indices():
    assert evenly_spaced(10, 0) == list(range(10)) == evenly_spaced(10, 12)
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(480, 240) == list(range(0, 480, 2))


# Whole evaluations.


@pytest.fixture(scope="module")
def world(tmp_path_factory, base, tokenizer):
    """Prompts, a held-out text and a trained speculator of the tiny base."""
    folder = tmp_path_factory.mktemp("world")
    questions = ["one two three", "red cat runs", "four five", "blue bird sings seven", "six dogs"]
    write_parquet(
        folder / "prompts.parquet",
        [{"prompt": [{"role": "user", "content": q}], "category": c} for q, c in zip(questions, "aabbb", strict=True)],
    )
    lines = [{"turns": ["one two", "three four"], "category": "chat"}, {"turns": ["cat " * 300], "category": "long"}]
    (folder / "turns.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = load_base(base, torch.float32)
    reader = SpeculativeMethod(model, None, SamplingPolicy(), None, end_token_ids(tokenizer, model.generation_config))
    texts = []
    for question in questions:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        texts.append(ids + reader.generate(ids, max_new_tokens=40, seed=0).tokens)
    speculator = train_quickly(model, texts, steps=80)
    provenance = {"base": {"name": str(base), "weights_fingerprint": weights_fingerprint(str(base))}}
    save_speculator(speculator, folder / "trained", provenance=provenance)
    fresh = build_speculator(speculator.config, hidden_size=32, vocab_size=speculator.vocab_size, seed=0)
    save_speculator(fresh, folder / "fresh", provenance=provenance)
    return folder


def configure(world, base, out, **more):
    prompts = (world / "prompts.parquet", world / "turns.jsonl")
    arguments = {"speculators": (str(world / "trained"),), "prompts": prompts, "max_new_tokens": 24} | more
    return EvaluationSettings(base=str(base), out=out, warmup_steps=1, **arguments)


@pytest.fixture(scope="module")
def report(world, base, chat, tmp_path_factory):
    """An evaluation with everything in it."""
    out = tmp_path_factory.mktemp("report") / "out"
    baselines = ("none", "generate", "prompt_lookup", "random")
    evaluate(configure(world, base, out, texts=chat, num_texts=6, baselines=baselines, num_trials=2))
    return out


def test_evaluate_writes_results(report, world, base, chat):
    table = pd.read_csv(report / "results.csv")
    text = pd.read_csv(report / "results.csv", dtype=str)  # a whole number in a column with empty cells
    assert set(text["n_predict"].dropna()) == {"3"}
    assert list(table["speculator"]) == ["none", "generate", "prompt_lookup", "random", str(world / "trained")] * 2
    for name in (
        *("base", "speculator", "method", "n_predict", "prompts", "temperature", "top_p", "top_k", "draft_length"),
        *("seed", "tau", "accepted", "accept_rate", "accept_depth_0", "accept_depth_1", "accept_depth_2", "overlap"),
        *("tv", "target_calls_per_token", "kl", "ce", "perplexity", "top1", "top5", "vanilla_tokens_per_s"),
        *("speculative_tokens_per_s", "speedup", "speedup_lo", "speedup_hi", "tau_lo", "tau_hi", "kl_lo", "kl_hi"),
        *("hist_0", "hist_3", "ce_depth_0", "kl_training_temperature", "draft_share", "peak_memory_mb", "prefill_s"),
        *("decode_s", "hardware", "version_torch", "commit", "date", "num_trials", "max_new_tokens", "dtype", "rounds"),
    ):
        assert name in table.columns, name
    # Every method generates the text of the base model, in each of two trials.
    assert (table["identical"] == table["runs"]).all()
    assert (table["runs"] == 2 * table["prompts_used"]).all()
    rows = table[table["prompts"] == str(world / "prompts.parquet")].set_index("speculator")
    none, trained, random = (rows.loc[name] for name in ("none", str(world / "trained"), "random"))
    assert none["tau"] == 1 and none["speedup"] == 1 and none["vanilla_tokens_per_s"] > 0
    assert trained["tau"] > 2 > 1.2 > random["tau"]
    assert trained["tau_lo"] <= trained["tau"] <= trained["tau_hi"]
    assert trained["tau"] == pytest.approx(1 + trained["accept_rate"] * 3)
    assert trained["overlap"] + trained["tv"] == pytest.approx(1)
    assert not trained["untrained"] and random["untrained"]
    assert trained["perplexity"] == pytest.approx(np.exp(trained["ce"])) and trained["kl"] > 0
    assert trained["text"] == str(chat) and trained["text_rows"] == 6
    assert np.isnan(random["ce"])
    assert trained["rounds"] == sum(trained[f"hist_{j}"] for j in range(4))
    assert 0 < trained["draft_share"] < 1 and 0 < trained["loop_share"] < 0.5
    assert rows.loc["generate", "draft_length"] == 0


def test_evaluate_prompt_over_position_limit_is_counted_and_listed(report, world):
    table = pd.read_csv(report / "results.csv")
    rows = table[table["prompts"] == str(world / "turns.jsonl")]
    assert (rows["prompts_skipped"] == 1).all() and (rows["prompts_used"] == 1).all()
    skipped = pd.read_csv(report / "skipped.csv")
    assert skipped[["index", "category"]].values.tolist() == [[1, "long"]]
    assert "tokens, the base has 256 positions" in skipped["reason"][0]


def test_evaluate_writes_categories(report, world):
    table = pd.read_csv(report / "categories.csv")
    rows = table[(table["speculator"] == str(world / "trained")) & (table["prompts"] == str(world / "prompts.parquet"))]
    assert dict(zip(rows["category"], rows["prompts_used"], strict=True)) == {"a": 2, "b": 3}
    whole = pd.read_csv(report / "results.csv").set_index(["prompts", "speculator"])
    whole = whole.loc[(str(world / "prompts.parquet"), str(world / "trained"))]
    assert rows["rounds"].sum() == whole["rounds"]


def test_evaluate_second_turn_is_measured_and_long_prompt_skipped(report):
    logs = [ResultsLog.read(path) for path in (report / "journals").glob("*.jsonl")]
    logs = [log for log in logs if log.settings["file"].endswith("turns.jsonl")]
    assert len(logs) == 5 and all(log.records[0]["turns"] == 2 and "skipped" in log.records[1] for log in logs)


def test_plot_reads_only_the_tables(report, tmp_path):
    from verl_speculator.evaluation.plots import plot

    for name in ("results.csv", "categories.csv"):
        shutil.copy(report / name, tmp_path)
    drawn = {path.name for path in plot(tmp_path)}
    assert {"acceptance_per_depth.png", "accepted_length_histogram.pdf", "speedup_against_quality.png"} <= drawn
    assert any(name.startswith("categories_tau") for name in drawn)


def test_evaluate_again_measures_only_what_is_missing(world, base, tmp_path, monkeypatch):
    calls = []
    generate = SpeculativeMethod.generate
    monkeypatch.setattr(SpeculativeMethod, "generate", lambda self, *a, **k: calls.append(1) or generate(self, *a, **k))
    first = configure(world, base, tmp_path, prompts=(world / "prompts.parquet",), baselines=("none",), num_prompts=3)
    evaluate(first)
    before, count = (tmp_path / "results.csv").read_text(), len(calls)
    assert count > 0
    evaluate(first)
    assert len(calls) == count and (tmp_path / "results.csv").read_text() == before
    # A third of a log lost, as after a kill: that prompt alone is run again, with the base model.
    for path in (tmp_path / "journals").glob("*.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + '\n{"ind')
    calls.clear()
    evaluate(first)
    assert len(calls) == 2 + 2 * first.warmup_steps
    # More prompts, or another policy: only what is new.
    calls.clear()
    evaluate(configure(world, base, tmp_path, prompts=first.prompts, baselines=("none",)))
    assert len(calls) == 4 + 2 * first.warmup_steps
    evaluate(
        configure(world, base, tmp_path, prompts=first.prompts, baselines=("none",), temperature=1.0, num_prompts=2)
    )
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["temperature"]) == [0, 0, 1, 1] and list(table["prompts_used"]) == [5, 5, 2, 2]
    assert not list(tmp_path.rglob(".tmp.*"))


def test_evaluate_sampled_is_reproducible(world, base, tmp_path):
    """Twice the same with one seed, and every method in a distribution of its own draws."""
    for out in ("a", "b"):
        evaluate(
            configure(world, base, tmp_path / out, prompts=(world / "prompts.parquet",), temperature=0.9, top_k=20)
        )
    a, b = (pd.read_csv(tmp_path / out / "results.csv").set_index("speculator") for out in ("a", "b"))
    for name in ("tau", "accept_rate", "overlap", "tokens"):
        assert np.array_equal(a[name], b[name], equal_nan=True)
    trained = a.loc[str(world / "trained")]
    assert 0 < trained["overlap"] < 1 and trained["accept_depth_0"] > a.loc["random", "accept_depth_0"]


def test_evaluate_killed_continues(world, base, tmp_path):
    """SIGKILL in the middle; the same command then measures what is missing and ends as if nothing had happened."""
    command = [
        *(sys.executable, "-m", "verl_speculator", "evaluate", "--base", base, "--speculator", world / "trained"),
        *("--prompts", world / "prompts.parquet", "--out", tmp_path, "--baselines", "none", "--max-new-tokens", 60),
        *("--num-trials", 6, "--no-plots"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)

    def measured() -> int:
        return sum(len(path.read_text().splitlines()) - 1 for path in (tmp_path / "journals").glob("*.jsonl"))

    deadline = time.monotonic() + 120
    while measured() < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = measured()
    assert 2 <= before < 10, "the kill came too late"
    assert not (tmp_path / "results.csv").exists()
    ended = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert measured() == 10 and len(pd.read_csv(tmp_path / "results.csv")) == 2
    assert "τ" in ended.stdout and "10 of 10" not in ended.stdout and "30 of 30" in ended.stdout


def test_evaluate_untrained_checkpoint_refused(world, base, tmp_path):
    names = (str(world / "fresh"),)
    with pytest.raises(UserError, match=r"fresh: its tensors are those it was initialised with.*--allow-untrained"):
        evaluate(configure(world, base, tmp_path, speculators=names))
    assert not (tmp_path / "results.csv").exists()
    evaluate(
        configure(
            world,
            base,
            tmp_path,
            speculators=names,
            allow_untrained=True,
            baselines=(),
            prompts=(world / "prompts.parquet",),
            num_prompts=1,
        )
    )
    assert pd.read_csv(tmp_path / "results.csv")["untrained"].tolist() == [True]


def test_expand_patterns_and_run_directories(world, tmp_path):
    (world / "trained.jsonl").write_text("")
    from verl_speculator.evaluation.settings import expand

    assert expand((str(world / "train*"), str(world / "trained"))) == [str(world / "trained")]
    with pytest.raises(UserError, match="no directory fits this pattern"):
        expand((str(world / "nothing*"),))
    run = tmp_path / "run"
    shutil.copytree(world / "trained", run / "global_step_7")
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    settings = configure(world, "base", tmp_path, speculators=(str(run),))
    assert settings.checkpoints()[str(run)].directory == run / "global_step_7"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": -1}, "temperature=-1: expected a number ≥ 0"),
        ({"top_p": 0}, "top_p=0: expected a number in (0, 1]"),
        ({"num_trials": 0}, "num_trials=0: expected a number ≥ 1"),
        ({"baselines": ("prompt_lockup",)}, "did you mean 'prompt_lookup'?"),
        ({"draft_length": 4}, "trained was trained to draft 3 (n_predict)"),
        ({"speculators": ("/no/such",)}, "/no/such: no speculator checkpoint here"),
        ({"prompts": (Path("nothing.parquet"),)}, "nothing.parquet: no such file"),
        ({"dtype": "fp31"}, "dtype=fp31: expected auto, fp32, bf16, fp16, fp64 (did you mean 'fp32'?)"),
        ({"device": "cudda"}, "device=cudda: expected auto, cpu, or an accelerator such as cuda"),
    ],
)
def test_evaluate_invalid_setting_refused(world, base, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        evaluate(configure(world, base, tmp_path / "out", **more))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_evaluate_unsuitable_checkpoint_refused(world, bases, base, tmp_path):
    with pytest.raises(UserError, match="trained for the weights of"):
        evaluate(configure(world, bases["qwen2_moe"], tmp_path / "out"))
    broken = shutil.copytree(world / "trained", tmp_path / "broken")
    weights = (broken / "pytorch_model.bin").read_bytes()
    (broken / "pytorch_model.bin").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="truncated, or not a file of tensors"):
        evaluate(configure(world, base, tmp_path / "out", speculators=(str(broken),)))
    config = SpeculatorConfig(n_predict=2, inner_dim=8, emb_dim=8, proj_dim=8)
    narrow = build_speculator(config, hidden_size=16, vocab_size=300, seed=0)
    save_speculator(narrow, tmp_path / "narrow")
    with pytest.raises(UserError, match=r"width \(hidden_size\) 16, this base has 32"):
        evaluate(configure(world, base, tmp_path / "out", speculators=(str(tmp_path / "narrow"),)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a directory"):
        evaluate(configure(world, base, tmp_path / "file"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that not even root can write to")
def test_evaluate_unwritable_directory_refused(world, base):
    with pytest.raises(UserError, match=r"out=/proc/evaluation: .*cannot be written to"):
        evaluate(configure(world, base, Path("/proc/evaluation")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "error: temperature=-1.0: expected a number ≥ 0"),
        (("--draft-length", "9"), "trained was trained to draft 3 (n_predict)"),
    ],
)
def test_evaluate_command_user_error_is_one_line_and_exit_code_2(world, base, tmp_path, arguments, message):
    command = [sys.executable, "-m", "verl_speculator", "evaluate", "--base", base, "--out", tmp_path / "out"]
    command += ["--prompts", world / "prompts.parquet", "--speculator", world / "trained", *arguments]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1 and message in ended.stderr
    assert not (tmp_path / "out").exists()
