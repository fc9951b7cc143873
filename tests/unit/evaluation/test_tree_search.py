"""Tree search on the base model's own answers, and the commands that use the tree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch

from helpers.drafters import load_base, states_of, train_quickly
from helpers.tiny_models import make_chat_rows, write_parquet
from verl_speculator import save_speculator
from verl_speculator.base_model.chat_template import end_token_ids
from verl_speculator.base_model.loading import load_tokenizer
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.decoding import DraftTree, read_tree, speculative_generate
from verl_speculator.decoding.drafters import TreeDrafter
from verl_speculator.decoding.tree import prefix_counts
from verl_speculator.decoding.verification import verify_tree
from verl_speculator.evaluation.metrics import Document
from verl_speculator.evaluation.prompts import prompt_ids, read_prompts
from verl_speculator.evaluation.run import evaluate
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.evaluation.tree_search import RankSample, sample_ranks
from verl_speculator.utils.settings import UserError


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "verl_speculator", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def base(bases):
    """A base model whose answers do not repeat a single token."""
    return bases["llama"]


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    """Prompts, and a speculator that has learnt a little of the base's answers to some of them."""
    folder = tmp_path_factory.mktemp("world")
    prompts = write_parquet(folder / "prompts.parquet", make_chat_rows(6))
    model, tokenizer, texts = load_base(base, torch.float32), load_tokenizer(base), []
    for prompt in read_prompts(prompts)[:2]:
        ids = prompt_ids(prompt, tokenizer)
        texts.append(ids + speculative_generate(model, None, ids, max_new_tokens=30).tokens)
    speculator = train_quickly(model, texts, steps=40)
    provenance = {"base": {"name": "my/base", "weights_fingerprint": weights_fingerprint(str(base))}}
    save_speculator(speculator, folder / "trained", provenance=provenance)
    return folder, speculator


def test_ranks_and_tau_equal_drafting_and_verifying_a_tree(world, base):
    """The reference drafts and verifies the tree at every position of a text that the base model generated."""
    _, speculator = world
    model, tokenizer = load_base(base, torch.float32), load_tokenizer(base)
    ids = tokenizer("one two three")["input_ids"]
    answer = speculative_generate(model, None, ids, max_new_tokens=40, eos_token_id=()).tokens
    document = Document(model, ids + answer, [0] * len(ids) + [1] * len(answer))
    ranks, hidden = document.ranks(speculator, ()), states_of(model, ids + answer)
    text, depths = ids + answer, speculator.n_predict
    starts = range(len(ids) - 1, len(text) - 1 - depths)
    assert ranks.shape == (len(starts), depths)
    sample = RankSample(1, [tuple(row) for row in ranks.tolist()])
    tree, measured = sample.chosen(10)
    accepted = []
    drafter = TreeDrafter(speculator, tree)
    for row, start in enumerate(starts):
        with torch.no_grad():
            state = speculator.start(hidden[start : start + 1])
            for depth in range(depths):
                state = speculator.step(state, torch.tensor([text[start + 1 + depth]]))
                order = (state.output @ speculator.head(depth).T)[0].argsort(descending=True).tolist()
                assert ranks[row, depth] == order.index(text[start + 2 + depth])
            newest = torch.tensor([text[start + 1]])
            drafts = drafter.propose(hidden[start : start + 1], newest, None, tree.depth, 1).tokens.tolist()
        follows = [text[start + 2]] + [
            text[start + 2 + len(path)] if start + 2 + len(path) < len(text) else -1 for path in tree.paths
        ]
        accepted.append(len(verify_tree(tree.parents, follows, drafts)[0]))
    assert sample.tau(tree) == pytest.approx(1 + sum(accepted) / len(accepted))
    assert measured["tau_tree"] == pytest.approx(sample.tau(tree), abs=1e-4)


def test_rank_sample_equals_hand_calculation():
    sample = RankSample(1, [(0, 0), (0, 1), (1, 0), (7, 0)])
    tree, measured = sample.chosen(3)
    assert tree.paths == ((0,), (1,), (7,))
    assert sample.tau(tree) == 1 + (2 + 1 + 1) / 4
    assert measured["tau_chain"] == 1 + (2 + 1) / 4
    assert measured["rank_shares"] == [[0.5, 0.25, 0, 0], [0.75, 0.25, 0, 0]]
    assert sample.tau(DraftTree(tuple(prefix_counts(sample.paths)))) == 3


