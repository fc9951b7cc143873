"""The engine as PPO's actor: the policy as without a speculator, to the bit; the speculator follows it if asked to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import HFModelConfig

from helpers.engine_harness import build_engine, gradients, whole
from helpers.ppo_rollouts import CLIP, build_actor, make_rollouts, ppo_config
from verl_speculator import build_speculator, load_speculator, save_speculator
from verl_speculator.config.schema import SpeculatorConfig
from verl_speculator.training.plugin import rollout_model_config, without_speculator
from verl_speculator.training.policy import PolicyEngine, response_mask
from verl_speculator.utils.settings import UserError

pytestmark = [pytest.mark.usefixtures("gloo"), pytest.mark.filterwarnings("ignore")]

SMALL = {"n_predict": 2, "inner_dim": 16, "emb_dim": 16, "proj_dim": 16}
LEARNING = SMALL | {"train": "true"}
FAMILIES = {
    "sum_rnn": SMALL,
    "medusa": {"method": "medusa", "n_predict": 2},
    "early_exit": {"method": "early_exit", "n_predict": 2, "exit_layer": 0, "trainable": "head_and_block"},
}


@pytest.fixture(scope="module")
def vocab_size(base):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base).vocab_size


@pytest.fixture(scope="module")
def trained(base, vocab_size, tmp_path_factory):
    """A checkpoint of a speculator."""
    folder = tmp_path_factory.mktemp("trained")
    config = SpeculatorConfig(**SMALL)
    save_speculator(build_speculator(config, hidden_size=32, vocab_size=vocab_size, seed=3), folder)
    return folder


def policy_of(worker) -> dict[str, torch.Tensor]:
    """The policy's weights under its own names."""
    return dict(worker.engine.get_per_tensor_param()[0])


def update(worker, data):
    """One PPO update on rollouts; its metrics."""
    tu.assign_non_tensor(data, global_token_num=tu.NonTensorData([1] * len(data)), update_lr_scheduler=True)
    return tu.get(worker.train_batch(data), "metrics")


def infer(worker, data):
    tu.assign_non_tensor(data, compute_loss=False)
    return worker.infer_batch(data)


@pytest.mark.parametrize("name", ["qwen2_untied", "gemma2"])
def test_log_probs_and_entropy_are_those_of_verls_engine_to_the_bit(bases, trained, vocab_size, name):
    stock, ours = build_actor(ppo_config(bases[name])), build_actor(ppo_config(bases[name], path=trained))
    for settings in ({}, {"use_remove_padding": False}, {"temperature": 0.7}):
        found, expected = (infer(worker, make_rollouts(8, vocab_size, **settings)) for worker in (ours, stock))
        for field in ("log_probs", "entropy"):
            assert torch.equal(found[field].values(), expected[field].values())


def assert_same_updates(stock, ours, vocab_size, steps=2):
    """The same rollouts to both; at each update gradients, clipped, and weights of the policy are compared."""
    found, clipped = [], []
    for step in range(steps):
        expected = update_keeping_gradients(stock, make_rollouts(8, vocab_size, seed=step))
        metrics = update_keeping_gradients(ours, make_rollouts(8, vocab_size, seed=step))
        for name in ("loss", "grad_norm", "lr", "actor/pg_loss", "actor/entropy_loss"):
            assert plain(metrics[0][name]) == plain(expected[0][name]), name
        assert set(metrics[1]) >= set(expected[1])
        assert all(torch.equal(metrics[1][name], gradient) for name, gradient in expected[1].items())
        clipped.append(expected[0]["grad_norm"])
        mine, theirs = policy_of(ours), policy_of(stock)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        found.append(metrics[0])
    assert min(clipped) > CLIP, "nothing was clipped: the comparison is worth little"
    return found


def plain(metric):
    """A metric as verl collects it: a number, or for each rank one of verl's or a list of them."""
    metrics = metric if isinstance(metric, list) else [metric]
    return [value.aggregate() if hasattr(value, "aggregate") else value for value in metrics]


def update_keeping_gradients(worker, data):
    """An update; its metrics, and the gradients that the optimizer saw, under the policy's names."""
    seen = {}

    def keep(optimizer, *_):
        for name, gradient in gradients(worker.engine).items():
            seen[name.removeprefix("base.")] = gradient

    hook = worker.engine.optimizer.register_step_pre_hook(keep)
    metrics = update(worker, data)
    hook.remove()
    return metrics, seen


