"""A vLLM engine in a process of its own: does what a job file says, in order, and writes what came of it.

    python vllm_job.py JOB.json RESULT.json

JOB: {"engine": keyword arguments of vllm.LLM, "steps": [...]}, each step one of
    {"generate": [[token, ...], ...], "max_tokens": n, "temperature": t, "seed": s}     → the tokens of every request
    {"call": name, "arguments": [...]}                     → what every worker answers
    {"counts": true}                                       → vLLM's own counters of drafts since the engine started
    {"sleep": level} and {"wake": true}                    → null (CUDA)
RESULT: {"version": vLLM's, "device": its, "results": [...]}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from verl_speculator.vllm_plugin.acceptance import engine_counts


def main(job: Path, result: Path) -> None:
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import cpu_vllm

        cpu_vllm.mend()
    described = json.loads(job.read_text())
    if "weight_transfer_config" in described["engine"]:
        import weights_from_file  # noqa: F401, which registers it
    engine = LLM(**described["engine"])

    def generate(step: dict[str, Any]) -> dict[str, Any]:
        common = {"temperature": step.get("temperature", 0), "max_tokens": step["max_tokens"], "detokenize": False}
        seed = step.get("seed")
        settings = [
            SamplingParams(**common, seed=None if seed is None else seed + i) for i in range(len(step["generate"]))
        ]
        prompts = [{"prompt_token_ids": tokens} for tokens in step["generate"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "seconds": seconds}

    def do(step: dict[str, Any]) -> Any:
        if "generate" in step:
            return generate(step)
        if "call" in step:
            return engine.collective_rpc(step["call"], args=tuple(step.get("arguments", ())))
        if "counts" in step:
            return engine_counts(engine.get_metrics())
        if "sleep" in step:
            return engine.sleep(level=step["sleep"])
        return engine.wake_up()

    results = [do(step) for step in described["steps"]]
    told = {"version": vllm.__version__, "device": current_platform.device_type, "results": results}
    result.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
