#!/usr/bin/env bash
# Makes or reuses .venv, installs, then runs the linter, the type checker and the test suite.
#   bash scripts/test.sh                     the suite
#   bash scripts/test.sh tests/methods/test_lora.py  pytest arguments go through
#   bash scripts/test.sh --all               the suite, then what takes longer: stress runs, the tests of transformers and PEFT
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/help.sh"
source "$root/scripts/install.sh"
all=
[[ "${1:-}" != --all ]] || { all=yes; shift; }
install dev
cd "$root"
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1   # two test processes, a thread each
# A run syncs its files dozens of times, and waits longer for a disk than it computes; in memory a sync takes no time.
# So temporary files are there if 3 GB are free and programs can run there.
if [[ -z "${TMPDIR:-}" ]] && memory="$(mktemp -d /dev/shm/lora-nlu-tests-XXXXXX 2>/dev/null)"; then
  trap 'rm -rf "$memory"' EXIT
  cp "$BASH" "$memory/program"
  free="$(df -Pk "$memory" | awk 'END { print $4 }')"
  if (( free > 3000000 )) && "$memory/program" -c : 2>/dev/null; then export TMPDIR="$memory"; fi
fi
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# in the order of the files: end_to_end/, whose few tests are the longest, starts first
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -ra "$@"
[[ -n "$all" ]] || exit 0
for long in "stress/every_call.py --cases 100 --jobs 2" "stress/at_once.py" "stress/at_once.py --train --rounds 2" \
  "stress/fuzz.py --mutations 100000" "stress/compare.py --cases 5000" "stress/distributed_methods.py" \
  "ops/triton_programs.py interpret all" "ops/triton_programs.py compile all" "foreign/run.py"; do
  echo "== tests/$long"
  # shellcheck disable=SC2086  # a file and its flags
  "$venv/bin/python" tests/$long
done
