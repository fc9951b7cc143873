"""PPO with a speculator that follows: what is refused, what an update sends, and what a step's metrics tell."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from helpers.ppo_rollouts import make_rollouts, ppo_config, register_stock_engine
from helpers.training_runs import environment
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.checkpoint.format import read_checkpoint_info
from verl_speculator.config.hydra import compose_ppo
from verl_speculator.rl.rollout_args import SPECULATION, check_ppo, rollout_arguments
from verl_speculator.utils.settings import UserError

PROPOSER_PATH = "actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.verl_speculator.path"
SMALL = {"n_predict": 3, "inner_dim": 16, "emb_dim": 16, "proj_dim": 16}


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    from transformers import AutoConfig

    vocab = AutoConfig.from_pretrained(base).vocab_size
    speculator = build_speculator(SpeculatorConfig(**SMALL), hidden_size=32, vocab_size=vocab, seed=3)
    return save_speculator(speculator, tmp_path_factory.mktemp("spec") / "one")


@pytest.fixture(scope="module")
def printed(checkpoint, base):
    """What `rollout-args --train` prints."""
    own = [f"actor_rollout_ref.model.path={base}"]
    return rollout_arguments(read_checkpoint_info(checkpoint), train=True, overrides=own).overrides


def test_what_is_printed_is_what_is_asked_for(printed, checkpoint):
    config = compose_ppo(printed)
    check_ppo(config)
    model = OmegaConf.to_container(config.actor_rollout_ref.model)
    assert model["speculator"] == {"path": str(checkpoint), "train": True}
    assert model["_target_"] == "verl_speculator.training.model_config.SpeculatorPolicyConfig"
    assert (config.actor_rollout_ref.actor.strategy, config.actor_rollout_ref.ref.strategy) == ("fsdp2", "fsdp2")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.model.speculator.train=false", "verl.trainer.main_ppo does that; expected true"),
        ("actor_rollout_ref.model.model_type=language_model", "expected language_model_with_speculator"),
        ("actor_rollout_ref.rollout.name=sglang", "rollout.name=sglang: no other engine takes a newer"),
        ("~actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls", "worker_extension_cls=None"),
        ("actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config.method=medusa", "expected custom_class"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", "expected naive"),
        ("trainer.v1.trainer_mode=separate_async", "expected sync or colocate_async"),
        ("trainer.use_v1=false", "trainer.use_v1=False"),
        ("actor_rollout_ref.actor.strategy=megatron", "expected fsdp2"),
        ("actor_rollout_ref.actor.strategy=fsdp", "a policy with a speculator is sharded by FSDP2 alone"),
        ("~actor_rollout_ref.model.model_type", "expected what verl-speculator rollout-args CHECKPOINT --train prints"),
        ("+actor_rollout_ref.model.speculator.los=kl", "is not a setting (did you mean"),
        ("actor_rollout_ref.model.speculator.path=/no/such", "/no/such"),
        (f"{PROPOSER_PATH}=relative/one", "expected an absolute path"),
        (f"{PROPOSER_PATH}=/no/such", "/no/such"),
        (SPECULATION + "num_speculative_tokens=5", "expected 3, the n_predict of"),
        ("actor_rollout_ref.model.path=/no/such", "base=/no/such: no such directory"),
    ],
)
def test_settings_under_which_nothing_would_follow(printed, override, words):
    with pytest.raises(UserError) as error:
        check_ppo(compose_ppo([*printed, override]))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_users_error_is_one_line_and_nothing_heavy():
    code = (
        "import sys\nfrom verl_speculator.train_ppo import main\n"
        "try:\n    main(['actor_rollout_ref.modl.path=x'])\n"
        "finally:\n    assert not {'torch', 'ray', 'verl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "did you mean 'actor_rollout_ref.model.path'" in done.stderr


def test_rollout_args_refuses_the_same(checkpoint, base):
    for override, words in (
        ("trainer.v1.trainer_mode=separate_async", "expected sync or colocate_async"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", "expected naive"),
        ("actor_rollout_ref.actor.strategy=fsdp", "expected fsdp2"),
    ):
        with pytest.raises(UserError, match=words):
            rollout_arguments(read_checkpoint_info(checkpoint), train=True, overrides=[override])
        rollout_arguments(read_checkpoint_info(checkpoint), overrides=[override])


def test_another_base_than_the_speculators(printed, checkpoint, bases, tmp_path):
    other = build_speculator(SpeculatorConfig(**SMALL), hidden_size=16, vocab_size=40, seed=0)
    path = save_speculator(other, tmp_path / "other")
    own = [f"actor_rollout_ref.model.speculator.path={path}", f"{PROPOSER_PATH}={path}"]
    with pytest.raises(UserError, match="trained for a base of width"):
        check_ppo(compose_ppo([*printed, *own]))
    with pytest.raises(UserError, match="the rollout begins with another"):
        check_ppo(compose_ppo([*printed, own[0]]))


@pytest.mark.parametrize(("engine", "purpose"), [("arctic", "ppo"), ("vllm", "generation")])
def test_only_our_drafter_follows(checkpoint, engine, purpose):
    with pytest.raises(UserError, match="expected --engine vllm-v1 --for ppo"):
        rollout_arguments(read_checkpoint_info(checkpoint), engine=engine, purpose=purpose, train=True)


class Rollout:
    """verl's rollout as the actor's worker sees it; writes down what it is asked, in order."""

    def __init__(self, config=None, model_config=None, device_mesh=None) -> None:
        self.config = config
        self.asked: list[tuple] = []

    async def resume(self, tags):
        self.asked.append(("resume", *tags))

    async def update_weights(self, weights, global_steps=None, **kwargs):
        self.asked.append(("base", {name: tensor.clone() for name, tensor in weights}, global_steps))


@pytest.fixture
def worker(base, checkpoint, monkeypatch):
    """verl's worker of actor and rollout, built by its own `init_model`; the transport has tests of its own."""
    pytest.importorskip("transfer_queue", reason="verl's PPO needs TransferQueue")
    from verl.workers import engine_workers

    import verl_speculator.rl.trainer as ppo
    from verl_speculator.training.platform_cpu import PlatformCPU

    async def push(rollout, parameters, version):
        rollout.asked.append(("speculator", {name: p.full_tensor().clone() for name, p in parameters.items()}, version))

    async def collect(rollout):
        rollout.asked.append(("worker_stats",))
        return [{"version": 3, "rounds": 4, "drafted": 12, "accepted": 6}]

    def set_allocator(platform, settings):
        made.rollout.asked.append((settings,))

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ppo, "sync_speculator", push)
    monkeypatch.setattr(ppo, "collect_acceptance_stats", collect)
    monkeypatch.setattr(engine_workers, "get_rollout_class", lambda name, mode: Rollout)
    monkeypatch.setattr(PlatformCPU, "set_allocator_settings", set_allocator)
    own = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"]
    own += ["actor_rollout_ref.rollout.tensor_model_parallel_size=1"]
    register_stock_engine()
    made = ppo.SpeculatorActorWorker(
        ppo_config(base, *own, path=checkpoint, train="true", lr=0.05).actor_rollout_ref, role="actor_rollout"
    )
    made.init_model()
    return made


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
def test_weight_sync_sends_what_the_update_made_of_both(worker):
    """The statistics are of what drafted before; and nothing is sent while memory is in expandable segments."""
    from verl.utils import tensordict_utils as tu

    speculator = worker.actor.engine.speculator
    before = {name: p.full_tensor().clone() for name, p in speculator.named_parameters()}
    data = make_rollouts(8, speculator.vocab_size)
    tu.assign_non_tensor(data, global_token_num=tu.NonTensorData([1] * len(data)), update_lr_scheduler=True)
    worker.actor.train_batch(data)
    worker.rollout.asked.clear()
    asyncio.run(worker.update_weights(global_steps=4, mode="naive"))
    asked = worker.rollout.asked
    assert [entry[:1] if len(entry) == 3 else entry for entry in asked] == [
        ("worker_stats",),
        ("expandable_segments:False",),
        ("resume", "weights"),
        ("speculator",),
        ("base",),
        ("resume", "kv_cache"),
        ("expandable_segments:True",),
    ]
    (_, sent, version), (_, base, step) = (entry for entry in asked if len(entry) == 3)
    assert version == 4 and sent.keys() == dict(speculator.named_parameters()).keys() == before.keys()
    for name, parameter in speculator.named_parameters():
        assert torch.equal(sent[name], parameter.full_tensor())
    assert any(not torch.equal(sent[name], before[name]) for name in sent), "nothing was learnt"
    assert step == 4 and base and not any("draft" in name or name.startswith("base.") for name in base)
    worker_stats = {"version": 3, "rounds": 4, "drafted": 12, "accepted": 6}
    assert worker.take_acceptance_stats() == [worker_stats]
    assert worker.take_acceptance_stats() == []
    asyncio.run(worker.collect_acceptance_stats())
    assert worker.take_acceptance_stats() == [worker_stats]


