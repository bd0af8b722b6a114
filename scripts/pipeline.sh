#!/usr/bin/env bash
# kd -> process -> answer -> qat of the demo student, exported, served by vLLM, judged. Started again, it goes on where it stopped.
#
#   make pipeline                                  as is, about 20 minutes on 2 cores
#   scripts/pipeline.sh train.learning_rate=1e-3   with other options for all stages (any key of raykd/config.py)
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
runs=runs/pipeline
started=$(date +%s)

scripts/demo_rows.sh

$python -m raykd.train --config configs/pipeline.yaml "$@"

# The float student as it is, after training in INT8, and without it: the last float checkpoint quantised as it stands.
export_once() { # FROM OUT OPTIONS
    [ -d "$2" ] || $python -m raykd.export --from "$1" --out "$2" "${@:3}"
}
export_once "$runs-answer" "$runs-export/float" --format float32 --check
export_once "$runs-answer" "$runs-export/int8-post-training" --format int8 --check
export_once "$runs-qat" "$runs-export/int8" --check

# "student" is the INT8 student of the last stage; the table has the teacher first.
$python -m raykd.evaluate --config "$runs-qat/config.yaml" --models \
    "int8-post-training=$runs-export/int8-post-training" "float=$runs-answer" "process=$runs-process" "kd=$runs-kd"
echo "The pipeline took $((($(date +%s) - started) / 60)) min $((($(date +%s) - started) % 60)) s. Report: $runs-qat/report/report.html"
