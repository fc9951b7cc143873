#!/usr/bin/env bash
# Which layer should an early exit leave from? Four layers first, then all of them, each trained for the same number of steps
# on chat, with its acceptance, speed and quality; finished layers are not trained again.
#
#   examples/run_sweep_chat_layers.sh OUT [options of `verl-speculator sweep`...]
#
# BASE       meta-llama/Llama-3.2-1B-Instruct, or any other base
# DATA       ShareGPT-style chat: whatever `verl-speculator prepare` reads, or a directory with its train.parquet and
#            val.parquet
# PROMPTS    prompts to decode; without it the rows that DATA holds out
# OUT_OF_DOMAIN  a second held-out text, such as HuggingFaceFW/fineweb:sample-10BT; without it none
# STEPS      of each training; 500
#
#   BASE=Qwen/Qwen2.5-0.5B-Instruct DATA=data/sharegpt examples/run_sweep_chat_layers.sh sweeps/layers \
#       --train head,head_and_block --temperatures 1,2 --nproc 4
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
out=$1
shift
base=${BASE:-meta-llama/Llama-3.2-1B-Instruct}
data=${DATA:-Aeala/ShareGPT_Vicuna_unfiltered}
steps=${STEPS:-500}

if [ ! -f "$data/train.parquet" ]; then
    [ -f "$out/data/train.parquet" ] ||
        "$python" -m verl_speculator prepare "$data" --out "$out/data" --val-rows 200 --max-rows 50000
    data=$out/data
fi
texts=(--text "chat=$data/val.parquet")
if [ -n "${OUT_OF_DOMAIN:-}" ]; then
    other=$OUT_OF_DOMAIN
    if [ ! -f "$other" ] || [ "${other##*.}" != parquet ]; then
        [ -f "$out/out_of_domain/val.parquet" ] ||
            "$python" -m verl_speculator prepare "$other" --format text --out "$out/out_of_domain" \
                --val-rows 200 --max-rows 400
        other=$out/out_of_domain/val.parquet
    fi
    texts+=(--text "out_of_domain=$other")
fi

# The last layer of each quarter, and all: {3, 7, 11, 15} and 0…15 of sixteen.
layers=$("$python" -c "import sys
from transformers import AutoConfig
sys.stdout.write(str(AutoConfig.from_pretrained(sys.argv[1]).get_text_config().num_hidden_layers))" "$base")
quarters=$(for i in 1 2 3 4; do echo $((layers * i / 4 - 1)); done | awk '$1 >= 0' | uniq | paste -sd,)

for walk in "$quarters" "range(0,$layers)"; do
    # A layer that fails (exit code 1) is named in the table, and tried again by the next walk.
    code=0
    "$python" -m verl_speculator sweep --out "$out" --base "$base" \
        --train-files "$data/train.parquet" --prompts "${PROMPTS:-$data/val.parquet}" "${texts[@]}" \
        --exit-layers "$walk" \
        --set model.speculator.method=early_exit --set model.speculator.loss=kl \
        --set "trainer.total_training_steps=$steps" --set data.truncation=right \
        --set data.train_batch_size=32 --set optim.lr=1e-3 \
        --evaluation num_prompts=40 --evaluation num_texts=100 --evaluation max_new_tokens=128 "$@" || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi
done
exit "$code"
