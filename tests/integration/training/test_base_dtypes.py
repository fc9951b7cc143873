"""A base in bf16 inside verl's engine: every type and every state are those of `from_pretrained(dtype=torch.bfloat16)`.

Run by torchrun it writes what a rank has: `torchrun test_base_dtypes.py <base> <gguf file or ""> <folder>`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.engine_harness import build_engine, make_batch, run_batch, whole
from helpers.tiny_models import GGUF_FILE
from verl_speculator.base_model.hidden_states import POST_NORM, HiddenStateHook
from verl_speculator.training.base_model import leave_inputs_and_buffers
from verl_speculator.utils.settings import UserError

LENGTH = 1000
needs_bnb = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
needs_gguf = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="gguf is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore")]
# fp32 in bf16 models: RoPE's frequencies (all), routing weights and biases as parameters (ernie4_5_moe) and as buffers
# (dots1). ernie4_5_moe's layers are given RoPE's sines in fp32 too.
BASES = ("qwen2_tied", "qwen2_untied", "gemma2", "ernie4_5_moe", "dots1")


def long_row(length=LENGTH):
    tokens = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": tokens,
        "loss_mask": torch.ones(length, dtype=torch.long),
        "position_ids": torch.arange(length),
    }


def states_of_engine(engine, row):
    """[T, D] what the engine's speculator is given."""
    seen = []
    hook = engine.draft.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run_batch(engine, make_batch([row], micro=1), train=False)
    hook.remove()
    return seen[0].flatten(0, 1)


@torch.no_grad()
def states_of_model(model, row):
    output = model.eval().base_model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None])
    return output.last_hidden_state[0]


def tensors(base):
    return dict(base.named_parameters()) | dict(base.named_buffers())


def assert_same_tensors(base, reference):
    expected, found = tensors(reference), tensors(base)
    assert set(found) == set(expected)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(whole(found[name]), tensor) for name, tensor in expected.items())