@pytest.mark.parametrize(
    ("name", "speculator"),
    [
        ("qwen2_tied", FAMILIES["sum_rnn"] | {"lr": 0.05}),
        ("qwen2_untied", FAMILIES["medusa"] | {"loss": "kl"}),
        ("qwen2_tied", FAMILIES["early_exit"]),
        ("qwen2_untied", {"method": "eagle3", "n_predict": 2, "loss": "kl"}),
    ],
    ids=["sum_rnn", "medusa_kl", "early_exit", "eagle3_kl"],
)
def test_a_learning_speculator_does_not_move_the_policy_by_a_bit(bases, vocab_size, name, speculator):
    stock = build_actor(ppo_config(bases[name]))
    ours = build_actor(ppo_config(bases[name], train="true", **speculator))
    before = {n: whole(p).detach().clone() for n, p in ours.engine.draft.named_parameters()}
    found = assert_same_updates(stock, ours, vocab_size)
    after = {n: whole(p).detach() for n, p in ours.engine.draft.named_parameters()}
    resting = {f"speculator.{n}" for n in ours.engine.speculator.frozen()}
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(before[n], after[n]) for n in resting)
    for metrics in found:
        for key in ("actor/speculator_loss", "actor/expected_accept_length", "actor/speculator_grad_norm"):
            assert len(metrics[key]) == 1  # one rank
    assert all(isinstance(value, float) for value in metrics["actor/depth0_accuracy"][0])


def test_without_training_the_speculator_is_carried_along(base, trained, vocab_size):
    stock, ours = build_actor(ppo_config(base)), build_actor(ppo_config(base, path=trained))
    calls = []
    ours.engine.draft.register_forward_pre_hook(lambda *_: calls.append(1))
    (metrics, *_) = assert_same_updates(stock, ours, vocab_size)
    assert not calls
    assert not any("speculator" in name for name in metrics)
    mine = load_speculator(trained)
    assert all(torch.equal(whole(p), mine.get_parameter(n)) for n, p in ours.engine.speculator.named_parameters())
    optimized = sum(len(group["params"]) for group in ours.engine.optimizer.param_groups)
    assert optimized == len(list(ours.engine.base.parameters()))


def test_the_draft_follows_the_policy(base, vocab_size):
    """Through verl's own call of the actor's update: several mini-batches, several epochs; and onto disk and back."""
    worker = build_actor(ppo_config(base, lr=0.05, **LEARNING))
    assert [group["lr"] for group in worker.engine.optimizer.param_groups] == [1e-2, 0.05]
    data = make_rollouts(16, vocab_size, mini_batch_size=8, epochs=6, seed=1, global_batch_size=8)
    metrics = tu.get(worker.train_mini_batch(data), "metrics")
    losses = metrics["actor/speculator_loss"]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]
    assert metrics["actor/expected_accept_length"][-1] > metrics["actor/expected_accept_length"][0]


def test_what_is_saved_and_read_back(base, vocab_size, tmp_path):
    worker = build_actor(ppo_config(base, **LEARNING))
    update(worker, make_rollouts(8, vocab_size))
    worker.save_checkpoint(str(tmp_path), global_step=1)
    saved = load_speculator(tmp_path / "speculator")
    assert all(torch.equal(whole(p), saved.get_parameter(n)) for n, p in worker.engine.speculator.named_parameters())
    policy = torch.load(tmp_path / "model_world_size_1_rank_0.pt", weights_only=False)
    assert policy.keys() == policy_of(build_actor(ppo_config(base))).keys()
    again = build_actor(ppo_config(base, **LEARNING))
    again.load_checkpoint(str(tmp_path))
    for each in (worker, again):
        update(each, make_rollouts(8, vocab_size, seed=1))
    mine, theirs = (dict(each.engine.module.named_parameters()) for each in (worker, again))
    assert all(torch.equal(whole(mine[name]), whole(theirs[name])) for name in mine)


