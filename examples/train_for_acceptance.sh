#!/usr/bin/env bash
# A speculator for what the base itself says: its answers to the prompts of a parquet, then training by the recipe of
# examples/recipes/acceptance.txt. Started again, it goes on where it stopped.
#
#   examples/train_for_acceptance.sh <nproc> <save_path> BASE TRAIN.parquet [hydra overrides...]
#   REGENERATE="--max-new-tokens 1024" examples/train_for_acceptance.sh 2 ./speculator BASE train.parquet optim.lr=1e-3
#
# REGENERATE: options of `verl-speculator regenerate`. PYTHON: the interpreter.
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nproc=$1 save_path=$2 base=$3 train=$4
shift 4
answers=$save_path.answers.parquet
if [ ! -e "$answers" ]; then
    read -ra options <<<"${REGENERATE:-}"
    "${PYTHON:-python3}" -m verl_speculator regenerate --base "$base" --data "$train" --out "$answers" "${options[@]}"
fi
mapfile -t recipe < <(grep -v '^#' "$here/recipes/acceptance.txt")
exec "$here/../run_speculator_training.sh" "$nproc" "$save_path" "model.partial_pretrain=$base" \
    "data.train_files=$answers" "${recipe[@]}" "$@"
