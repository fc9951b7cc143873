#!/usr/bin/env bash
# The whole way on any machine, in a few minutes on two cores: data, a small base, two speculators, what they reach.
# Everything lands in demo/ (or $DEMO). PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHON=${PYTHON:-python3}
out=${DEMO:-demo}
# glibc hands large tensors back to the kernel at every step otherwise.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=17179869184
rm -rf "$out"
"$PYTHON" examples/demo/make_data.py "$out/data"
"$PYTHON" examples/demo/train_base.py "$out/data/train.parquet" "$out/base"
for method in sum_rnn sum_lstm; do
    VERL_FILE_LOGGER_PATH=$out/$method.jsonl ./run_speculator_training.sh 1 "$out/$method" \
        model.partial_pretrain="$out/base" \
        data.train_files="$out/data/train.parquet" data.val_files="$out/data/val.parquet" \
        data.train_batch_size=32 data.micro_batch_size_per_gpu=16 \
        model.speculator.method=$method model.speculator.n_predict=4 \
        model.speculator.inner_dim=128 model.speculator.emb_dim=128 model.speculator.proj_dim=128 \
        model.speculator.tie_lstm_embs=true \
        optim.lr=4e-3 trainer.total_epochs=2 trainer.test_freq=-1 trainer.logger=file
done
"$PYTHON" -m verl_speculator inspect "$out/sum_lstm"
"$PYTHON" examples/demo/report.py "$out/sum_rnn.jsonl" "$out/sum_lstm.jsonl"
# What they bring when they serve: the same text in fewer passes.
"$PYTHON" -m verl_speculator evaluate --base "$out/base" --speculator "$out/sum_rnn" --speculator "$out/sum_lstm" \
    --prompts "$out/data/val.parquet" --num-prompts 20 --max-new-tokens 64 --out "$out/evaluation"
