#!/usr/bin/env bash
# A real chat model made faster, on a CPU: SmolLM2-135M-Instruct, its own answers to 1,000 prompts, a speculator, and what it
# brings on 30 prompts that were held out. Everything lands in demo-real/ (or $DEMO). Each stage that is done is skipped, and
# one that was killed goes on, when the command runs again. PYTHON names the interpreter; PROMPTS and STEPS make it shorter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHON=${PYTHON:-python3} HF_HUB_OFFLINE=1
out=${DEMO:-demo-real}
prompts=examples/demo/prompts
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483648
stage() { echo "== $(date +%H:%M:%S) $*"; }

mkdir -p "$out"
stage "the base model"
"$PYTHON" examples/demo/real_base.py "$out/base"
for split in test train; do
    stage "its answers to the $split prompts"
    [ -f "$out/$split.parquet" ] || "$PYTHON" -m verl_speculator regenerate --base "$out/base" \
        --data $prompts/$split.parquet --out "$out/$split.parquet" \
        --num-rows "${PROMPTS:-0}" --max-new-tokens 256 --keep-unfinished --batch-size 64 --shard-rows 200
done
stage "the speculator"
./run_speculator_training.sh 1 "$out/speculator" model.partial_pretrain="$out/base" --recipe small \
    model.speculator.inner_dim=576 model.speculator.emb_dim=576 model.speculator.proj_dim=576 \
    data.train_files="$out/train.parquet" data.val_files="$out/test.parquet" \
    data.cache_hidden_states="$out/states" data.num_workers=0 \
    trainer.total_training_steps="${STEPS:-2000}" trainer.total_epochs=100 trainer.test_freq=1000
stage "a draft tree"
[ -f "$out/tree.json" ] || "$PYTHON" -m verl_speculator tree --base "$out/base" --speculator "$out/speculator" \
    --prompts "$out/train.parquet" --num-prompts 24 --nodes 12 --max-new-tokens 96 --out "$out/tree.json"
stage "what it brings"
"$PYTHON" -m verl_speculator evaluate --base "$out/base" --speculator "$out/speculator" --draft-tree "$out/tree.json" \
    --prompts $prompts/test.parquet --num-prompts 30 --baselines none,prompt_lookup --max-new-tokens 128 --out "$out/evaluation"
stage "done"