def test_sample_ranks_short_answers_refused(world, base):
    folder, speculator = world
    model, tokenizer = load_base(base, torch.float32), load_tokenizer(base)
    ends = end_token_ids(tokenizer, model.generation_config)
    with pytest.raises(UserError, match="answers has more than 3 tokens, the speculator's n_predict"):
        sample_ranks(
            *(model, tokenizer, speculator, read_prompts(folder / "prompts.parquet")),
            ends=ends,
            num_prompts=2,
            max_new_tokens=2,
        )


@pytest.fixture(scope="module")
def chosen(world, base):
    folder, _ = world
    shown = command(
        *("tree", "--base", base, "--speculator", folder / "trained", "--prompts", folder / "prompts.parquet"),
        *("--num-prompts", 4, "--nodes", 8, "--max-new-tokens", 30, "--out", folder / "tree.json"),
    )
    assert shown.returncode == 0, shown.stderr
    return folder / "tree.json", shown


def test_tree_command_writes_tree_and_report(chosen, world, base):
    path, shown = chosen
    assert shown.stdout.strip() == str(path)
    assert re.search(r"depth +rank 0 +rank 1 +rank 2 +rank 3 +behind +nodes", shown.stderr)
    expected = re.search(r"expected τ: chain of 3 (\d\.\d\d), tree of 8 nodes (\d\.\d\d)", shown.stderr)
    content = json.loads(path.read_text())
    assert len(read_tree(path).paths) == 8 and sum(len(p) == 1 for p in read_tree(path).paths) > 1
    measured, provenance = content["measured"], content["provenance"]
    assert [float(tau) for tau in expected.groups()] == [round(measured[f"tau_{w}"], 2) for w in ("chain", "tree")]
    assert measured["tau_tree"] > measured["tau_chain"] and measured["positions"] > 20
    assert provenance["base_fingerprint"] == weights_fingerprint(str(base))
    assert provenance["n_predict"] == 3 and provenance["speculator"] == str(world[0] / "trained")


def test_generate_command_drafts_the_tree(chosen, world, base):
    arguments = ("--base", base, "--speculator", world[0] / "trained", "--prompt", "one two", "--max-new-tokens", 30)
    shown = command("generate", *arguments, "--draft-tree", chosen[0], "--compare")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"speedup \d+\.\d\d, the same text", shown.stderr)
    assert re.search(r"with a tree of 8 .* [234]\.\d\d +\d+\.\d% of [123]", shown.stderr)
    shown = command("generate", *arguments, "--draft-length", "auto", "--compare")
    assert re.search(r"speedup \d+\.\d\d, the same text", shown.stderr)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate", ("--draft-tree", "TREE", "--temperature", "1"), "draft_tree: temperature=1, expected 0"),
        (
            "generate",
            ("--draft-tree", "TREE", "--draft-length", "2"),
            "draft_length=2: a draft_tree has lengths",
        ),
        ("generate", ("--draft-tree", "none.json"), "draft_tree=none.json: cannot be read"),
        ("generate", ("--draft-tree", "DEEP"), "draft_tree: 5 levels, the speculator was trained to draft 3"),
        ("generate", ("--draft-length", "some"), "draft_length=some: expected a whole number ≥ 1, or auto"),
        ("serve", ("--draft-tree", "TREE", "--draft-length", "auto"), "draft_length=auto: a draft_tree has lengths"),
        ("serve", ("--draft-tree", "DEEP"), "draft_tree: 5 levels, the speculator was trained to draft 3"),
        ("tree", ("--nodes", "65"), "nodes=65: expected 1 to 64"),
        ("tree", ("--out", "."), "out=.: a directory, expected the name of a file"),
        ("tree", ("--prompts", "none.parquet"), "none.parquet: no such file"),
    ],
)
def test_commands_user_error_is_one_line_and_exit_code_2(chosen, world, base, tmp_path, name, arguments, message):
    deep = tmp_path / "deep.json"
    deep.write_text(json.dumps({"paths": DraftTree.chain(5).paths}))
    arguments = [{"TREE": chosen[0], "DEEP": deep}.get(argument, argument) for argument in arguments]
    common = ["--base", base, "--speculator", world[0] / "trained"]
    common += {
        "generate": ["--prompt", "one"],
        "serve": ["--port", 0],
        "tree": ["--prompts", world[0] / "prompts.parquet", "--out", tmp_path / "new.json"],
    }[name]
    shown = command(name, *common, *arguments)
    errors = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert (shown.returncode, len(errors)) == (2, 1), shown.stderr
    assert message in errors[0] and "Traceback" not in shown.stderr


