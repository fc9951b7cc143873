"""A newer speculator into a running rollout: all of it or none, through verl's transport, with a version to see."""

from __future__ import annotations

import asyncio
import importlib
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helpers.drafters import load_base
from helpers.vllm_runner import Request, engine_config, install
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.rl.rollout_args import WORKER_EXTENSION
from verl_speculator.rl.trainer import collect_acceptance_stats, sync_speculator, whole_tensors
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin import worker as worker_module
from verl_speculator.vllm_plugin.acceptance import AcceptanceStats, rollout_metrics
from verl_speculator.vllm_plugin.proposer import greedy_drafts
from verl_speculator.vllm_plugin.worker import SpeculatorWorkerExtension, StreamedUpdate


def make(model, folder, seed, **settings):
    """A speculator of random weights, nothing tied to 1 or 0, and its checkpoint."""
    shape = {"method": "sum_lstm", "tie_lstm_embs": True, "n_predict": 3, "inner_dim": 8, "emb_dim": 8, "proj_dim": 8}
    config = SpeculatorConfig(**(shape | settings))
    vocab = model.config.vocab_size
    speculator = build_speculator(config, hidden_size=32, vocab_size=vocab, seed=seed, dtype=torch.float64)
    for parameter in speculator.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return speculator.requires_grad_(False), save_speculator(speculator, folder / f"spec{seed}")


@pytest.fixture
def served(base, tmp_path, monkeypatch):
    """A worker that serves the first of two speculators."""
    model = load_base(base)
    (old, path), new = make(model, tmp_path, 0), make(model, tmp_path, 1)
    runner = install(monkeypatch)(engine_config(path, model, 3), model)

    class Worker(SpeculatorWorkerExtension):
        model_runner, rank, device = runner, 0, torch.device("cpu")

    return Worker(), old, new


def drafts_of(worker):
    """What it drafts after a short prompt."""
    worker.model_runner.step([Request([5, 9, 23], 4)])
    return worker.model_runner.seen[-1][2][0]


def expected(worker, speculator):
    from helpers.drafters import states_of

    base = worker.model_runner.base
    hidden = states_of(base, [5, 9, 23])[-1:]
    token = base.get_output_embeddings()(hidden).argmax(-1)
    return greedy_drafts(speculator, hidden, token)[0].tolist()


def test_the_next_step_drafts_with_what_was_pushed(served):
    worker, old, (new, path) = served
    assert drafts_of(worker) == expected(worker, old) != expected(worker, new)
    places = [p.data_ptr() for p in worker.model_runner.drafter.speculator.parameters()]
    assert worker.update_speculator(new.named_parameters()) == 1
    assert drafts_of(worker) == expected(worker, new)
    assert worker.update_speculator(dict(old.named_parameters()), version=7) == 7
    assert drafts_of(worker) == expected(worker, old)
    assert worker.update_speculator(str(path)) == 8
    assert drafts_of(worker) == expected(worker, new)
    # What was compiled or captured over the parameters stays good.
    assert places == [p.data_ptr() for p in worker.model_runner.drafter.speculator.parameters()]
    assert worker.acceptance_stats()["version"] == 8


def test_another_speculator_changes_nothing(served, tmp_path):
    worker, _, (new, _) = served
    before, model = drafts_of(worker), worker.model_runner.base
    parameters = dict(new.named_parameters())
    name = next(iter(parameters))
    for tensors, words in (
        ({k: v for k, v in parameters.items() if k != name}, f"missing {name}"),
        (parameters | {"more": torch.zeros(1)}, "unexpected more"),
        (parameters | {name: parameters[name][:1]}, f"{name} is [1, 32], expected [32, 32]"),
    ):
        with pytest.raises(UserError) as error:
            worker.update_speculator(tensors)
        assert words in str(error.value)
    _, deeper = make(model, tmp_path, 2, n_predict=4)
    with pytest.raises(UserError, match=r"differs from what is served: n_predict \(3, 4\)"):
        worker.update_speculator(str(deeper))
    assert drafts_of(worker) == before and worker.acceptance_stats()["version"] == 0


