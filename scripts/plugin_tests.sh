#!/usr/bin/env bash
# Tests of the LeRobot plugin in a virtual environment of their own: LeRobot 0.6 needs Python 3.12, and
# another torch and transformers than the base package is developed with.
# Says why where it cannot run. SF_SKIP_PLUGIN=1 leaves it out; PLUGIN_VENV is where the environment lies,
# PLUGIN_PYTHON the Python to use.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${PLUGIN_VENV:-.venv-plugin}"

skip() { echo "plugin tests: not run: $1"; exit 0; }

[ "${SF_SKIP_PLUGIN:-0}" = 1 ] && skip "SF_SKIP_PLUGIN=1"
python="${PLUGIN_PYTHON:-}"
for candidate in python3.12 python3.13 python3; do
  [ -n "$python" ] && break
  # A shim of a version manager may exist and not run.
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then python=$candidate; fi
done
if [ -z "$python" ]; then # pyenv keeps versions that are not on the path
  python=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python 2>/dev/null | head -n 1 || true)
fi
[ -n "$python" ] || skip "LeRobot 0.6 needs Python 3.12, and none was found (set PLUGIN_PYTHON)"

if [ ! -f "$venv/.stamp" ]; then
  echo "plugin tests: installing LeRobot into $venv (a few minutes; it brings its own torch)"
  free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge 12 ] || skip "LeRobot's dependencies need 12 GB of disk, $free GB are free"
  "$python" -m venv "$venv"
  # A package index that offers CPU builds of torch is used where there is one; the versions are LeRobot's.
  limit="${PLUGIN_INSTALL_SECONDS:-600}"
  "$venv/bin/python" -m pip install -qq --upgrade pip || true
  timeout "$limit" "$venv/bin/python" -m pip install -qq --prefer-binary \
    'lerobot[training,pi,smolvla,xvla,eo1,peft]>=0.6,<0.7' 'pytest>=8' 'pytest-timeout>=2.3' 'tyro>=0.9' 'rich>=13.7' 'msgpack>=1.0.5' 'websockets>=15' ||
    skip "LeRobot could not be installed in $limit s (PLUGIN_INSTALL_SECONDS); what went wrong, if not the time, stands above"
  touch "$venv/.stamp"
fi
"$venv/bin/python" -m pip install -qq --no-deps --editable . --editable plugin
HF_HUB_OFFLINE=1 "$venv/bin/python" -m pytest -c plugin/pyproject.toml --rootdir=. plugin/tests tests/students/test_pi0.py \
  tests/students/test_pi0_golden.py "$@"
echo "plugin tests: passed"
