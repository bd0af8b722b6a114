"""Time and memory of the head operation on one GPU, beside bare GEMMs and naive PyTorch, at sizes of large vocabularies.

    python scripts/bench_gpu.py --out bench           writes bench_gpu_head.json
    ... --device cpu --tiny                           a trial of the same code on any machine; its figures say nothing

Variants take turns inside one process, timed by CUDA events, behind a flush of the L2 cache; figures are medians. All are
forward and backward of one loss (scripts/bench_head.py), in bfloat16, with the gradients of hidden states and weight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_head import (
    ROOF,
    Inputs,
    Shape,
    loss_of,
    make_inputs,
    naive_loss,
    relative_error,
    run_gemms,
    run_gradient_in_forward,
    run_naive,
    run_recompute,
)
from torch import Tensor
from torch.nn import functional

from raykd.losses import head, head_triton

GIB = 1 << 30
Figures = dict[str, Any]
Run = Callable[[], object]


# --- measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where to measure, how often, and at which sizes."""

    device: str
    repeats: int
    tiny: bool

    def in_turn(self, runs: Mapping[str, Run], warmup: int = 2) -> dict[str, Figures]:
        """Median milliseconds of each, and GiB that it takes at most beyond what was there before."""
        samples: dict[str, list[float]] = {name: [] for name in runs}
        extra: dict[str, float] = {}
        flush = torch.empty((1 if self.tiny else 256) << 20, dtype=torch.uint8, device=self.device)
        for repeat in range(warmup + self.repeats):
            for name, run in runs.items():
                flush.zero_()
                milliseconds, extra[name] = self._once(run)
                if repeat >= warmup:
                    samples[name].append(milliseconds)
        return {
            name: {"ms": statistics.median(times), "extra_gib": extra[name], "samples_ms": times}
            for name, times in samples.items()
        }

    def _once(self, run: Run) -> tuple[float, float]:
        if self.device == "cpu":
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e3, 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / GIB


