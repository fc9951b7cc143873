"""Our drafter for vLLM: the right rows of a batch, the training recurrence, and what it refuses before it loads."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import partial

import pytest
import torch

from helpers.drafters import alone, load_base, states_of, train_quickly
from helpers.vllm_runner import Request, engine_config, install
from helpers.vllm_workers import Workers
from verl_speculator import SpeculatorConfig, build_speculator, save_speculator
from verl_speculator.decoding import SamplingPolicy, speculative_generate
from verl_speculator.decoding.drafters import SpeculatorDrafter
from verl_speculator.utils.settings import UserError
from verl_speculator.vllm_plugin.acceptance import rollout_metrics
from verl_speculator.vllm_plugin.compat import ProposerSettings, check_signature, check_version
from verl_speculator.vllm_plugin.proposer import (
    StepInputs,
    greedy_drafts,
    newest_rows,
    sampled_drafts,
)

PROMPTS = [[5, 9, 23, 4, 77, 31, 8], [100, 3, 41], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70]]
FAMILIES = {
    "sum_rnn": {},
    "sum_rnn_untied": {"tie_weights": False, "scale_input": True, "inner_dim": "32.24"},
    "sum_lstm": {"method": "sum_lstm", "tie_lstm_embs": True},
    "medusa": {"method": "medusa", "inner_dim": None},
}
COUNT = 14


@pytest.fixture(scope="module")
def model(base):
    return load_base(base)


@pytest.fixture(scope="module")
def texts(model):
    return [prompt + alone(model, prompt, COUNT, eos_token_id=None) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def trained(model, texts, tmp_path_factory):
    """For each family a speculator that knows the texts in part, so that drafts are kept and refused."""
    found = {}
    for name, settings in FAMILIES.items():
        speculator = train_quickly(model, texts, steps=12, **settings).requires_grad_(False)
        found[name] = (speculator, save_speculator(speculator, tmp_path_factory.mktemp(name)))
    return found


def test_rows_of_a_mixed_batch():
    """Nothing sampled, a first token, all drafts refused, some kept, all kept, nothing sampled in spite of drafts."""
    sampled = [[], [7], [8], [1, 2, 3], [4, 5, 6, 9], [], [11]]
    newest = newest_rows(sampled, [0, 0, 3, 3, 3, 2, 0])
    assert newest == [(1, 1, 7), (2, 2, 8), (3, 6 + 2, 3), (4, 10 + 3, 9), (6, 14 + 3, 11)]
    assert newest_rows([[3], [], [5]], None) == [(0, 0, 3), (2, 2, 5)]
    with pytest.raises(ValueError, match="request 1 got 2 tokens from 0 drafts"):
        newest_rows([[1], [2, 3]], [0, 0])
    with pytest.raises(ValueError):
        newest_rows([[1], [2]], [0])


def test_nothing_is_computed_for_a_batch_without_tokens(trained, model, monkeypatch):
    _, path = trained["sum_rnn"]
    drafter = install(monkeypatch)(engine_config(path, model, 3), model).drafter
    monkeypatch.setattr(drafter, "_draft", None)
    for sampled in ([[], []], []):
        with drafter.step_inputs(StepInputs(torch.zeros(len(sampled), 32), None)):
            assert drafter.propose(sampled, None, None) == sampled


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_the_training_recurrence_row_by_row(trained, model, family):
    speculator, _ = trained[family]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 32, generator=generator, dtype=torch.float64)
    tokens = torch.randint(speculator.vocab_size, (9,), generator=generator)
    drafts = greedy_drafts(speculator, hidden, tokens)
    fed = torch.cat([tokens[:, None], drafts[:, :-1]], dim=1)
    states = speculator.unroll(hidden, fed)
    for k in range(speculator.n_predict):
        assert torch.equal((states[k] @ speculator.head(k).T).argmax(-1), drafts[:, k])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_served_batch_drafts_what_our_decoder_drafts(trained, model, texts, family, monkeypatch):
    """Prompts in chunks of four, requests that come and go, one preempted in the middle: the text is the base's own,
    and every draft is the one that our decoder makes at that place."""
    speculator, path = trained[family]
    runner = install(monkeypatch)(engine_config(path, model, speculator.n_predict), model, chunk=4)
    requests = [Request(list(prompt), COUNT) for prompt in PROMPTS]
    for step in range(60):
        if step == 6:
            requests[0].read, requests[0].drafts = 0, []  # preempted: its cache is gone, its tokens are not
        waits = step in (6, 7, 8)
        batch = [r for r in requests if len(r.answer) < r.want and not (waits and r is requests[0])]
        if batch:
            runner.step(batch if step % 2 else batch[::-1])
    for request, text in zip(requests, texts, strict=True):
        assert request.tokens[: len(text)] == text
    propose = SpeculatorDrafter(speculator, SamplingPolicy(0.0, 1.0, 0), sampled=False).propose
    # Again with the requests' own histories: each step's tokens are what the drafts were made from.
    history = {id(request): list(request.tokens[: request.prompt]) for request in requests}
    kinds = set()
    for batch, sampled, drafts in runner.seen:
        for request, got, found in zip(batch, sampled, drafts, strict=True):
            history[id(request)] += got
            kinds.add(min(len(got), 3))
            if not got:
                assert found == []
                continue
            before = history[id(request)]
            hidden, token = states_of(model, before[:-1])[-1:], torch.tensor(before[-1:])
            assert found == propose(hidden, token, None, speculator.n_predict, 1).tokens.tolist()
    assert kinds >= {0, 1, 2}
    account = runner.drafter.stats.take()
    accepted = [n for request in requests for n in request.accepted]
    assert (account["rounds"], account["accepted"]) == (len(accepted), sum(accepted))
    assert account["drafted"] == speculator.n_predict * len(accepted) and 0 < sum(accepted) < account["drafted"]
    assert rollout_metrics([account])["rollout/accepted_length"] == pytest.approx(1 + sum(accepted) / len(accepted))


def exponential(*shape: int) -> torch.Tensor:
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", [*FAMILIES, "draft_vocabulary"])
def test_sampled_drafts_come_with_what_they_were_drawn_from(trained, model, texts, family):
    """The first drafts of 4,000 requests at one place against q (chi-square), all distributions against the recurrence
    on the drafts before them, and a greedy request among them."""
    if family == "draft_vocabulary":
        tokens = sorted({token for text in texts for token in text})
        config = SpeculatorConfig(n_predict=3, inner_dim=16, emb_dim=16, proj_dim=16, draft_vocab_size=len(tokens))
        speculator = build_speculator(config, hidden_size=32, vocab_size=model.config.vocab_size, seed=0).double()
        speculator.draft_tokens.copy_(torch.tensor(tokens))
    else:
        speculator, _ = trained[family]
    count, size = 4000, speculator.vocab_size
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(count, -1)
    newest = torch.full([count], texts[0][0])
    temperature = torch.full([count], 2.0)
    temperature[0] = 0
    drafts, distributions = sampled_drafts(speculator, hidden, newest, temperature, exponential(count, 3, size))
    assert drafts[:1].equal(greedy_drafts(speculator, hidden[:1], newest[:1]))
    states = speculator.unroll(hidden, torch.cat([newest[:, None], drafts[:, :-1]], dim=1))
    for k in range(3):
        expected = (speculator.logits(k, states[k]) / temperature.clamp(min=1e-9)[:, None]).softmax(-1)
        torch.testing.assert_close(distributions[1:, k], expected[1:].float())
    assert distributions.gather(2, drafts[..., None]).all(), "a draft that cannot have been drawn"
    expected, seen = distributions[1, 0] * (count - 1), drafts[1:, 0].bincount(minlength=size)
    often = expected >= 5
    statistic = ((seen - expected)[often] ** 2 / expected[often]).sum()
    freedom = int(often.sum())
    assert often.sum() >= 8 and statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_the_runner_gets_the_distributions_of_the_requests_that_were_drafted_for(trained, model, monkeypatch):
    _, path = trained["sum_lstm"]
    config = engine_config(path, model, 3, draft_sample_method="probabilistic")
    runner = install(monkeypatch)(config, model, chunk=4)
    requests = [Request(list(prompt), 4) for prompt in PROMPTS]
    runner.step(requests)
    assert runner._draft_probs is None, "greedy requests need none"
    runner.temperature = 1.0
    reading = Request([*PROMPTS[2], 4, 5, 6], 4)
    torch.manual_seed(0)
    runner.step([reading, requests[1]])
    assert runner._get_spec_decode_draft_probs(str(id(reading))) is None
    found = runner._get_spec_decode_draft_probs(str(id(requests[1])))
    assert found.shape == (3, model.config.vocab_size)
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    assert found.gather(1, torch.tensor(requests[1].drafts)[:, None]).all()


def test_a_requests_seed_decides_its_drafts(trained, model, monkeypatch):
    _, path = trained["sum_rnn"]
    config = engine_config(path, model, 3, draft_sample_method="probabilistic")
    drafter = install(monkeypatch)(config, model).drafter

    def drafts(seed: int) -> list[list[int]]:
        inputs = StepInputs(torch.zeros(2, 32), None, torch.full([2], 5.0), {1: torch.Generator().manual_seed(seed)})
        with drafter.step_inputs(inputs):
            return drafter.propose([[3], [3]], None, None)

    torch.manual_seed(0)
    several = [drafts(1), drafts(1), drafts(2)]
    assert several[0][1] == several[1][1] != several[2][1]
    assert several[0][0] != several[1][0]


def test_a_runner_that_reads_no_distributions_is_refused(trained, model, monkeypatch):
    _, path = trained["sum_rnn"]
    kind = install(monkeypatch)
    del kind._get_spec_decode_draft_probs
    config = engine_config(path, model, 3, draft_sample_method="probabilistic")
    assert "draft_sample_method=probabilistic: GPUModelRunner has no" in refusal(kind, config, model)
    kind(engine_config(path, model, 3), model)


@pytest.mark.parametrize("most_requests", [1, 2])
def test_an_engine_of_few_requests_is_compiled_for_too(trained, model, monkeypatch, most_requests):
    _, path = trained["sum_rnn"]
    eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr("verl_speculator.vllm_plugin.proposer.torch.compile", eager)
    config = engine_config(path, model, 3, compile=True)
    config.scheduler_config.max_num_seqs = most_requests
    runner = install(monkeypatch)(config, model)
    runner.step([Request([4, 5], 5) for _ in range(most_requests)])
    assert [len(drafts) for drafts in runner.seen[0][2]] == [3] * most_requests


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_workers_draft_the_same_with_their_rows_alone(trained, model, family, monkeypatch):
    speculator, path = trained[family]
    workers = Workers(3)
    kind = install(monkeypatch, workers=workers)
    importlib.import_module("verl_speculator.vllm_plugin.sharding")
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def work(rank: int) -> tuple[list[list[int]], int]:
        drafter = kind(engine_config(path, model, 3), model).drafter
        with drafter.step_inputs(StepInputs(hidden, None)):
            drafts = drafter.propose([[token] for token in range(5)], None, None)
        return drafts, sum(parameter.numel() for parameter in drafter.speculator.parameters())

    expected = greedy_drafts(speculator, hidden, torch.arange(5)).tolist()
    for drafts, held in workers.run(work):
        assert drafts == expected
        assert held < 0.6 * sum(parameter.numel() for parameter in speculator.parameters())


def test_acceptance_is_our_own_decoders(trained, model, monkeypatch):
    speculator, path = trained["sum_rnn"]
    own = speculative_generate(model, speculator, PROMPTS[1], max_new_tokens=COUNT, eos_token_id=())
    runner = install(monkeypatch)(engine_config(path, model, 3), model)
    request = Request(list(PROMPTS[1]), COUNT)
    while len(request.answer) < COUNT:
        runner.step([request])
    assert request.answer == own.tokens
    # The last round of a text may be cut short.
    assert request.accepted[:-1] == [r.accepted for r in own.rounds[1:-1]]


@pytest.mark.parametrize(("method", "graphs"), [("greedy", 2), ("probabilistic", 4)])
def test_it_traces_as_one_graph(trained, model, monkeypatch, method, graphs):
    """What torch.compile gets on CUDA: nothing in it falls back to Python, for any number of requests."""
    _, path = trained["sum_lstm"]
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = partial(torch.compile, backend=count, fullgraph=True)
    monkeypatch.setattr("verl_speculator.vllm_plugin.proposer.torch.compile", compiled)
    torch._dynamo.reset()
    runner = install(monkeypatch)(engine_config(path, model, 3, draft_sample_method=method, compile=True), model)
    assert len(traced) == graphs
    for size in (1, 2, 5):
        for runner.temperature in (0.0, 1.0):
            runner.step([Request([4 + i, 5], 5) for i in range(size)])
    assert len(traced) == graphs
    torch._dynamo.reset()


def test_nothing_is_drafted_for_a_large_batch(trained, model, texts, monkeypatch):
    _, path = trained["sum_rnn"]
    runner = install(monkeypatch)(engine_config(path, model, 3, draft_up_to=2), model)
    requests = [Request(list(prompt), COUNT) for prompt in PROMPTS]
    for size in (2, 3, 3, 1):
        runner.step(requests[:size])
    assert [[len(drafts) for drafts in found] for _, _, found in runner.seen] == [[3, 3], [0, 0, 0], [0, 0, 0], [3]]
    while len(requests[0].answer) < COUNT:
        runner.step(requests)
    assert requests[0].tokens[: len(texts[0])] == texts[0]


def test_one_request_at_the_end_of_its_context_costs_the_others_nothing(trained, model, texts, monkeypatch):
    """Drafts are the speculator's up to the end, where vLLM verifies zeros for the whole batch otherwise, whatever
    `draft_up_to` is."""
    _, path = trained["sum_rnn"]
    limit = len(PROMPTS[0]) + COUNT
    runner = install(monkeypatch)(engine_config(path, model, 3, max_model_len=limit, draft_up_to=2), model)
    requests = [Request(list(prompt), COUNT) for prompt in PROMPTS[:2]]
    while len(requests[0].answer) < COUNT:
        runner.step(requests)
    assert requests[0].tokens == texts[0]
    assert max(request.read for request in requests) + 3 > limit
    shown = [tuple(drafts) for _, _, found in runner.seen for drafts in found]
    assert len(shown) >= 6 and {len(drafts) for drafts in shown} == {3} and (0, 0, 0) not in shown
    runner.step([*requests, Request([5, 9], 4)])
    assert runner.seen[-1][2] == [[], [], []]


def test_other_drafters_are_left_alone(trained, model, monkeypatch):
    _, path = trained["sum_rnn"]
    kind = install(monkeypatch)
    runner = kind(engine_config(path, model, 3), model)
    wrapped = kind.propose_draft_token_ids
    other = kind(engine_config(path, model, 3), model)
    assert kind.propose_draft_token_ids is wrapped  # once per process

    class Ngram:
        def propose(self, sampled, *rest, slot_mappings):
            return [[1] for _ in sampled]

    other.drafter = Ngram()
    other.step([Request([3, 4], 1)])
    assert other.seen[0][2] == [[1]]
    with pytest.raises(RuntimeError, match="in another way than through GPUModelRunner"):
        runner.drafter.propose([[1]], None, None)


def test_a_changed_method_is_refused(trained, model, monkeypatch):
    _, path = trained["sum_rnn"]
    kind = install(monkeypatch)

    def changed(self, scheduler_output, sampled_token_ids, sampling_metadata, states, slot_mappings):
        raise AssertionError

    monkeypatch.setattr(kind, "propose_draft_token_ids", changed)
    with pytest.raises(UserError) as error:
        kind(engine_config(path, model, 3), model)
    assert "GPUModelRunner.propose_draft_token_ids has changed (without hidden_states" in str(error.value)
    assert "with states" in str(error.value) and "0.24 to 0.33" in str(error.value)


def test_the_installed_vllm_still_is_what_was_read():
    runner = pytest.importorskip("vllm.v1.worker.gpu_model_runner")
    check_signature(runner.GPUModelRunner.propose_draft_token_ids)


@pytest.mark.parametrize("version", ["0.24.0", "0.26.1.dev3+cu129", "0.33.0"])
def test_versions_that_were_read(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.23.1", "0.34.0", "1.24.0", "main", None])
def test_other_versions_are_refused(version):
    with pytest.raises(UserError, match=r"0\.24 to 0\.33"):
        check_version(version)


def refusal(kind, config, model) -> str:
    with pytest.raises(UserError) as error:
        kind(config, model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused_before_a_weight_is_read(trained, model, monkeypatch, tmp_path):
    _, path = trained["sum_rnn"]
    kind = install(monkeypatch)
    (path / "pytorch_model.bin").rename(tmp_path / "away")
    good = partial(engine_config, path, model)
    assert "num_speculative_tokens=4: expected 3, the n_predict of" in refusal(kind, good(4), model)
    config = good(3)
    config.use_v2_model_runner = True
    assert "VLLM_USE_V2_MODEL_RUNNER=1" in refusal(kind, config, model)
    config = good(3)
    config.model_config.get_hidden_size = lambda: 64
    assert "trained for a base of width (hidden_size) 32, this base has 64" in refusal(kind, config, model)
    config = good(3)
    config.model_config.get_vocab_size = lambda: 99
    assert "vocabulary (vocab_size)" in refusal(kind, config, model)
    assert "expected an absolute path" in refusal(kind, engine_config("runs/one", model, 3), model)
    assert "did you mean 'compile'" in refusal(kind, good(3, compiled=True), model)
    assert "compile=yes: expected true, false or null" in refusal(kind, good(3, compile="yes"), model)
    assert "draft_up_to=-1: expected a number of requests" in refusal(kind, good(3, draft_up_to=-1), model)
    config = good(3)
    config.additional_config = {}
    assert 'expected {"verl_speculator": {"path"' in refusal(kind, config, model)
    assert refusal(kind, good(3), model).endswith("pytorch_model.bin: no such file")
    (tmp_path / "away").rename(path / "pytorch_model.bin")


def test_families_that_it_cannot_serve_are_named(model, monkeypatch, tmp_path):
    config = SpeculatorConfig(method="medusa", n_predict=3, hidden_state="pre_norm")
    vocab = model.config.vocab_size
    save_speculator(build_speculator(config, hidden_size=32, vocab_size=vocab, seed=0), tmp_path)
    told = refusal(install(monkeypatch), engine_config(tmp_path, model, 3), model)
    assert "cannot serve it: hidden_state=pre_norm: vLLM passes the hidden state after the final norm" in told
    assert "train with hidden_state=post_norm" in told


def test_an_untrained_speculator_is_said_to_be_one(model, monkeypatch, tmp_path, caplog):
    config = SpeculatorConfig(n_predict=2, inner_dim=8, emb_dim=8, proj_dim=8)
    save_speculator(build_speculator(config, hidden_size=32, vocab_size=model.config.vocab_size, seed=0), tmp_path)
    install(monkeypatch)(engine_config(tmp_path, model, 2), model)
    assert "no training step has changed its tensors" in caplog.text


def test_importing_it_needs_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None; "
        "import verl_speculator.vllm_plugin.proposer, verl_speculator.vllm_plugin.worker; "
        "assert 'verl' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    light = (
        "import sys, verl_speculator.rl.rollout_args, verl_speculator.interop.engine_formats; assert 'torch' not in "
    )
    subprocess.run([sys.executable, "-c", light + "sys.modules"], check=True)


def test_settings_as_vllm_hands_them_over():
    parsed = ProposerSettings.parse({"verl_speculator": {"path": "/a/b", "compile": False}, "other": 1})
    assert parsed == ProposerSettings("/a/b", False)
