#!/usr/bin/env bash
# The whole system on one small machine: prompts -> live vLLM teacher -> student, judged, with a report.
#
#   make demo                                 as is
#   scripts/demo.sh train.learning_rate=1e-3  with other options (any key of raykd/config.py)
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
started=$(date +%s)

[ -f runs/demo-prompts/train.jsonl ] || $python -m raykd.demo.corpus --out runs/demo-prompts --train 7500
rm -rf runs/demo
$python -m raykd.train --config configs/demo.yaml "$@"
$python -m raykd.evaluate --config configs/demo.yaml "$@"
echo "The demo took $((($(date +%s) - started) / 60)) min $((($(date +%s) - started) % 60)) s. Report: runs/demo/report/report.html"
