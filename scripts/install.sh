# shellcheck shell=bash disable=SC2154  # $root is the caller's
# Sourced by demo.sh and test.sh: makes .venv once and installs the package with the tested versions.
venv="$root/.venv"
cd "$root"  # -m imports what lies in the current folder
install() {  # install EXTRA: the package with that group of extras, unless this was done with the same files before
  local wanted
  wanted="$1 $(cat "$root/setup.py" "$root/constraints.txt" | cksum)"
  [[ "$(cat "$venv/installed-$1" 2>/dev/null)" == "$wanted" ]] && return
  if [[ ! -x "$venv/bin/python" ]]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
      { echo "$(python3 --version) is too old: Python 3.10 or newer is needed." >&2; exit 2; }
    echo "Making .venv"
    python3 -m venv "$venv"
  fi
  echo "Installing the package and the tested versions of its libraries into .venv (minutes, once)"
  "$venv/bin/python" -m pip install --quiet --upgrade pip setuptools wheel
  # torch first and alone: exactly the pinned release, whatever else asks for it
  "$venv/bin/python" -m pip install --quiet "$(grep '^torch==' "$root/constraints.txt")"
  "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "${root}[$1]"
  echo "$wanted" > "$venv/installed-$1"
}
