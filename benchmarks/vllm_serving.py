"""Text, acceptance and speed of speculators in vLLM, compared with vLLM alone and with our own decoder.

    python benchmarks/vllm_serving.py BASE CHECKPOINT [CHECKPOINT ...] --prompts test.parquet [--requests 1 8]

Needs vLLM (docs/rollout.md). Greedy, float32, the first messages of the last conversations. For each checkpoint and
number of concurrent requests, vLLM with the drafter and vLLM alone alternate in one run; a row holds the medians of the
trials. On a CPU set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ as the launcher does, for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import append_rows, environment

TOKENS, DRAFT_PATH = 64, "verl_speculator.vllm_plugin.proposer.SpeculatorProposer"


def engine(base: Path, requests: int, checkpoint: Path | None, drafts: int) -> Any:
    """A vLLM engine, with or without a drafter."""
    from vllm import LLM

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    if checkpoint is not None:
        settings |= {
            "speculative_config": {"method": "custom_class", "model": DRAFT_PATH, "num_speculative_tokens": drafts},
            "additional_config": {"verl_speculator": {"path": str(checkpoint.resolve())}},
            "worker_extension_cls": "verl_speculator.vllm_plugin.worker.SpeculatorWorkerExtension",
        }
    return LLM(str(base), max_num_seqs=requests, gpu_memory_utilization=0.3, **settings)


def generate(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """Token ids of the answers, and the seconds taken."""
    from vllm import SamplingParams

    start = time.perf_counter()
    inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
    outputs = model.generate(inputs, SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - start


def our_decoder(base: Path, checkpoint: Path, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """Token ids of the answers, and the accepted share of drafts."""
    import torch
    from transformers import AutoModelForCausalLM

    from verl_speculator import load_speculator
    from verl_speculator.decoding import speculative_generate

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    speculator = load_speculator(checkpoint, base=base)
    outputs = [speculative_generate(model, speculator, prompt, max_new_tokens=TOKENS) for prompt in prompts]
    rounds = [r for output in outputs for r in output.rounds[1:]]
    return [output.tokens for output in outputs], sum(r.accepted for r in rounds) / sum(r.drafted for r in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    import pandas as pd
    import vllm
    from transformers import AutoTokenizer

    from verl_speculator.checkpoint.format import read_checkpoint_info

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    conversations = pd.read_parquet(args.prompts)["messages"][-args.count :]
    first = [[dict(messages[0])] for messages in conversations]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in first]
    rows = []
    for requests in args.requests:
        alone = engine(args.base, requests, None, 0)
        for checkpoint in args.checkpoints:
            info = read_checkpoint_info(checkpoint)
            drafting = engine(args.base, requests, checkpoint, info.config.n_predict)
            ours, our_rate = our_decoder(args.base, checkpoint, prompts)
            generate(alone, prompts), generate(drafting, prompts)
            drafting.collective_rpc("acceptance_stats")
            seconds: dict[str, list[float]] = {"alone": [], "drafting": []}
            for _ in range(args.trials):
                text, took = generate(alone, prompts)
                seconds["alone"].append(took)
                drafted, took = generate(drafting, prompts)
                seconds["drafting"].append(took)
            stats = drafting.collective_rpc("acceptance_stats")[0]
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "vllm": vllm.__version__,
                    "base": args.base.name,
                    "method": info.config.method,
                    "n_predict": info.config.n_predict,
                    "prompts": len(prompts),
                    "requests_at_once": requests,
                    "same_text_as_alone": text == drafted,
                    "same_text_as_our_decoder": text == ours,
                    "accepted_length": round(1 + stats["accepted"] / stats["rounds"], 4),
                    "accept_rate": round(stats["accepted"] / stats["drafted"], 4),
                    "accept_rate_our_decoder": round(our_rate, 4),
                    "seconds_alone": round(medians["alone"], 3),
                    "seconds_drafting": round(medians["drafting"], 3),
                    "speedup": round(medians["alone"] / medians["drafting"], 3),
                    "trials": args.trials,
                    "threads": os.environ.get("OMP_NUM_THREADS", ""),
                    **environment(),
                }
            )
            sys.stdout.write(f"{rows[-1]}\n")
            del drafting
    append_rows(args.out, rows)


if __name__ == "__main__":
    main()