@pytest.mark.usefixtures("gloo")
@pytest.mark.filterwarnings("ignore")
def test_a_reference_is_the_base_alone(base, checkpoint, monkeypatch):
    """Built by verl's worker of all roles; its log-probabilities are those of verl's own engine, to the bit."""
    pytest.importorskip("transfer_queue", reason="verl's PPO needs TransferQueue")
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.fsdp import transformer_impl

    import verl_speculator.rl.trainer as ppo

    policy = transformer_impl.CPUOffloadPolicy
    # A reference is kept in pinned memory, which exists only with an accelerator.
    monkeypatch.setattr(transformer_impl, "CPUOffloadPolicy", lambda pin_memory: policy(pin_memory=False))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    precision = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    own = [f"+actor_rollout_ref.ref.fsdp_config.mixed_precision={precision}"]
    own += ["actor_rollout_ref.ref.fsdp_config.use_torch_compile=false"]
    found = []
    for speculator in ({"path": checkpoint, "train": "true"}, {}):
        config = ppo_config(base, *own, **speculator).actor_rollout_ref
        register_stock_engine()
        worker = ppo.SpeculatorActorWorker(config, role="ref")
        worker.init_model()
        data = make_rollouts(8, 300)
        tu.assign_non_tensor(data, compute_loss=False)
        found.append(worker.compute_ref_log_prob(data)["log_probs"].values())
        assert not any("draft" in name for name, _ in worker.ref.engine.module.named_parameters())
    assert torch.equal(*found)


