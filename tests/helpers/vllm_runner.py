"""As much of vLLM as our drafter meets: a runner that batches, reads prompts in chunks, preempts and verifies greedily.

Names, parameters and the order of calls are those of vLLM 0.24 and 0.33 (v1/worker/gpu_model_runner.py); the base is a
Hugging Face model that reads every prefix anew.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch

from helpers.drafters import states_of
from helpers.vllm_workers import Workers


@dataclass
class Request:
    """One request: its tokens, how many of them the base has read, and the drafts for what follows."""

    tokens: list[int]
    want: int
    prompt: int = 0
    read: int = 0
    drafts: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt :][: self.want]


def make_runner_class() -> type:
    """A new class each time, since our proposer wraps a method of it."""

    class GPUModelRunner:
        def __init__(self, vllm_config, base, *, chunk: int = 1000) -> None:
            from verl_speculator.vllm_plugin.proposer import SpeculatorProposer

            self.vllm_config, self.base, self.chunk = vllm_config, base, chunk
            self.drafter = SpeculatorProposer(vllm_config)
            self.input_batch = SimpleNamespace(num_tokens_no_spec=None, token_ids_cpu=None, req_ids=[])
            self._draft_probs = self._draft_prob_req_ids = None
            self.temperature = 0.0
            self.max_model_len = self.effective_drafter_max_model_len = vllm_config.model_config.max_model_len
            self.seen: list[tuple[list[Request], list[list[int]], list[list[int]]]] = []

        def propose_draft_token_ids(
            self,
            scheduler_output,
            sampled_token_ids,
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            aux_hidden_states,
            spec_decode_metadata,
            common_attn_metadata,
            slot_mappings,
        ):
            assert isinstance(sampled_token_ids, list)
            self._draft_probs = self._draft_prob_req_ids = None
            return self.drafter.propose(
                sampled_token_ids,
                self.input_batch.num_tokens_no_spec,
                self.input_batch.token_ids_cpu,
                slot_mappings=slot_mappings,
            )

        def _get_spec_decode_draft_probs(self, request: str) -> torch.Tensor | None:
            """vLLM's takes the metadata of a batch."""
            ids = self._draft_prob_req_ids or []
            return self._draft_probs[ids.index(request)] if request in ids else None

        @torch.inference_mode()
        def step(self, requests: list[Request]) -> None:
            """One pass of the base over a batch, in the batch's order, and new drafts."""
            rows, sampled, counts = [], [], []
            for request in requests:
                end = min(len(request.tokens), request.read + self.chunk)
                whole = end == len(request.tokens)
                drafts = request.drafts[: self.max_model_len - 1 - end] if whole else []
                states = states_of(self.base, request.tokens[:end] + drafts)[-len(drafts) - 1 :]
                choice = self.base.get_output_embeddings()(states).argmax(-1).tolist()
                right = 0
                while right < len(drafts) and drafts[right] == choice[right]:
                    right += 1
                got = choice[: right + 1] if whole else []
                if got and drafts:
                    request.accepted.append(right)
                request.read = end + right
                rows.append(states)
                sampled.append(got)
                counts.append(len(drafts))
            metadata = SimpleNamespace(num_draft_tokens=counts) if any(counts) else None
            hidden = torch.cat(rows)
            self.input_batch.req_ids = [str(id(request)) for request in requests]
            temperature = torch.full([len(requests)], self.temperature) if self.temperature else None
            sampling = SimpleNamespace(temperature=temperature, generators={})
            draft_length = self.vllm_config.speculative_config.num_speculative_tokens
            longest = max((request.read for request in requests), default=0)
            if longest + draft_length <= self.effective_drafter_max_model_len:
                found = self.propose_draft_token_ids(None, sampled, sampling, None, hidden, None, metadata, None, None)
            else:
                found = [[0] * draft_length for _ in requests]
            for request, got, drafts in zip(requests, sampled, found, strict=True):
                request.tokens += got
                request.drafts = drafts
            self.seen.append((requests, sampled, [list(drafts) for drafts in found]))

    return GPUModelRunner


def install(monkeypatch, version: str = "0.24.0", workers: Workers | None = None) -> type:
    """Let `import vllm` find this, in this process."""
    runner = make_runner_class()
    names = ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu_model_runner")
    modules = {name: ModuleType(name) for name in names} | {"vllm.distributed": (workers or Workers(1)).module()}
    modules[names[-1]].GPUModelRunner = runner
    monkeypatch.delitem(sys.modules, "verl_speculator.vllm_plugin.sharding", raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for user in ("vllm_plugin.proposer", "vllm_plugin.compat", "rl.rollout_args"):
        monkeypatch.setattr(f"verl_speculator.{user}.installed_vllm", lambda: version)
    return runner


def engine_config(
    path, base, tokens: int, *, draft_sample_method: str = "greedy", max_model_len: int = 1000, **settings
):
    """vLLM's configuration, as far as it is read."""
    config = base.config
    return SimpleNamespace(
        additional_config={"verl_speculator": {"path": str(path)} | settings},
        speculative_config=SimpleNamespace(
            num_speculative_tokens=tokens, draft_sample_method=draft_sample_method, rejection_sample_method="standard"
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        model_config=SimpleNamespace(
            dtype=next(base.parameters()).dtype,
            max_model_len=max_model_len,
            get_hidden_size=lambda: config.hidden_size,
            get_vocab_size=lambda: config.vocab_size,
        ),
        device_config=SimpleNamespace(device="cpu"),
        use_v2_model_runner=False,
    )
