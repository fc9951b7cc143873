"""Tokens per pass after minutes of training: decodes with the checkpoints that runs saved on the way.

    python benchmarks/training_minutes.py NAME=RUN [NAME=RUN ...] --base BASE --prompts test.parquet --minutes 5 20 60

RUN is a run's folder. For each number of minutes its last checkpoint before that time is taken (save by
`trainer.save_minutes`); the times are those of `metrics.jsonl`, from the first step of the run on, with the pauses of
one that was interrupted. A chain of K drafts, greedy. A row holds the mean tokens per pass over all prompts, and what
validation said at that step or before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import append_rows, environment
from rich.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", type=lambda text: text.split("=", 1))
    parser.add_argument("--base", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 20, 60])
    for name, default in (("num-prompts", 40), ("max-new-tokens", 128), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    import torch

    from verl_speculator import load_speculator
    from verl_speculator.base_model.chat_template import tokenize_prompt
    from verl_speculator.base_model.loading import BaseModelLoader
    from verl_speculator.decoding import speculative_generate
    from verl_speculator.evaluation.prompts import read_prompts
    from verl_speculator.training.run_output import read_metrics
    from verl_speculator.utils.process import evenly_spaced

    torch.set_num_threads(args.threads)
    loader = BaseModelLoader(args.base)
    base = loader.load()
    every = read_prompts(args.prompts)
    chosen = [every[i] for i in evenly_spaced(len(every), args.num_prompts)]
    prompts = [tokenize_prompt(loader.tokenizer, prompt.messages) for prompt in chosen]
    options = {"max_new_tokens": args.max_new_tokens, "eos_token_id": loader.end_token_ids}
    for name, folder in args.runs:
        records = read_metrics(Path(folder))
        start = records[0]["time"]
        saved = {int(path.name.rpartition("_")[2]): path for path in Path(folder).glob("global_step_*")}
        elapsed = {record["step"]: (record["time"] - start) / 60 for record in records}
        # A run that was killed while it validated has a checkpoint of a step that it had not recorded.
        elapsed |= {step: max(elapsed.values()) for step in saved.keys() - elapsed.keys()}
        for minutes in args.minutes:
            # A checkpoint is written right after its step, in less than half a minute.
            step = max((step for step in saved if elapsed[step] <= minutes + 0.5), default=None)
            if step is None:
                continue
            speculator = load_speculator(saved[step], base=args.base)
            speculator.attach(base)
            rounds = [r for ids in prompts for r in speculative_generate(base, speculator, ids, **options).counted]
            tokens = sum(1 + each.accepted for each in rounds)
            validation = [record for record in records if record["step"] <= step and "val/loss" in record]
            figures = {
                "name": name,
                "minutes": minutes,
                "step": step,
                "minutes_of_step": round(elapsed[step], 1),
                "tau": round(tokens / len(rounds), 4),
                "first_draft_accepted": round(sum(each.accepted > 0 for each in rounds) / len(rounds), 4),
                "val_expected": round(validation[-1]["val/expected_accept_length"], 4) if validation else "",
                "val_step": validation[-1]["step"] if validation else "",
                "prompts": len(prompts),
                "max_new_tokens": args.max_new_tokens,
            }
            append_rows(args.out, [figures | environment()])
            Console().print(figures)


if __name__ == "__main__":
    main()