def test_a_broken_draft_does_not_stop_the_policy(base, vocab_size):
    broken = "+actor_rollout_ref.model.speculator_loss_coeff=nan"
    stock, ours = build_actor(ppo_config(base)), build_actor(ppo_config(base, broken, **LEARNING))
    head = ours.engine.speculator.heads[0].weight
    before = whole(head).detach().clone()
    assert_same_updates(stock, ours, vocab_size, steps=1)
    assert torch.equal(whole(head), before)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_a_served_policy_gets_its_own_names_and_weights(bases, trained, name):
    """What verl streams into the rollout after each update, whole and as shards."""
    stock, ours = build_actor(ppo_config(bases[name])), build_actor(ppo_config(bases[name], path=trained))
    mine, theirs = policy_of(ours), policy_of(stock)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    mine, theirs = (list(each.engine.get_per_tensor_param_shard()[0]) for each in (ours, stock))
    assert [(key, spec) for key, _, spec in mine] == [(key, spec) for key, _, spec in theirs]
    assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in zip(mine, theirs, strict=True))


def test_which_tokens_the_policy_wrote(vocab_size):
    """Padded and nested batches say the same, and a tool's answer is nobody's draft."""
    padded = make_rollouts(6, vocab_size)
    found = response_mask(padded)
    nested, begin = padded.copy(), []
    rows = padded["attention_mask"][:, :7].sum(1)
    for name, pieces in {
        "prompts": [row[:asked] for row, asked in zip(padded["input_ids"].unbind(), rows, strict=True)],
        "response_mask": [
            mask[: len(row) - asked]
            for mask, row, asked in zip(padded["response_mask"], padded["input_ids"].unbind(), rows, strict=True)
        ],
    }.items():
        nested[name] = torch.nested.as_nested_tensor(pieces, layout=torch.jagged)
    assert torch.equal(response_mask(nested), found)
    assert int(found.sum()) == int(padded["response_mask"].sum())
    for row, asked in zip(found.split(padded["input_ids"].offsets().diff().tolist()), rows, strict=True):
        begin.append(row[:asked].any())
    assert not any(begin)
    assert found.split(padded["input_ids"].offsets().diff().tolist())[0][rows[0] + 2 : rows[0] + 4].sum() == 0


# The configuration, as verl reads it


def test_verls_ppo_configuration_with_our_keys(base, trained):
    config = ppo_config(base, path=trained)
    validate_config(config, use_reference_policy=True, use_critic=False)
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    assert model.get("model_type", "language_model") == "language_model_with_speculator"
    assert model.speculator_config.to_dict() | SMALL == model.speculator_config.to_dict()  # the checkpoint's shape
    assert (model.freeze_base_model, model.speculator_training.train) == (False, False)
    # verl's rollout servers, by their own call
    with pytest.raises(Exception, match="speculator"):
        omega_conf_to_dataclass(config.actor_rollout_ref.model, dataclass_type=HFModelConfig)
    served = rollout_model_config(config.actor_rollout_ref.model)
    converted = omega_conf_to_dataclass(served, dataclass_type=HFModelConfig)
    assert type(converted) is HFModelConfig
    plain = omega_conf_to_dataclass(ppo_config(base).actor_rollout_ref.model, dataclass_type=HFModelConfig)
    assert (converted.path, converted.model_type) == (plain.path, "language_model")
    assert "speculator" in config.actor_rollout_ref.model, "the workers' own configuration must stay"
    stock = ppo_config(base).actor_rollout_ref.model
    assert rollout_model_config(stock) is stock


def test_verls_registry_makes_replicas_that_know_the_base_alone(base, trained):
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    class Replica:
        def __init__(self, replica_rank, config, model_config, gpus_per_node=8):
            self.model_config = model_config

    RolloutReplicaRegistry.register("for_this_test", without_speculator(lambda: Replica))
    made = RolloutReplicaRegistry.get("for_this_test")
    config = ppo_config(base, path=trained).actor_rollout_ref
    replica = made(replica_rank=0, config=config.rollout, model_config=config.model, gpus_per_node=1)
    assert isinstance(replica, Replica)
    assert "speculator" not in replica.model_config
    for name in ("vllm", "sglang", "trtllm"):
        assert RolloutReplicaRegistry._registry[name].__module__ == "verl_speculator.training.plugin"


