#!/usr/bin/env bash
# Make .venv with everything raykd needs. Idempotent: with nothing to do it ends at once.
#
#   scripts/setup.sh              picks gpu when an NVIDIA GPU answers, else cpu
#   RAYKD_DEVICE=cpu|gpu          overrides the choice
#   PYTHON=python3.12             overrides the interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
device=${RAYKD_DEVICE:-}
if [ -z "$device" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=gpu; else device=cpu; fi
fi
case "$device" in cpu | gpu) ;; *) echo "RAYKD_DEVICE is '$device', expected cpu or gpu" >&2; exit 1 ;; esac

# The stamp holds what was installed for, then the versions; it is written last, so that a broken install is repeated.
stamp=.venv/raykd-setup
wanted="$device $(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)"
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
    tail -n +2 "$stamp"
    exit 0
fi

"$python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"found Python {sys.version.split()[0]}, raykd needs 3.11 or newer: set PYTHON=python3.11")
PY
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check"
echo "Installing raykd for $device into .venv (several minutes the first time)"
if [ "$device" = cpu ]; then
    # torch first and alone: a later, wider requirement would otherwise choose a build for CUDA.
    $pip install --quiet "torch==2.13.0"
fi
$pip install --quiet --editable ".[$device,dev]"
if [ "$device" = cpu ]; then
    # Not needed for text models, and their published builds, made for CUDA torch, break transformers on CPU torch.
    $pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi

versions=$(.venv/bin/python - <<'PY'
import os
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
import ray
import torch
import transformers
import vllm
print(f"raykd is set up: torch {torch.__version__}, vllm {vllm.__version__}, ray {ray.__version__}, transformers {transformers.__version__}")
PY
)
printf '%s\n%s\n' "$wanted" "$versions" >"$stamp"
echo "$versions"
