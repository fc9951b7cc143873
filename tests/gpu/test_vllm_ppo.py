"""verl's whole PPO, with vLLM's server drafting by a speculator that follows the policy.

Needs vLLM and verl (docs/rollout.md); skipped without. On a CPU by `cpu_platform`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from engines import HERE, ROOT, on_cuda
from test_vllm import DRAFTS, data, real, served, trained  # noqa: F401

from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.rl.rollout_args import rollout_arguments

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (docs/rollout.md)"),
    pytest.mark.slow,
]
STEPS = 4
CPU = {
    "VERL_PLATFORM": "cpu_as_gpus",
    "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
    "VERL_DISABLE_FLASH_ATTN_CE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@pytest.fixture(scope="module")
def questions(data, tmp_path_factory) -> Path:  # noqa: F811
    """Chat data as verl's RL data: a prompt, and what its answer is graded by."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [dict(messages[0])],
            "ability": "any",
            "reward_model": {"style": "rule", "ground_truth": "1"},
            "extra_info": {"index": index},
        }
        for index, messages in enumerate(pd.read_parquet(data)["messages"][:32])
    ]
    path = tmp_path_factory.mktemp("questions") / "train.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> Path:
    """A reward that a small base can earn: short answers."""
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text("def compute_score(data_source, solution_str, *_, **__):\n    return 1 / (1 + len(solution_str))\n")
    return path


def test_the_speculator_follows_the_policy(served, trained, questions, graded, tmp_path):  # noqa: F811
    """Every step's rollouts are drafted by what the step before made, accepted as often as a trained one's are, and the
    speculator that verl's checkpoint holds is not the one it began with."""
    info = read_checkpoint_info(trained["sum_rnn"])
    rollout, actor = "actor_rollout_ref.rollout.", "actor_rollout_ref.actor."
    own = [
        f"actor_rollout_ref.model.path={served}",
        "+actor_rollout_ref.model.speculator.lr=1e-3",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        *(f"data.{name}_files={questions}" for name in ("train", "val")),
        *("data.train_batch_size=4", "data.max_prompt_length=300", "data.max_response_length=64"),
        "data.dataloader_num_workers=0",
        *("algorithm.adv_estimator=grpo", "reward.num_workers=1"),
        *(f"reward.custom_reward_function.path={graded}",),
        *(f"{actor}strategy=fsdp2", f"{actor}ppo_mini_batch_size=4", f"{actor}ppo_micro_batch_size_per_gpu=4"),
        *(f"{actor}fsdp_config.use_torch_compile=false", f"{actor}optim.lr=1e-5"),
        f"{actor}use_kl_loss=true",  # and so a reference, which has no speculator
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
        f"+{actor}fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
        *(f"{rollout}n=2", f"{rollout}log_prob_micro_batch_size_per_gpu=4", f"{rollout}tensor_model_parallel_size=1"),
        *(f"{rollout}dtype=float32", f"{rollout}enforce_eager=true", f"{rollout}agent.num_workers=1"),
        *(f"{rollout}max_model_len=400", f"{rollout}max_num_seqs=8", f"{rollout}max_num_batched_tokens=400"),
        *(f"{rollout}gpu_memory_utilization=0.3", f"{rollout}checkpoint_engine.update_weights_bucket_megabytes=64"),
        *("trainer.n_gpus_per_node=1", "trainer.nnodes=1", "trainer.logger=[file]"),
        *("trainer.val_before_train=false", "trainer.test_freq=-1", f"trainer.save_freq={STEPS}"),
        *(f"trainer.total_training_steps={STEPS}", f"trainer.default_local_dir={tmp_path / 'run'}"),
        *("ray_kwargs.ray_init.num_cpus=16", "+ray_kwargs.ray_init.include_dashboard=false"),
    ]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{HERE}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VERL_FILE_LOGGER_PATH": str(tmp_path / "log.jsonl"),
        "RAY_worker_niceness": "0",
    }
    if not on_cuda():
        environment |= CPU
        own += ["trainer.device=cpu", "+ray_kwargs.ray_init.num_gpus=1"]
        own += [f"{rollout}free_cache_engine=false", f"+{rollout}enable_sleep_mode=false"]
    printed = rollout_arguments(info, train=True, overrides=own).overrides
    command = [sys.executable, "-m", "verl_speculator.train_ppo", *printed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", cwd=tmp_path)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-5000:])

    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [entry["data"] for entry in steps if "rollout/speculator_version" in entry["data"]]
    assert [entry["rollout/speculator_version"] for entry in found] == list(range(STEPS))
    assert {entry["rollout/speculator_lag"] for entry in found} == {0}
    assert all(1.05 < entry["rollout/accepted_length"] < DRAFTS + 1 for entry in found)
    # vLLM and the actor agree on the policy: its weights arrive as they are.
    assert all(entry["training/rollout_probs_diff_mean"] < 0.01 for entry in found)
    assert all(entry["actor/speculator_loss"] > 0 and entry["actor/kl_loss"] >= 0 for entry in found)
    saved = read_checkpoint_info(tmp_path / "run" / f"global_step_{STEPS}" / "actor" / "speculator")
    assert not saved.config.differences(info.config)
    assert (saved.directory / "pytorch_model.bin").read_bytes() != (info.directory / "pytorch_model.bin").read_bytes()
