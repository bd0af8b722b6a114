#!/usr/bin/env bash
# One stage: scripts/stage.sh worker|kd|proc|answer|qat [key=value … or --plan, --resume]
#
#   SIZE=demo scripts/stage.sh kd    60 steps of the demo student on 2 cores; then proc, answer, qat; worker stands for itself
#   scripts/stage.sh kd data.prompts=…, then proc, answer, qat: each goes on from the one before in runs/; other recipes than
#   Qwen3-8B -> 0.6B by CONFIG=configs/….yaml
set -euo pipefail
cd "$(dirname "$0")/.."
stage=$1
shift
config=${CONFIG:-configs/qwen3_8b_to_0.6b.yaml}
prefix=runs/
case $stage in
worker) options=(configs/worker_9b.yaml) ;;
kd) options=("$config" run.name=kd) ;;
proc) options=("$config" configs/process_supervision.yaml run.name=proc) before=kd ;;
answer) options=("$config" configs/answer_generation.yaml run.name=answer) before=proc ;;
qat) options=("$config" configs/quant_qat_int8.yaml run.name=qat) before=answer ;;
*)
    echo "stage.sh: found '$stage', expected worker, kd, proc, answer or qat" >&2
    exit 1
    ;;
esac
if [ "${SIZE:-}" = demo ]; then
    prefix=runs/demo-
    scripts/demo_rows.sh
    options=(configs/demo.yaml "run.name=demo-$stage" --steps 60)
    case $stage in
    worker) options+=(student.random_weights=true student.layers=null) ;;
    proc) options+=(stage=process loss.process_share=0.3) ;;
    answer)
        options+=(stage=answer data.completions=recorded loss.ce_truth=1 data.prompts=runs/demo-prompts/answers.jsonl)
        options+=(data.held_out=runs/demo-prompts/held_out_answers.jsonl)
        ;;
    qat) options+=(stage=qat loss.self_kd=1 train.learning_rate=3e-4) ;;
    esac
fi
exec .venv/bin/python -m raykd.train --config "${options[@]}" ${before:+"init.from=$prefix$before"} "$@"
