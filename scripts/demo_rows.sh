#!/usr/bin/env bash
# The rows of the demo world, made once: runs/demo-prompts/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
rows=runs/demo-prompts
[ -f $rows/train.jsonl ] || $python -m raykd.demo.corpus --out $rows --train 7500
[ -f $rows/offline.jsonl ] || $python -m raykd.demo.offline --out $rows/offline.jsonl --rows 900
[ -f $rows/held_out_offline.jsonl ] || $python -m raykd.demo.offline --out $rows/held_out_offline.jsonl --rows 240 --split held_out
[ -f $rows/answers.jsonl ] || $python -m raykd.demo.answers --out $rows/answers.jsonl
[ -f $rows/held_out_answers.jsonl ] || $python -m raykd.demo.answers --out $rows/held_out_answers.jsonl --answers 300 --split held_out