def test_evaluate_compares_chain_and_trees(chosen, world, base, tmp_path):
    folder = world[0]

    def configure(**more):
        return EvaluationSettings(
            base=str(base),
            out=tmp_path / "out",
            speculators=(str(folder / "trained"),),
            prompts=(folder / "prompts.parquet",),
            texts=folder / "prompts.parquet",
            max_new_tokens=24,
            warmup_steps=1,
            dtype="fp32",
            **more,
        )

    chain = tmp_path / "chain.json"
    chain.write_text(json.dumps({"paths": DraftTree.chain(3).paths}))
    evaluate(configure(draft_trees=(chosen[0], chain), baselines=("none",)))
    evaluate(configure(draft_length="auto", baselines=()))
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table["draft_shape"].fillna("")) == ["", "chain", "auto", "tree of 3", "tree of 8"]
    assert (table["identical"] == table["runs"]).all()
    rows = table.set_index("draft_shape")
    plain, auto, small, large = (rows.loc[name] for name in ("chain", "auto", "tree of 3", "tree of 8"))
    # A chain as a tree is the chain; a tree that holds it accepts no less.
    figures = [f"accept_depth_{k}" for k in range(3)] + ["tau", "accept_rate", "overlap", "rounds"]
    assert all(small[name] == pytest.approx(plain[name], nan_ok=True) for name in figures)
    assert (plain["drafts_per_round"], small["drafts_per_round"], large["drafts_per_round"]) == (3, 3, 8)
    assert large["tau"] >= plain["tau"] and large["draft_tree"] == str(chosen[0])
    assert large["accept_rate"] == pytest.approx(large["accepted"] / large["draft_length"])
    assert large["ce"] == plain["ce"] == auto["ce"]
    assert 1 <= auto["drafts_per_round"] <= 3 == auto["draft_length"]
    assert auto["accept_rate"] == pytest.approx(auto["accepted"] / auto["drafts_per_round"])
    for row in (auto, large):
        assert row["tau"] == pytest.approx(sum((j + 1) * row[f"hist_{j}"] for j in range(4)) / row["rounds"])
    # What is measured is not measured again.
    before = {path: path.read_text() for path in (tmp_path / "out" / "journals").iterdir()}
    evaluate(configure(draft_trees=(chosen[0], chain), baselines=("none",)))
    assert {path: path.read_text() for path in (tmp_path / "out" / "journals").iterdir()} == before

    from verl_speculator.evaluation.plot_data import read_tables

    labels = [row.style.label for row in read_tables(tmp_path / "out")[0]]
    assert len(set(labels)) == 4 and any("(tree of 8)" in label for label in labels)
    with pytest.raises(UserError, match=r"draft_tree: temperature=0\.5, expected 0"):
        configure(draft_trees=(chain,), temperature=0.5)


def test_server_engine_drafts_trees_for_greedy_answers(world, chosen, base):
    from verl_speculator.server.engine import Engine

    model, tokenizer = load_base(base, torch.float32), load_tokenizer(base)
    tree = read_tree(chosen[0])
    engine = Engine(model, tokenizer, world[1], ends=(1,), draft_tree=tree)
    engine.warm_up()
    engine.close()
    assert engine._drafts(0) == {"draft_tree": tree} and engine._drafts(0.7) == {"draft_length": None}