@pytest.mark.parametrize(
    ("overrides", "speculator", "words"),
    [
        ([], {"n_predict": 2}, r"model.speculator.path=null: expected a trained one, or model.speculator.train"),
        ([], LEARNING | {"lr": 0}, r"model.speculator.lr=0: expected a number > 0, or null"),
        ([], LEARNING | {"train": 3}, r"model.speculator.train=3: expected true, false or null"),
        (["+actor_rollout_ref.model.freeze_base_model=true"], LEARNING, "a policy is trained; expected false"),
        (["actor_rollout_ref.model.lora_rank=8"], LEARNING, "model.lora_rank=8: a policy with a speculator"),
        ([], {"train": "true", "nn": 3}, "model.speculator.nn is not a setting"),
    ],
)
def test_what_a_policy_cannot_have(base, overrides, speculator, words):
    model = ppo_config(base, *overrides, **speculator).actor_rollout_ref.model
    with pytest.raises(Exception, match=words) as caught:
        omega_conf_to_dataclass(model)
    assert isinstance(caught.value.__cause__ or caught.value, UserError)


def test_an_actor_is_told_that_its_base_must_be_a_policy(base, vocab_size):
    """The frozen base of SFT's settings would never see PPO's loss."""
    target = "actor_rollout_ref.model._target_=verl_speculator.training.model_config.SpeculatorModelConfig"
    worker = build_actor(ppo_config(base, target, **SMALL))
    with pytest.raises(UserError, match=r"expected verl_speculator.training.model_config.SpeculatorPolicyConfig"):
        update(worker, make_rollouts(4, vocab_size))


def test_a_half_precision_policy(base, vocab_size):
    """bf16 as on an accelerator; fp16 has one loss scale for both, and is refused."""
    key = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
    stock = build_actor(ppo_config(base, f"{key}=bf16"))
    ours = build_actor(ppo_config(base, f"{key}=bf16", **LEARNING))
    assert_same_updates(stock, ours, vocab_size, steps=1)
    with pytest.raises(UserError, match=r"fp16: model.speculator.train=true needs a type without loss scaling"):
        build_actor(ppo_config(base, f"{key}=fp16", **LEARNING))


def test_policy_under_fsdp1_is_refused(base):
    """Neither a checkpoint of the policy alone nor a single tensor of the speculator can be had from its units."""
    with pytest.raises(UserError, match=r"actor.strategy=fsdp: a policy with a speculator.*; expected fsdp2"):
        build_actor(ppo_config(base, strategy="fsdp", **LEARNING))


def test_optimizer_step_updates_every_parameter_once():
    """Also what lies in the root's flat parameter under FSDP1, which belongs to neither policy nor speculator."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def shard(module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"))

    model = torch.nn.Module()
    model.base = torch.nn.ModuleDict({"layer": shard(torch.nn.Linear(3, 3)), "norm": torch.nn.LayerNorm(3)})
    model.draft = shard(torch.nn.Linear(3, 3))
    engine = object.__new__(PolicyEngine)
    engine.module, engine.scaler, engine.trains_draft = shard(model), None, True
    engine._qat_enabled = False
    engine.engine_config = SimpleNamespace(forward_only=False)
    engine.optimizer_config = SimpleNamespace(clip_grad=1.0)
    parameters = list(engine.module.parameters())
    assert len(parameters) == 3 == len([*engine.base.parameters(), *engine.draft.parameters()]) + 1
    engine.optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    engine.optimizer_step()
    assert [int(engine.optimizer.state[parameter]["step"]) for parameter in parameters] == [1, 1, 1]


def test_fsdp1_keeps_the_names_that_the_losses_ask_for(base):
    """Without them there is nothing to differentiate: verl's default is one nameless parameter a unit."""
    engine = build_engine(base, strategy="fsdp", initialize=False)
    assert engine.engine_config.use_orig_params


def test_a_learning_rate_of_its_own_in_sft_too(base):
    for frozen, rates in ((True, [0.5]), (False, [1e-3, 0.5])):
        engine = build_engine(base, freeze_base_model=frozen, speculator={"lr": 0.5})
        assert [group["lr"] for group in engine.optimizer.param_groups] == rates


def test_sft_always_trains():
    from verl_speculator.config.hydra import load_settings

    with pytest.raises(UserError, match=r"model.speculator.train=false: SFT always trains"):
        load_settings(["trainer.default_local_dir=x", "trainer.device=cpu", "model.speculator.train=false"])
