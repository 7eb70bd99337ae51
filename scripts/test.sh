#!/usr/bin/env bash
# Makes or reuses .venv, installs, then runs the linter, the type checker and the whole test suite.
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/test_lora.py  pytest arguments go through
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/install.sh"
install dev
cd "$root"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1   # two test processes, a thread each
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile -ra "$@"
