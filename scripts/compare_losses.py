"""KD against hard labels: the same student, prompts and tokens, several seeds; exact calls and held-out KL over tokens.

In:  configs/demo.yaml and the demo's prompts. Out: a table on the screen and bench/compare_losses.json.

    python scripts/compare_losses.py [--seeds 3] [--points 4] [key=value …]

Every run is an ordinary `python -m raykd.train`; they share one cache of the teacher's output, so the teacher answers once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raykd.cli import load_config, start_ray
from raykd.data.sources import prepare_prompts
from raykd.evaluation.models import ModelFiles
from raykd.evaluation.runner import evaluate
from raykd.tracing import quiet_ray
from raykd.training.checkpoint import read_state
from raykd.training.preflight import num_steps

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "compare"
ALL_OFF = {"loss.kd": 0, "loss.ce_teacher": 0, "loss.tool_name": 0, "loss.json_argument": 0, "loss.integration_copy": 0}
VARIANTS: Mapping[str, Mapping[str, float]] = {
    "kd + process": {},  # the losses of configs/demo.yaml
    "ce_teacher": ALL_OFF | {"loss.ce_teacher": 1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--points", type=int, default=4, help="checkpoints of each run that are judged")
    parser.add_argument("overrides", nargs="*", help="options of every run")
    args = parser.parse_args()
    runs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]
    steps = planned_steps(args.overrides)
    every = max(1, steps // args.points)
    for variant, seed in runs:
        train(variant, seed, [*args.overrides, f"train.checkpoint_every={every}", f"train.validate_every={every}"])
    judged = judge(runs, args.overrides)
    rows = curve(judged)
    show(rows)
    target = ROOT / "bench" / "compare_losses.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"runs": judged, "curve": rows}, indent=1))
    return 0


def run_name(variant: str, seed: int) -> str:
    return f"{variant.replace(' + ', '-')}-{seed}"


def options(variant: str, seed: int, overrides: list[str]) -> list[str]:
    own = {
        "run.dir": FOLDER,
        "run.name": run_name(variant, seed),
        "run.seed": seed,
        "data.teacher_cache": FOLDER / "teacher_cache",
        "train.keep_checkpoints": 1000,
        "tracking.tensorboard": False,
        **VARIANTS[variant],
    }
    return [*(f"{key}={value}" for key, value in own.items()), *overrides]


def planned_steps(overrides: list[str]) -> int:
    config = load_config([ROOT / "configs" / "demo.yaml"], options("ce_teacher", 0, overrides))
    quiet_ray()
    start_ray(config)
    FOLDER.mkdir(parents=True, exist_ok=True)
    return num_steps(config, prepare_prompts(config, FOLDER).num_train)


def train(variant: str, seed: int, overrides: list[str]) -> None:
    """One run as a user would start it; one that is finished already is not repeated."""
    done = FOLDER / run_name(variant, seed) / "done"
    if done.exists():
        return
    resume = ["--resume"] if (done.parent / "config.yaml").exists() else []
    command = [sys.executable, "-m", "raykd.train", "--config", str(ROOT / "configs" / "demo.yaml")]
    print(f"training {variant}, seed {seed}", flush=True)
    subprocess.run([*command, *options(variant, seed, overrides), *resume], check=True, cwd=ROOT)
    done.touch()


def judge(runs: list[tuple[str, int]], overrides: list[str]) -> list[dict[str, Any]]:
    """Every checkpoint of every run, through the same engine on the same held-out prompts."""
    config = load_config([ROOT / "configs" / "demo.yaml"], options("ce_teacher", 0, overrides))
    models, facts = {}, {}
    for variant, seed in runs:
        for checkpoint in (FOLDER / run_name(variant, seed) / "checkpoints").glob("checkpoint-*"):
            name = f"{run_name(variant, seed)}-{checkpoint.name}"
            models[name] = ModelFiles(checkpoint / "student")
            state = read_state(checkpoint)
            facts[name] = {"variant": variant, "seed": seed, "step": state["step"], "tokens": state["response_tokens"]}
    results = evaluate(config, models, FOLDER / "judged")
    return [
        fact | {metric: results.models[name].metrics[metric].value for metric in ("exact_call", "kl")}
        for name, fact in facts.items()
    ]


def curve(judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, by variant and step."""
    rows = []
    for step in sorted({entry["step"] for entry in judged}):
        for variant in VARIANTS:
            found = [entry for entry in judged if (entry["step"], entry["variant"]) == (step, variant)]
            row: dict[str, Any] = {"step": step, "variant": variant, "seeds": len(found)}
            for key in ("tokens", "exact_call", "kl"):
                values = [entry[key] for entry in found]
                row[key] = statistics.mean(values)
                row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("| response tokens | losses | exact call | held-out KL to the teacher (nats) |")
    print("|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['tokens']:,.0f} | {row['variant']} | {row['exact_call']:.3f} ± {row['exact_call_std']:.3f} | "
            f"{row['kl']:.4f} ± {row['kl_std']:.4f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
