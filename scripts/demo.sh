#!/usr/bin/env bash
# The whole system on one small machine: prompts -> live vLLM teacher -> student, judged, with a report.
#
#   make demo                                 as is
#   make demo_all                             with every loss on, and rows that hold their responses beside the prompts
#   scripts/demo.sh [all] train.learning_rate=1e-3   with other options (any key of raykd/config.py)
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
started=$(date +%s)

configs=(configs/demo.yaml)
run=demo
if [ "${1:-}" = all ]; then
    shift
    configs+=(configs/demo_all.yaml)
    run=demo-all
fi

scripts/demo_rows.sh
rm -rf "runs/$run"
$python -m raykd.train --config "${configs[@]}" "$@"
$python -m raykd.evaluate --config "${configs[@]}" "$@"
echo "The demo took $((($(date +%s) - started) / 60)) min $((($(date +%s) - started) % 60)) s. Report: runs/$run/report/report.html"