@pytest.mark.parametrize("is_method", [True, False])
def test_vllms_own_draft_model_is_refused_by_name(is_method):
    """Ignored, it would go on drafting with old weights."""

    class Eagle3LlamaForCausalLM:
        pass

    model = Eagle3LlamaForCausalLM()
    runner = {"get_draft_model": lambda: model} if is_method else {"drafter": SimpleNamespace(model=model)}

    class Worker(SpeculatorWorkerExtension):
        model_runner, rank = SimpleNamespace(**runner), 0

    with pytest.raises(
        UserError, match="update_speculator: vLLM's own Eagle3LlamaForCausalLM drafts; expected a drafter"
    ):
        Worker().update_speculator({})
    assert Worker().acceptance_stats() is None


def test_workers_that_do_not_draft(served):
    """Earlier pipeline stages have no drafter, and a rollout without speculation another one."""

    class Worker(SpeculatorWorkerExtension):
        model_runner, rank = SimpleNamespace(), 1

    for worker in (Worker(), Worker()):
        assert worker.update_speculator({}) is None and worker.acceptance_stats() is None
        worker.write_acceptance_stats("/no/such/place")
        worker.model_runner.drafter = object()


def test_a_stale_draft_is_visible():
    fresh, stale = AcceptanceStats(version=4), AcceptanceStats(version=3)
    fresh.count([[1, 2], [3], [], [9]], [3, 3, 3, 0])
    stale.count([[1, 2, 3, 4]], [3])
    stale.count([[1]], None)
    metrics = rollout_metrics([fresh.take(), stale.take()], trainer_version=4)
    assert metrics == {
        "rollout/speculator_version": 3,
        "rollout/speculator_lag": 1,
        "rollout/accepted_length": 1 + 4 / 3,
        "rollout/accept_rate": 4 / 9,
    }
    assert fresh.take() == {"version": 4, "rounds": 0, "drafted": 0, "accepted": 0}
    assert rollout_metrics([fresh.take()]) == {"rollout/speculator_version": 4}
    assert rollout_metrics([]) == {}
    # A run that is taken up again asks once before it sends anything: what was only loaded has drafted nothing.
    taken_up = {"version": 100, "rounds": 2, "drafted": 6, "accepted": 1}
    assert rollout_metrics([AcceptanceStats().take(), taken_up], trainer_version=100)["rollout/speculator_lag"] == 0