def reference_model(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa", **options)


@pytest.fixture(scope="module")
def any_base(bases, other_bases):
    return bases | other_bases


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("name", BASES)
def test_frozen_base_in_bf16_has_the_types_and_states_of_from_pretrained(any_base, name):
    engine, reference = build_engine(any_base[name], param_dtype="bf16"), reference_model(any_base[name])
    row = long_row()
    assert torch.equal(states_of_engine(engine, row), states_of_model(reference, row))
    assert_same_tensors(engine.base, reference)  # after a batch: casts may come late
    assert any(t.dtype == torch.float32 for t in tensors(engine.base).values())


@needs_gguf
@pytest.mark.usefixtures("gloo")
def test_frozen_base_from_a_gguf_file_in_bf16_has_the_types_and_states_of_from_pretrained(gguf_bases):
    path = gguf_bases["qwen2_untied"]
    engine = build_engine(path, param_dtype="bf16", gguf_file=GGUF_FILE)
    reference, row = reference_model(path, gguf_file=GGUF_FILE), long_row()
    assert torch.equal(states_of_engine(engine, row), states_of_model(reference, row))
    assert_same_tensors(engine.base, reference)


@needs_bnb
@pytest.mark.usefixtures("gloo")
def test_frozen_base_in_4_bits_with_bf16_has_the_types_of_from_pretrained(bases):
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    engine = build_engine(bases["qwen2_untied"], param_dtype="bf16", quantization="bnb4")
    run_batch(engine, make_batch([long_row()], micro=1), train=False)
    reference = reference_model(bases["qwen2_untied"], quantization_config=nf4)
    expected = {name: t.dtype for name, t in reference.named_buffers()}
    assert {name: t.dtype for name, t in engine.base.named_buffers()} == expected
    assert expected["model.rotary_emb.inv_freq"] == torch.float32


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize(("held", "computed"), [("fp32", "bf16"), ("bfloat16", "fp32")])
def test_frozen_base_is_held_in_the_type_that_it_computes_in(other_bases, held, computed):
    """Else its units would cast all their parameters, routing biases too."""
    words = f"engine.model_dtype={held}: a frozen base .*param_dtype is {computed}; expected auto or {computed}"
    with pytest.raises(UserError, match=words):
        build_engine(other_bases["ernie4_5_moe"], param_dtype=computed, model_dtype=held, initialize=False)
    same = build_engine(other_bases["ernie4_5_moe"], param_dtype="bf16", model_dtype="bfloat16", initialize=False)
    assert same.engine_config.model_dtype == "bfloat16"


@pytest.mark.usefixtures("gloo")
def test_trained_base_keeps_one_type_for_its_parameters_and_fp32_for_frequencies(other_bases):
    """A sharding unit trains parameters of one type; nothing else is cast."""
    engine = build_engine(other_bases["ernie4_5_moe"], param_dtype="bf16", freeze_base_model=False)
    run_batch(engine, make_batch([long_row(64)], micro=1))
    assert {p.dtype for p in engine.base.parameters()} == {torch.bfloat16}
    assert engine.base.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.fixture(scope="module")
def tensors_of_two_ranks(any_base, request, tmp_path_factory):
    """A folder with the tensors of each base model on each rank, from one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    pairs = [any_base["ernie4_5_moe"], "", any_base["dots1"], ""]
    if importlib.util.find_spec("gguf"):
        pairs += [request.getfixturevalue("gguf_bases")["qwen2_untied"], GGUF_FILE]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, folder, *pairs], check=True, capture_output=True, env=environment)
    return folder


@pytest.mark.parametrize(("name", "gguf_file"), [("ernie4_5_moe", None), ("dots1", None), ("gguf", GGUF_FILE)])
def test_every_rank_has_the_types_and_values_of_the_first(any_base, gguf_bases, tensors_of_two_ranks, name, gguf_file):
    if gguf_file and not importlib.util.find_spec("gguf"):
        pytest.skip("gguf is not installed")
    path = gguf_bases["qwen2_untied"] if gguf_file else any_base[name]
    reference = reference_model(path, gguf_file=gguf_file)
    for rank in range(2):
        found = torch.load(tensors_of_two_ranks / f"{path.name}.{rank}.pt", weights_only=True)
        expected = tensors(reference)
        assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in expected.items()}
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.usefixtures("gloo")
def test_fsdp1_casts_no_buffer_of_a_frozen_base(other_bases):
    """torch's own wrapper around the module that the engine wraps; verl asks it for buffers in `buffer_dtype`."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    base, row = reference_model(other_bases["dots1"]).requires_grad_(False), long_row(50)
    expected, types = states_of_model(base, row), {name: t.dtype for name, t in base.named_buffers()}
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    policy = ModuleWrapPolicy({type(base.model.layers[0])})
    sharded = FullyShardedDataParallel(
        base, auto_wrap_policy=policy, mixed_precision=precision, device_id=torch.device("cpu")
    )
    leave_inputs_and_buffers(sharded, sharded)
    with HiddenStateHook(sharded.module, POST_NORM) as tap, torch.no_grad():
        sharded(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None])
        assert torch.equal(tap.take()[0], expected)
    found = {name.replace("_fsdp_wrapped_module.", ""): t.dtype for name, t in sharded.named_buffers()}
    assert found == types


def write_tensors_of_this_rank(folder: str, *pairs: str) -> None:
    """For each pair of a base model and its GGUF file or an empty text."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for base, gguf_file in zip(pairs[::2], pairs[1::2], strict=True):
        engine = build_engine(base, param_dtype="bf16", gguf_file=gguf_file or None)
        run_batch(engine, make_batch([long_row(50), long_row(60)], micro=1), train=False)
        gathered = {name: whole(tensor).detach().clone() for name, tensor in tensors(engine.base).items()}
        torch.save(gathered, Path(folder) / f"{Path(base).name}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import os

    os.environ["VERL_PLATFORM"] = "cpu"
    torch.set_num_threads(1)
    write_tensors_of_this_rank(*sys.argv[1:])
