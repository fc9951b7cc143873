"""Documents packed into one row do not see each other, whatever the base does with `position_ids`."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from transformers import Qwen2Config

from helpers.engine_harness import build_engine, make_batch, run_batch
from helpers.tiny_models import make_tokenizer, make_vision_base
from helpers.training_runs import overrides, read_log, script
from verl_speculator.preflight import launch
from verl_speculator.training.base_model import FIRST_LENGTH, PACKING_TOLERANCE, packing_error, probe_documents
from verl_speculator.utils.settings import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
# Attention that respects position_ids, masks that do not, and layers whose state runs through the row.
APART = ("qwen2_tied", "qwen2_moe", "gemma2", "ernie4_5_moe", "dots1")
MIXED = ("opt", "falcon", "bloom", "gpt_oss", "lfm2", "qwen3_next")
EAGER = ("bloom", "gpt_oss")


@pytest.fixture
def any_base(bases, other_bases):
    return bases | other_bases


def build(path, name, **settings):
    return build_engine(path, attention="eager" if name in EAGER else "sdpa", **settings)


def sums_of(engine, rows, **cut):
    return torch.tensor(run_batch(engine, make_batch(rows, **cut), train=False)["metrics"]["draft_sums"])


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", APART + MIXED)
def test_packed_documents_count_as_they_do_alone(any_base, rows, caplog, name, dtype):
    with caplog.at_level(logging.WARNING, logger="verl_speculator"):
        engine = build(any_base[name], name, param_dtype=dtype)
    lines = [line for line in caplog.messages if "rows are padded instead" in line]
    assert engine.packs == (name in APART) and len(lines) == (name in MIXED)
    alone = torch.stack([sums_of(engine, [row], micro=1) for row in rows[:4]]).sum(0)
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == "fp32" else {"rtol": 5e-3, "atol": 2}
    torch.testing.assert_close(sums_of(engine, rows[:4]), alone, **exact)


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("name", ["opt", "qwen3_next"])
def test_joint_training_counts_packed_documents_as_it_does_alone(any_base, rows, name):
    engine = build(any_base[name], name, freeze_base_model=False)
    found = run_batch(engine, make_batch(rows[:4]), train=False)["metrics"]
    one_by_one = [run_batch(engine, make_batch([row], micro=1), train=False)["metrics"] for row in rows[:4]]
    for key in ("draft_sums", "base_sums"):
        alone = torch.stack([torch.tensor(metrics[key]) for metrics in one_by_one]).sum(0)
        torch.testing.assert_close(torch.tensor(found[key]), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("name", ["opt", "falcon", "gpt_oss", "lfm2"])
def test_packing_asked_for_by_name_is_refused(any_base, name):
    with pytest.raises(UserError, match=r"model\.use_remove_padding=true: .* of a packed row apart; expected auto or"):
        build(any_base[name], name, use_remove_padding=True)
    assert not build(any_base[name], name, use_remove_padding=False).packs


@pytest.mark.usefixtures("gloo")
def test_packing_asked_for_by_name_is_done_where_it_can_be(base):
    assert build_engine(base, use_remove_padding=True).packs


@pytest.mark.usefixtures("gloo")
def test_base_that_reads_images_is_refused_before_it_loads(tmp_path):
    """The documents that packing is tried with, and plain text, have positions of one row; verl asks it for four."""
    path = make_vision_base("qwen2_vl", tmp_path, make_tokenizer())
    (tmp_path / "model.safetensors").write_text("no weights")
    with pytest.raises(UserError, match=r"model\.path=.*: qwen2_vl is a model of images and text"):
        build_engine(path)


def llama4(chunk):
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **{"vocab_size": 330, "hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "head_dim": 8},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2},
        **{"interleave_moe_layer_step": 2, "attention_chunk_size": chunk},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data * 5 if parameter.dim() > 1 else parameter.data
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    return model


def states_of(model, documents):
    """[T, D] of documents in one packed row."""
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    output = model.model(input_ids=torch.cat(documents)[None], position_ids=positions[None], use_cache=False)
    return output.last_hidden_state[0]


@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_borders_of_attention_chunks_are_seen(chunk):
    """Llama 4 keeps documents apart, and then cuts attention at multiples of a length from the row's start."""
    model = llama4(chunk)
    run = partial(states_of, model)
    documents = probe_documents(make_tokenizer(), model.config)
    assert packing_error(run, documents) > PACKING_TOLERANCE
    if chunk > 2 * FIRST_LENGTH:  # without a border inside there is nothing to see
        assert packing_error(run, [document[:FIRST_LENGTH] for document in documents]) < PACKING_TOLERANCE


@pytest.mark.parametrize("block", [4, 8, 16, 32])
def test_borders_of_blocks_that_no_configuration_names_are_seen(block):
    """An architecture may count blocks from the row's start and have another word for their length, or none."""
    model = llama4(block)
    documents = probe_documents(make_tokenizer(), Qwen2Config())
    assert packing_error(partial(states_of, model), documents) > PACKING_TOLERANCE


def test_two_ranks_cache_and_validate_padded_rows_of_a_base_that_cannot_pack(other_bases, chat, tmp_path):
    settings = {
        "data__val_files": chat,
        "data__cache_hidden_states": tmp_path / "cache",
        "trainer__total_epochs": 2,
        "trainer__test_freq": 5,
        "trainer__logger": "file",
    }
    log = tmp_path / "log.jsonl"
    options = overrides(other_bases["opt"], chat, **settings)
    result = script(2, tmp_path / "run", *options, VERL_FILE_LOGGER_PATH=str(log))
    assert result.returncode == 0, result.stderr[-3000:]
    said = [line for line in result.stderr.splitlines() if "rows are padded instead" in line]
    assert len(said) == 1 and "OPTForCausalLM does not keep the documents of a packed row apart" in said[0]
    steps = read_log(log)
    assert len(steps) == 10 and steps[10]["val/loss"] < steps[5]["val/loss"]


def test_the_launcher_refuses_packing_asked_for_by_name_in_one_line(other_bases, chat, tmp_path):
    options = overrides(other_bases["opt"], chat, model__use_remove_padding="true")
    result = script(2, tmp_path / "run", *options)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        "error: model.use_remove_padding=true: OPTForCausalLM does not keep the documents of a packed row apart; "
        "expected auto or false, which pad the rows"
    ]
    wrong = overrides(other_bases["opt"], chat, model__use_remove_padding="maybe")
    with pytest.raises(UserError, match=r"model\.use_remove_padding=maybe: expected one of auto, true, false"):
        launch.launch(["1", str(tmp_path / "run"), *wrong])