@pytest.fixture
def verl_worker(monkeypatch):
    """verl's extension class as a stand-in, since its module imports vLLM; its transport is verl's own."""
    pytest.importorskip("zmq", reason="verl's transport needs pyzmq, which vLLM brings")
    import verl

    rollout = Path(verl.__file__).parent / "workers" / "rollout" / "vllm_rollout"
    package, utils = (ModuleType(f"verl.workers.rollout.vllm_rollout{rest}") for rest in ("", ".utils"))
    package.__path__ = [str(rollout)]

    class vLLMColocateWorkerExtension:
        def update_weights_from_ipc(self):
            return "the base's"

        def _get_zmq_handle(self):
            return self.handle

    utils.vLLMColocateWorkerExtension = vLLMColocateWorkerExtension
    for module in (package, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    worker_module._verl_worker_extension.cache_clear()
    module, _, name = WORKER_EXTENSION.rpartition(".")
    yield getattr(importlib.import_module(module), name)
    worker_module._verl_worker_extension.cache_clear()
    sys.modules.pop("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", None)


class Rollout:
    """verl's ServerAdapter, as far as it is used: a call that runs in the worker, and gives nothing back."""

    use_shm = True
    config = SimpleNamespace(checkpoint_engine=SimpleNamespace(update_weights_bucket_megabytes=1), dtype="bfloat16")

    def __init__(self, worker):
        self.worker, self.zmq_handle = worker, worker.handle

    async def _execute_method(self, method, non_block=False, timeout=None, args=(), kwargs=None):
        pool = ThreadPoolExecutor(1)
        called = pool.submit(getattr(self.worker, method), *args, **(kwargs or {}))

        async def end():
            called.result(timeout=60)

        return end() if non_block else await end()


@pytest.fixture
def synced(served, verl_worker, tmp_path):
    """A rollout whose worker is behind verl's transport, and a newer speculator."""
    extended, _, (new, _) = served

    class Worker(verl_worker):
        model_runner, rank, device = extended.model_runner, 3, extended.device
        handle = f"ipc://{tmp_path}/socket"

    return Rollout(Worker()), new


@pytest.mark.filterwarnings("ignore")
def test_push_goes_through_verls_own_transport(synced):
    rollout, new = synced
    worker = rollout.worker
    assert worker.update_weights_from_ipc() == "the base's"
    asyncio.run(sync_speculator(rollout, dict(new.named_parameters()), version=40))
    for name, parameter in new.named_parameters():
        # In the type that the rollout serves, whatever the trainer's is; this worker's own is float64.
        sent = parameter.to(torch.bfloat16).double()
        assert torch.equal(worker.model_runner.drafter.speculator.get_parameter(name), sent)
    drafts_of(worker)
    # verl also syncs at no step, in the midst of a validation: the version stays the trainer's.
    asyncio.run(sync_speculator(rollout, dict(new.named_parameters())))
    assert asyncio.run(collect_acceptance_stats(rollout)) == [{"version": 40, "rounds": 0, "drafted": 0, "accepted": 0}]


@pytest.mark.filterwarnings("ignore")
def test_push_of_another_speculator_leaves_the_served_one_as_it_is(synced):
    """The sender is let through to its end, where it is told."""
    rollout, new = synced
    parameters, drafter = dict(new.named_parameters()), rollout.worker.model_runner.drafter
    before = {name: p.clone() for name, p in drafter.speculator.named_parameters()}
    *_, last = parameters
    for other, words in (
        ({name: p for name, p in parameters.items() if name != last}, f"missing {last}"),
        (parameters | {"more": torch.zeros(1)}, "unexpected more"),
        (parameters | {last: parameters[last][:1]}, f"{last} is"),
    ):
        with pytest.raises(UserError, match=words):
            asyncio.run(sync_speculator(rollout, other, version=40))
    assert all(torch.equal(p, before[name]) for name, p in drafter.speculator.named_parameters())
    assert drafter.stats.version == 0


@pytest.mark.filterwarnings("ignore")
def test_push_holds_two_whole_tensors_at_most(synced, monkeypatch):
    """The one that verl's sender has just copied into its bucket, and the next; the worker keeps none."""
    rollout, new = synced
    alive, most = weakref.WeakSet(), []

    def watched(*args, **kwargs):
        for name, tensor in whole_tensors(*args, **kwargs):
            assert tensor.dtype == torch.bfloat16
            alive.add(Watch(tensor))
            most.append(len(alive))
            yield name, tensor
            del tensor

    class Watch:
        def __init__(self, tensor):
            weakref.finalize(tensor, alive.discard, self)

    monkeypatch.setattr("verl_speculator.rl.trainer.whole_tensors", watched)
    asyncio.run(sync_speculator(rollout, dict(new.named_parameters()), version=40))
    assert len(most) == len(dict(new.named_parameters())) > 4 and max(most) <= 2


def test_streamed_update_keeps_no_tensor_and_tells_what_did_not_come(served):
    worker, _, (new, _) = served
    speculator, parameters = worker.model_runner.drafter.speculator, dict(new.named_parameters())
    update = StreamedUpdate(worker.model_runner.drafter, {name: p.shape for name, p in parameters.items()})
    (first, value), *_, (last, _) = parameters.items()
    sent = value.clone()
    gone = weakref.ref(sent)
    update.copy([(first, sent)])
    del sent
    assert gone() is None and torch.equal(speculator.get_parameter(first), value)
    update.copy([(name, p) for name, p in parameters.items() if name != last])
    with pytest.raises(RuntimeError, match=f"announced and not sent: {last}"):
        update.finish()
