#!/usr/bin/env bash
# Train a speculator: ./run_speculator_training.sh <nproc_per_node> <save_path> [hydra overrides...]
# PYTHON names another interpreter; without it, python3 if it has the package's needs, else the one in .venv.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("verl") and u.find_spec("torch")))' \
        2>/dev/null && [ -x "$here/.venv/bin/python" ]; then
        PYTHON=$here/.venv/bin/python
    fi
fi
exec "$PYTHON" -m verl_speculator.preflight.launch "$@"
