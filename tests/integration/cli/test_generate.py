"""`verl-speculator generate` as a subprocess."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from helpers.drafters import load_base, train_quickly
from verl_speculator import save_speculator
from verl_speculator.checkpoint.provenance import weights_fingerprint
from verl_speculator.decoding import speculative_generate

QUESTION = "one two three"


def command(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "verl_speculator", "generate", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def answer(base, tokenizer):
    """Tokens of the question and of the base model's answer."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    done = speculative_generate(load_base(base, torch.float32), None, ids, max_new_tokens=30)
    return ids, done.tokens


@pytest.fixture(scope="module")
def trained(base, answer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "trained"
    speculator = train_quickly(load_base(base, torch.float32), [[*answer[0], *answer[1]]])
    provenance = {"base": {"name": "my/base", "weights_fingerprint": weights_fingerprint(str(base))}}
    return save_speculator(speculator, folder, provenance=provenance)


def test_generate_compare_prints_the_same_text_twice(base, trained, answer, tokenizer):
    shown = command(
        *("--base", base, "--speculator", trained, "--prompt", QUESTION, "--max-new-tokens", 30, "--compare")
    )
    assert shown.returncode == 0, shown.stderr
    alone, drafted = shown.stdout.split("\n— with the speculator —\n")
    expected = tokenizer.decode(answer[1], skip_special_tokens=True)
    assert alone.strip("\n") == drafted.strip("\n") == expected.strip("\n")
    assert "trained for my/base" in shown.stderr
    assert re.search(r"speedup \d+\.\d\d, the same text", shown.stderr)
    assert re.search(r"with speculator +30 .* [234]\.\d\d +\d+\.\d% of 3", shown.stderr)


def test_generate_no_chat_reads_the_prompt_from_standard_input(base, tokenizer):
    shown = command("--base", base, "--no-chat", "--max-new-tokens", 5, stdin="one two")
    model = load_base(base, torch.float32)
    expected = speculative_generate(model, None, tokenizer("one two")["input_ids"], max_new_tokens=5).tokens
    assert shown.stdout.strip("\n") == tokenizer.decode(expected, skip_special_tokens=True).strip("\n")
    assert "base alone" in shown.stderr and "speedup" not in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "temperature=-1.0: expected a number ≥ 0"),
        (("--draft-length", "4"), "draft_length=4: expected 1 to 3, the speculator's n_predict"),
        (("--prompt", ""), "prompt: empty; expected a text, as --prompt or on standard input"),
        (("--prompt", "cat " * 300), "tokens, the base has 256 positions and needs one for the answer"),
        (("--base", "/no/such"), "base=/no/such: no such directory"),
    ],
)
def test_generate_invalid_option_exits_2_with_one_line(base, trained, arguments, message):
    shown = command("--base", base, "--speculator", trained, "--prompt", QUESTION, *arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    errors = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in shown.stderr


def test_generate_other_base_needs_allow_other_base(bases, trained):
    other = bases["qwen2_moe"]
    shown = command("--base", other, "--speculator", trained, "--prompt", QUESTION)
    assert shown.returncode == 2 and "--allow-other-base" in shown.stderr
    shown = command(
        *("--base", other, "--speculator", trained, "--prompt", QUESTION, "--max-new-tokens", 5, "--allow-other-base")
    )
    assert shown.returncode == 0, shown.stderr