def row(name: str, *cells: str) -> None:
    print(f"{name:36}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


# --- the head operation ---------------------------------------------------------------------------------------------------


def from_scratch(run: Callable[[Inputs], object], data: Inputs) -> Run:
    """The run on fresh gradients."""

    def once() -> None:
        data.hidden.grad = data.weight.grad = None
        run(data)

    return once


def head_report(bench: Bench) -> Figures:
    vocab, rows, widths = (3000, 64, (16, 32)) if bench.tiny else (151_936, 8192, (1024, 2048, 4096))
    shape = Shape(rows, widths[1], vocab, 64, "bfloat16", bench.device)
    report: Figures = {"accuracy": accuracy(replace(shape, rows=rows // 4))}
    row("accuracy beside float64 (K10)", *report["accuracy"])
    row("", *(f"{value:.1e}" for value in report["accuracy"].values()))
    report["time"] = {}
    titles = ("GEMMs ms", "ours", "/ GEMMs", "no kernels", "recompute", "naive", "naive/ours", "compiled", "comp./ours")
    row("N, H, V, K", *titles)
    for width in widths:
        report["time"][str(width)] = found = head_times(bench, replace(shape, hidden=width))
        ms = {name: figures["ms"] for name, figures in found.items()}
        ours, roof, naive, compiled = ms["gradient_in_forward"], ms[ROOF], ms["naive"], ms.get("naive_compiled", np.nan)
        others = (ms["without kernels"], ms["recompute"], naive, naive / ours, compiled, compiled / ours)
        row(f"{rows}, {width}, {vocab}, 64 (K1-K4)", *(f"{cell:.2f}" for cell in (roof, ours, ours / roof, *others)))
    report["memory"] = head_memory(bench, shape)
    report["variations"] = head_variations(bench, shape)
    report["settings"] = head_settings(bench, shape)
    if bench.device != "cpu":
        report["parts"] = head_parts(bench, shape)
        report["kernels"] = head_kernels(shape)
    return report


def head_times(bench: Bench, shape: Shape) -> dict[str, Figures]:
    data = make_inputs(shape)
    runs = {ROOF: run_gemms, "gradient_in_forward": run_gradient_in_forward, "recompute": run_recompute, "naive": run_naive}
    runs["without kernels"] = without_kernels
    if bench.device != "cpu" and shape.hidden == 2048:  # compiling takes its time
        compiled = torch.compile(naive_loss, dynamic=False)
        runs["naive_compiled"] = lambda data: compiled(data).backward()
    found = bench.in_turn({name: from_scratch(run, data) for name, run in runs.items()})
    torch.cuda.empty_cache()
    return found


def without_kernels(data: Inputs) -> None:
    """Ours with PyTorch's own softmax instead of head_triton.py."""
    with patch.object(head, "_has_kernels", return_value=False):
        run_gradient_in_forward(data)


def accuracy(shape: Shape) -> dict[str, float]:
    """Errors of our loss and gradients in bfloat16 beside float64 autograd on the same inputs."""
    data = make_inputs(shape)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (data.hidden, data.weight)]
    exact = replace(data, hidden=leaves[0], weight=leaves[1])
    exact = replace(exact, teacher_logprobs=data.teacher_logprobs.double(), teacher_log_tail=data.teacher_log_tail.double())
    logprobs = (exact.hidden @ exact.weight.T).log_softmax(dim=1)
    tail = logprobs.scatter(1, data.ids[:, :-1], -torch.inf).logsumexp(dim=1)
    wanted = loss_of(exact, logprobs.gather(1, data.ids), tail, slice(None))
    wanted.backward()
    loss = run_gradient_in_forward(data)
    found = {"loss": relative_error(loss, wanted.detach())}
    for name in ("hidden", "weight"):
        ours, theirs = getattr(data, name).grad, getattr(exact, name).grad
        found[f"d_{name}"] = relative_error(ours, theirs)
        found[f"1 - cos {name}"] = 1 - functional.cosine_similarity(ours.double().flatten(), theirs.flatten(), dim=0).item()
    return found


def head_memory(bench: Bench, shape: Shape) -> Figures:
    """Peak GiB beyond inputs and gradients' owners at growing numbers of rows, ours and, where it fits, naive (K7)."""
    found: Figures = {}
    row("peak GiB (K7)", "ours", "recompute", "naive", "naive/ours")
    for rows in (shape.rows, 4 * shape.rows, 16 * shape.rows):
        data = make_inputs(replace(shape, rows=rows))
        runs = {"gradient_in_forward": run_gradient_in_forward, "recompute": run_recompute}
        if bench.device == "cpu" or 20 * rows * shape.vocab < torch.cuda.mem_get_info()[0]:
            runs["naive"] = run_naive
        once = replace(bench, repeats=1)
        gib = {
            name: figures["extra_gib"]
            for name, figures in once.in_turn(
                {name: from_scratch(run, data) for name, run in runs.items()}, warmup=1
            ).items()
        }
        found[str(rows)] = gib
        naive = gib.get("naive", np.nan)
        cells = (gib["gradient_in_forward"], gib["recompute"], naive, naive / max(gib["gradient_in_forward"], 1e-9))
        row(f"{rows} rows", *(f"{cell:.2f}" for cell in cells))
        del data
        torch.cuda.empty_cache()
    return found


def head_variations(bench: Bench, shape: Shape) -> Figures:
    """Time beside the standard case: other divergences, no cross-entropy, other K, only some rows (K8, K9, K11)."""
    data, wide, narrow = (make_inputs(replace(shape, top_k=top_k)) for top_k in (64, 128, 16))
    kd = run_gradient_in_forward
    runs: dict[str, Run] = {
        "forward_kl + ce": from_scratch(kd, data),
        **{f"{name} + ce": from_scratch(partial(kd, divergence=name), data) for name in ("reverse_kl", "jsd", "tvd")},
        "forward_kl": from_scratch(partial(kd, ce=False), data),
        "K=16": from_scratch(kd, narrow),
        "K=128": from_scratch(kd, wide),
        "half of the rows": from_scratch(partial(some_rows, every=2), data),
        "a quarter of the rows": from_scratch(partial(some_rows, every=4), data),
    }
    found = replace(bench, repeats=4 * bench.repeats).in_turn(runs)
    standard = found["forward_kl + ce"]["samples_ms"]
    for name, figures in found.items():
        # Ratios of samples of one round, so that slow spells of the machine cancel.
        pairs = zip(figures["samples_ms"], standard, strict=True)
        figures["over_standard"] = statistics.median(own / other for own, other in pairs)
        row(f"{name} (K8, K9, K11)", f"{figures['ms']:.2f} ms", f"{figures['over_standard']:.3f}")
    torch.cuda.empty_cache()
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    **{f"logits of {rows} rows": {"_KERNEL_LOGITS_ROWS": rows} for rows in (256, 1024, 2048)},
    **{f"gradients of {mib} MiB": {"_KERNEL_CHUNK_BYTES": mib << 20} for mib in (320, 640, 2560)},
    "640 MiB, 256 rows": {"_KERNEL_CHUNK_BYTES": 640 << 20, "_KERNEL_LOGITS_ROWS": 256},
    **{f"blocks of {b}, {w} warps": {"_BLOCK": b, "_WARPS": w} for b, w in ((2048, 4), (2048, 8), (4096, 16), (8192, 16))},
    "bfloat16 logits": {"_KERNEL_LOGITS_DTYPE": torch.bfloat16},
}
"""Constants of head.py and head_triton.py, to be chosen by what follows from them."""


def head_settings(bench: Bench, shape: Shape) -> Figures:
    """Time beside the GEMMs, peak memory and loss under other constants."""
    data, losses = make_inputs(shape), {}

    def run(name: str) -> None:
        with contextlib.ExitStack() as stack:
            for constant, value in SETTINGS[name].items():
                stack.enter_context(patch.object(head if hasattr(head, constant) else head_triton, constant, value))
            losses[name] = run_gradient_in_forward(data)

    runs = {name: from_scratch(lambda _, name=name: run(name), data) for name in SETTINGS}
    found = bench.in_turn({ROOF: from_scratch(run_gemms, data), **runs})
    row("setting", "ms", "/ GEMMs", "peak GiB", "loss off by")
    for name, figures in found.items():
        pairs = zip(figures["samples_ms"], found[ROOF]["samples_ms"], strict=True)
        figures["over_gemms"] = statistics.median(own / roof for own, roof in pairs)
        figures["loss_error"] = relative_error(losses[name], losses["as they are"]) if name in losses else 0.0
        cells = (figures["ms"], figures["over_gemms"], figures["extra_gib"])
        row(name, *(f"{cell:.3f}" for cell in cells), f"{figures['loss_error']:.1e}")
    torch.cuda.empty_cache()
    return found


def head_parts(bench: Bench, shape: Shape) -> Figures:
    """Every part by itself, times how often it runs: what the time is made of."""
    data = make_inputs(shape)
    hidden, weight, ids, support = data.hidden.detach(), data.weight.detach(), data.ids, data.support
    chunk = head.even_slices(0, shape.rows, head._choose_rows(None, hidden, weight))[0].stop
    few = min(chunk, head._KERNEL_LOGITS_ROWS)
    logits = torch.empty(few, shape.vocab, device=bench.device)
    gradient = torch.zeros(chunk, shape.vocab, dtype=hidden.dtype, device=bench.device)
    of_weight = torch.zeros(weight.shape, device=bench.device)
    added = {"out_dtype": torch.float32, "out": of_weight}
    chunks, parts = shape.rows / chunk, shape.rows / few

    def loss() -> None:
        selected, tail = torch.zeros(ids[:chunk].shape, device=bench.device), torch.zeros(chunk, device=bench.device)
        leaves = selected.requires_grad_(), tail.requires_grad_()
        logprobs, log_tail, _ = head._normalise(*leaves, support[:chunk])
        torch.autograd.grad(loss_of(data, logprobs, log_tail, slice(0, chunk)), leaves)

    runs: dict[str, tuple[float, Run]] = {
        "logits, float32": (parts, lambda: torch.mm(hidden[:few], weight.T, out_dtype=torch.float32, out=logits)),
        "(logits, bfloat16)": (0, lambda: torch.mm(hidden[:few], weight.T, out=gradient[:few])),
        "split_tail": (parts, lambda: head_triton.split_tail(logits, ids[:few], support[:few], gradient[:few])),
        "loss and its gradient": (chunks, loss),
        "dX": (chunks, lambda: gradient @ weight),
        "dW, first": (1, lambda: torch.addmm(of_weight, gradient.T, hidden[:chunk], beta=0.0, **added)),
        "dW, added": (chunks - 1, lambda: torch.addmm(of_weight, gradient.T, hidden[:chunk], **added)),
        "dW to bfloat16": (1, lambda: of_weight.to(torch.bfloat16)),
        "times the gradient above": (1, lambda: weight.mul_(1.0)),
    }
    torch.mm(hidden[:few], weight.T, out_dtype=torch.float32, out=logits)
    found = bench.in_turn({name: run for name, (_, run) in runs.items()})
    row("part", "ms", "times", "together")
    for name, figures in found.items():
        figures["times"] = runs[name][0]
        figures["together_ms"] = figures["ms"] * figures["times"]
        row(name, f"{figures['ms']:.3f}", f"{figures['times']:g}", f"{figures['together_ms']:.2f}")
    row("sum", "", "", f"{sum(figures['together_ms'] for figures in found.values()):.2f}")
    torch.cuda.empty_cache()
    return found


def head_kernels(shape: Shape) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of every kernel of one run, the longest first."""
    data = make_inputs(shape)
    run_gradient_in_forward(data)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_gradient_in_forward(data)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    found = {event.key: (event.self_device_time_total / 1e3, event.count) for event in events}
    for name, (milliseconds, calls) in list(found.items())[:14]:
        row(name[-70:].ljust(72), f"{milliseconds:.3f}", str(calls))
    row("all kernels", f"{sum(ms for ms, _ in found.values()):.2f}", str(sum(calls for _, calls in found.values())))
    return found


def some_rows(data: Inputs, every: int) -> Tensor:
    """The loss on every second (or so) row: the others are dropped before the head, as prompts are."""
    chosen = torch.arange(0, len(data.ids), every, device=data.ids.device)
    rest = {name: value.index_select(0, chosen) for name, value in vars(data).items() if name != "weight"}
    return run_gradient_in_forward(Inputs(weight=data.weight, **rest))


def run_bench(part: str, report_of: Callable[[Bench], Figures], title: str | None) -> None:
    """What both scripts have in common: arguments, and the report in a file."""
    parser = argparse.ArgumentParser(description=title, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    bench = Bench(args.device, args.repeats, args.tiny)
    machine = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}", flush=True)
    report = report_of(bench) | {"machine": machine, "torch": torch.__version__}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"bench_gpu_{part}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_bench("head", head_report, __doc__)
