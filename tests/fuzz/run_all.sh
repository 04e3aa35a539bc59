#!/usr/bin/env bash
# Fuzz every parser of project files for SECONDS_EACH (default 60): tests/fuzz/run_all.sh PROJECT
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python "$here/run_atheris.py" "$1" list 2>/dev/null | while read -r target; do
  printf '%-28s ' "$target"
  python "$here/run_atheris.py" "$1" "$target" "-max_total_time=${SECONDS_EACH:-60}" -artifact_prefix=/tmp/ </dev/null 2>&1 |
    grep -aE 'Done [0-9]+ runs|Test unit written|Uncaught|Error: ' | tail -3 | tr '\n' ' '
  echo
done
