"""What INT8 training costs, recovers and serves, on the demo teacher as the student: bench/bench_int8.json.

In:  raykd/demo/teacher and conversations of the demo world. Out: a table on stdout and the JSON.

    step       time of a training step on int8 arithmetic beside a float one, in turn, so that load falls on both alike
    recovery   of the divergence that INT8 costs a copy with outliers in its activations, which 120 steps win back: with the
               grid that is served, with another grid, and without a teacher (likelihood of the text)
    size       bytes of the INT8 folder beside float32 and bfloat16
    served     log-probabilities out of vLLM beside the training arithmetic, with what last bits alone make of them
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from raykd.demo.corpus import generate_conversations
from raykd.demo.outliers import add_outliers
from raykd.evaluation.serving import check_serving
from raykd.stage_config import QuantizationConfig
from raykd.student.int8_arithmetic import ActivationGrid
from raykd.student.int8_files import export_int8, weight_files
from raykd.student.quantization import Int8Linear, prepare_int8
from teacher_serving.config import VllmTeacherConfig

TEACHER = Path(__file__).parents[1] / "raykd" / "demo" / "teacher"
LENGTH = 128
OUTLIERS = (64.0, 128.0)
"""Powers of two by which channels stick out: by the first INT8 costs a hundredth of a nat, by the second all there is."""
SYMMETRIC, ASYMMETRIC = QuantizationConfig(), QuantizationConfig(symmetric_activations=False)


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).train()


def conversations(num: int, split: str) -> list[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    rows = generate_conversations(num, 5, split)
    encoded: Any = [tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=True) for row in rows]
    return [np.array(row["input_ids"]) for row in encoded]


def text(num: int, split: str) -> Tensor:
    """The first LENGTH tokens of all conversations that are as long, [R, LENGTH]."""
    return torch.from_numpy(np.stack([ids[:LENGTH] for ids in conversations(num, split) if len(ids) >= LENGTH]))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def kl_of(model: Any, teacher: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = logits_of(teacher, ids).log_softmax(-1)
    return (wanted.exp() * (wanted - logits_of(model, ids).log_softmax(-1))).sum(-1).mean()


def nll_of(model: Any, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: Any, loss_of: Callable[[Tensor], Tensor], rows: Tensor, *, steps: int, sequences: int, rate: float) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10)
        loss_of(rows[torch.randint(0, len(rows), (sequences,))]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def measure_step(rows: Tensor, sequences: int, repeats: int) -> dict[str, Any]:
    models = {"float": load(), "int8": load()}
    prepare_int8(models["int8"], SYMMETRIC)
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            started = time.process_time()
            nll_of(model, rows[:sequences]).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat >= 2:  # the first ones warm up
                samples[name].append(time.process_time() - started)
    ratios = [int8 / plain for int8, plain in zip(samples["int8"], samples["float"], strict=True)]
    median = {f"{name}_cpu_s": statistics.median(times) for name, times in samples.items()}
    return {**median, "overhead": statistics.median(ratios), "tokens": sequences * LENGTH}


def measure_recovery(
    rows: Tensor, held_out: Tensor, factor: float, *, steps: int, sequences: int, rate: float
) -> dict[str, Any]:
    own = load()

    def prepared(config: QuantizationConfig) -> Any:
        model = add_outliers(copy.deepcopy(own), factor)
        prepare_int8(model, config)
        return model

    @torch.no_grad()
    def figures(model: Any) -> dict[str, float]:
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.grid = ActivationGrid()  # the one that is served
        kl = statistics.fmean(kl_of(model, own, part).item() for part in held_out.split(16))
        return {"kl": kl, "nll_rises_by": nll_of(model, held_out).item() - nll_of(own, held_out).item()}

    after_training = figures(prepared(SYMMETRIC))
    found = {"post_training": after_training}
    for name, config, with_teacher in (
        ("matched", SYMMETRIC, True),
        ("asymmetric_served_symmetric", ASYMMETRIC, True),
        ("without_teacher", SYMMETRIC, False),
    ):
        model = prepared(config)
        loss_of = (lambda ids, m=model: kl_of(m, own, ids)) if with_teacher else (lambda ids, m=model: nll_of(m, ids))
        train(model, loss_of, rows, steps=steps, sequences=sequences, rate=rate)
        found[name] = figures(model)
        found[name]["recovered"] = 1 - found[name]["kl"] / after_training["kl"]
        print(f"outliers x{factor:g}, {name}: {found[name]}", flush=True)
    return {**found, "steps": steps, "tokens_per_step": sequences * LENGTH, "learning_rate": rate}


def measure_size_and_serving(folder: Path) -> dict[str, Any]:
    model, tokenizer = load(), AutoTokenizer.from_pretrained(TEACHER)
    export_int8(model, folder / "float32", SYMMETRIC, dtype=torch.float32)
    export_int8(model, folder / "bfloat16", SYMMETRIC, dtype=torch.bfloat16)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    size = {}
    for name, element_bytes in (("float32", 4), ("bfloat16", 2)):
        tokenizer.save_pretrained(folder / name)
        size[f"of_{name}"] = weight_files(folder / name)[0].stat().st_size / (element_bytes * num_parameters)
    sequences = [row[:300] for row in conversations(24, "held_out")]
    served = {}
    for name in ("float32", "bfloat16"):
        settings = {"model": str(folder / name), "dtype": name, "max_model_len": 400, "max_num_seqs": 24, "device": "cpu"}
        engine = VllmTeacherConfig.model_validate(settings)
        report = asdict(check_serving(engine, sequences, float_folder=TEACHER))
        served[name] = report | {"int8_layers": len(report["int8_layers"])}
        print(f"served {name}: {served[name]}", flush=True)
    return {"size": size, "served": served}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sequences", type=int, default=16, help=f"of {LENGTH} tokens, in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench/bench_int8.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    rows, held_out = text(2000, "train"), text(200, "held_out")[:64]
    report: dict[str, Any] = {"step": measure_step(rows, args.sequences, args.repeats)}
    print(f"step: {report['step']}", flush=True)
    settings = {"steps": args.steps, "sequences": args.sequences, "rate": args.learning_rate}
    report["recovery"] = {f"x{factor:g}": measure_recovery(rows, held_out, factor, **settings) for factor in OUTLIERS}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        report |= measure_size_and_serving(Path(folder))
    report |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    report["load_average"] = os.getloadavg()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