def test_verls_trainers_are_followed():
    """Both are registered with verl, use our worker, and add the stats of all ranks to a step's metrics."""
    pytest.importorskip("transfer_queue", reason="verl's PPO needs TransferQueue")
    from verl.trainer.ppo.v1 import get_trainer_cls

    import verl_speculator.rl.trainer as ppo

    worker_stats = {"version": 6, "rounds": 10, "drafted": 30, "accepted": 15}
    for name, theirs in ppo.TRAINERS.items():
        kind = get_trainer_cls(f"{name}_with_speculator")
        assert issubclass(kind, theirs) and kind is not theirs and get_trainer_cls(name) is theirs
        trainer = object.__new__(kind)
        trainer.global_steps = 8
        trainer.actor_rollout_wg = SimpleNamespace(
            take_acceptance_stats=lambda: [[worker_stats], [worker_stats | {"version": 7}], []]
        )
        trainer._pending_sync_metrics = {"sync/bytes": 1}
        assert trainer._consume_sync_metrics() == {
            "sync/bytes": 1,
            "rollout/speculator_version": 6,
            "rollout/speculator_lag": 1,
            "rollout/accepted_length": 2.5,
            "rollout/accept_rate": 0.5,
        }


class WorkerGroup:
    """All ranks' workers, as a trainer calls them: what drafted since they were last asked, and what they kept."""

    def __init__(self) -> None:
        self.drafted: list[dict] = []
        self.kept: list[dict] = []

    def draft(self, version, accepted):
        self.drafted.append({"version": version, "rounds": 10, "drafted": 30, "accepted": accepted})

    def collect_acceptance_stats(self):
        self.kept, self.drafted = self.kept + self.drafted, []

    update_weights = collect_acceptance_stats  # a worker asks before it updates

    def take_acceptance_stats(self):
        taken, self.kept = self.kept, []
        return [taken, []]


@pytest.mark.parametrize("name", ["sync", "colocate_async"])
def test_validation_rounds_are_not_a_steps(name, monkeypatch):
    """Not the next step's either; and verl may send the weights again in the midst of a validation."""
    pytest.importorskip("transfer_queue", reason="verl's PPO needs TransferQueue")
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    import verl_speculator.rl.trainer as ppo

    def validate(trainer):
        for _ in range(2):
            trainer.actor_rollout_wg.draft(7, accepted=30)
            trainer.actor_rollout_wg.update_weights()
        trainer.actor_rollout_wg.draft(7, accepted=0)
        return {"val-core/reward": 1.0}

    monkeypatch.setattr(PPOTrainer, "_validate", validate)
    trainer = object.__new__(get_trainer_cls(ppo.TRAINER_NAME.format(name)))
    trainer.global_steps, trainer.actor_rollout_wg, trainer._pending_sync_metrics = 8, WorkerGroup(), {}
    trainer.actor_rollout_wg.draft(7, accepted=10)  # rollouts that had begun before the validation
    metrics = trainer._validate()
    assert metrics == {
        "val-core/reward": 1.0,
        "val/speculator_version": 7,
        "val/accepted_length": 3.0,
        "val/accept_rate": 60 / 90,
    }
    trainer.actor_rollout_wg.draft(7, accepted=20)
    trainer.actor_rollout_wg.update_weights()
    for expected in ({"rollout/accepted_length": 2.5, "rollout/speculator_lag": 0}, {}):
        metrics = trainer._consume_sync_metrics()
        assert {key: metrics.get(key) for key in expected} == expected and bool(metrics) == bool(expected)
