"""verl's PPO configuration with our keys, and synthetic rollouts of a policy."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch

CLIP = 0.2  # below the norms that these rollouts give
POLICY = "verl_speculator.training.model_config.SpeculatorPolicyConfig"


def ppo_config(base: Path | str, *overrides: str, strategy: str = "fsdp2", **speculator: Any):
    """verl's real PPO configuration for a policy with a speculator, composed by Hydra as its command does.

    Args:
        base: the policy.
        overrides: more of them.
        strategy: of actor and ref.
        speculator: the model.speculator keys; without any, the configuration is verl's alone.
    """
    precision = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    given = [
        f"actor_rollout_ref.model.path={base}",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"actor_rollout_ref.actor.strategy={strategy}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        f"+actor_rollout_ref.actor.fsdp_config.mixed_precision={precision}",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        f"actor_rollout_ref.actor.optim.clip_grad={CLIP}",
        "actor_rollout_ref.actor.optim.total_training_steps=10",
        "actor_rollout_ref.rollout.name=vllm",
    ]
    if speculator:
        given += [f"actor_rollout_ref.model._target_={POLICY}"]
        given += ["+actor_rollout_ref.model.model_type=language_model_with_speculator"]
        given += [f"+actor_rollout_ref.model.speculator.{name}={value}" for name, value in speculator.items()]
    return deepcopy(_compose(*given, *overrides))


@cache
def _compose(*overrides: str):
    import verl
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    OmegaConf.resolve(config)
    return config


@cache
def register_stock_engine() -> None:
    """verl's own engine for the CPU, on which it runs as well; verl registers it for accelerators only."""
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])(FSDPEngineWithLMHead)


def build_actor(config):
    """The actor's worker, built as verl's ActorRolloutRefWorker builds it, with verl's own PPO loss."""
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    import verl_speculator.training.plugin

    assert verl_speculator.training.plugin
    register_stock_engine()
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type=model.get("model_type", "language_model"),
            model_config=model,
            engine_config=actor.engine,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )
    for name in ("micro_batch_size_per_gpu", "infer_micro_batch_size_per_gpu"):
        setattr(worker.engine_config, name, actor.ppo_micro_batch_size_per_gpu)
    worker.engine_config.use_dynamic_bsz = False
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def make_rollouts(count: int, vocab_size: int, *, seed: int = 0, **settings: Any):
    """Rollouts as verl's trainer sends them to the actor: prompts padded to the left, responses to the right, then
    flattened by verl's own function; some responses hold a tool's answer, which the policy did not write."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode
    from verl.workers.utils.padding import left_right_2_no_padding

    made, width, length = torch.Generator().manual_seed(seed), 7, 12
    ids = torch.zeros(count, width + length, dtype=torch.long)
    attention, mask = torch.zeros_like(ids), torch.zeros(count, length, dtype=torch.long)
    for i in range(count):
        asked = int(torch.randint(2, width + 1, (1,), generator=made))
        said = int(torch.randint(5, length + 1, (1,), generator=made))
        start = int(torch.randint(3, vocab_size, (1,), generator=made))
        # Text that can be learnt: each token follows from the one before.
        ids[i, width - asked : width + said] = (start + 7 * torch.arange(asked + said)) % (vocab_size - 3) + 3
        attention[i, width - asked : width + said] = 1
        mask[i, :said] = 1
        if i % 3 == 0:
            mask[i, 2:4] = 0
    like_mask = {
        "old_log_probs": -torch.rand(count, length, generator=made) * 3 - 3,
        "advantages": torch.randn(count, length, generator=made),
    }
    data = TensorDict(
        {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "prompts": ids[:, :width],
            "responses": ids[:, width:],
            "response_mask": mask,
        }
        | {name: value * mask for name, value in like_mask.items()},
        batch_size=count,
    )
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(
        data,
        **{
            "temperature": 1.0,
            "global_batch_size": count,
            "pad_mode": DatasetPadMode.NO_PADDING,
            "pad_token_id": 0,
            "calculate_entropy": True,
        }
        | settings,
    )
    return data
