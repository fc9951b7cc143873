#!/bin/sh
# Train a speculator: ./run_speculator_training.sh <nproc_per_node> <save_path> [hydra overrides...]
# PYTHON names another interpreter; without it, python3 if it has the package's needs, else the one in .venv.
set -eu
here=$(dirname "$(readlink -f "$0")")
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
has_needs() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("verl") and u.find_spec("torch")))' 2>/dev/null
}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if ! has_needs "$PYTHON"; then
        PYTHON=$here/.venv/bin/python
        if ! has_needs "$PYTHON"; then
            echo "error: python3 has no verl, and there is no $here/.venv that has: run \`make setup\` there, or \`pip install -e $here\`" >&2
            exit 2
        fi
    fi
fi
exec "$PYTHON" -m verl_speculator.preflight.launch "$@"
