"""Time and memory of the head operation beside naive PyTorch and beside the bare GEMMs, in one run.

In:  shapes, device. Out: a table on stdout and bench/bench_head.json with every sample.

Every variant computes the same loss, forward KL with a tail bucket plus cross-entropy on the label, and the gradients of the
hidden states and of the head's weight; `gemms` is the roof: the three matrix products and nothing else. Each sample is one
process (CPU), the variants in turn, so that load on the machine and the allocator's history fall on all alike; CPU time is
the trustworthy column. On CUDA the variants take turns inside one process, timed by events. Before anything is timed every
variant must agree with float64 autograd.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raykd.losses.head import HeadRows, head_logprobs, head_loss
from raykd.losses.kd import Divergence, sparse_kd_loss
from raykd.losses.reduction import masked_sum

MIB = 1 << 20
ROOF = "gemms"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    vocab: int
    top_k: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    ids: Tensor  # [N, K+1] the teacher's ids, then the label, which is one of them in every other row
    support: Tensor  # [N, K+1]
    teacher_logprobs: Tensor  # [N, K]
    teacher_log_tail: Tensor  # [N]


@dataclass(frozen=True)
class Sample:
    cpu_s: float
    wall_s: float
    extra_mib: float  # peak memory beyond what was there before the call


def make_inputs(shape: Shape) -> Inputs:
    dtype, device = DTYPES[shape.dtype], shape.device
    generator = torch.Generator(device).manual_seed(0)
    drawn: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(shape.rows, shape.hidden, **drawn)
    weight = torch.randn(shape.vocab, shape.hidden, **drawn) * 2.0 / shape.hidden**0.5
    # Distinct ids per row without sorting [N, V]: one random id per bucket of the vocabulary.
    bucket = shape.vocab // shape.top_k
    offsets = torch.randint(0, bucket, (shape.rows, shape.top_k), **drawn)
    topk_ids = offsets + bucket * torch.arange(shape.top_k, device=device)
    labels = torch.randint(0, shape.vocab, (shape.rows,), **drawn)
    labels[::2] = topk_ids[::2, 0]
    teacher = torch.randn(shape.rows, shape.top_k + 1, **drawn).mul_(2.0).log_softmax(dim=1)
    support = torch.ones(shape.rows, shape.top_k + 1, dtype=torch.bool, device=device)
    support[:, -1] = False
    return Inputs(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(),
        ids=torch.cat([topk_ids, labels[:, None]], dim=1),
        support=support,
        teacher_logprobs=teacher[:, :-1].contiguous(),
        teacher_log_tail=teacher[:, -1].contiguous(),
    )


def loss_of(
    data: Inputs, logprobs: Tensor, log_tail: Tensor, rows: slice, divergence: Divergence = "forward_kl", ce: bool = True
) -> Tensor:
    """Divergence with tail bucket plus cross-entropy, per token of the whole batch."""
    teacher, tail = data.teacher_logprobs[rows], data.teacher_log_tail[rows]
    weight = torch.ones_like(tail)
    loss = sparse_kd_loss(logprobs[:, :-1], log_tail, teacher, tail, weight, divergence=divergence).sum
    return (loss + masked_sum(-logprobs[:, -1], weight).sum if ce else loss) / len(data.ids)


def naive_loss(data: Inputs) -> Tensor:
    logits = data.hidden @ data.weight.T  # alive until the end, as a model's output is in a training loop
    logprobs = logits.float().log_softmax(dim=1)
    selected = logprobs.gather(1, data.ids)
    log_tail = torch.log1p(-selected[:, :-1].exp().sum(dim=1))
    return loss_of(data, selected, log_tail, slice(None))


def run_naive(data: Inputs) -> Tensor:
    loss = naive_loss(data)
    loss.backward()
    return loss.detach()


def run_recompute(data: Inputs) -> Tensor:
    logprobs, log_tail = head_logprobs(data.hidden, data.weight, data.ids, data.support)
    loss = loss_of(data, logprobs, log_tail, slice(None))
    loss.backward()
    return loss.detach()


def run_gradient_in_forward(data: Inputs, divergence: Divergence = "forward_kl", ce: bool = True) -> Tensor:
    def rows_loss(head: HeadRows) -> tuple[Tensor, Tensor]:
        loss = loss_of(data, head.logprobs, head.log_tail, head.rows, divergence, ce)
        return loss, loss.detach()[None]

    loss, _ = head_loss(data.hidden, data.weight, data.ids, data.support, rows_loss)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def run_gemms(data: Inputs) -> None:
    """The roof: logits, dX and dW of one dense [N, V] buffer, no softmax."""
    logits = data.hidden @ data.weight.T
    data.hidden.grad = logits @ data.weight
    data.weight.grad = logits.T @ data.hidden


VARIANTS: dict[str, Callable[[Inputs], Tensor | None]] = {
    ROOF: run_gemms,
    "naive": run_naive,
    "gradient_in_forward": run_gradient_in_forward,
    "recompute": run_recompute,
}


def check_correctness(device: str) -> dict[str, float]:
    """Largest relative error of loss, dX and dW against dense float64 autograd; a variant above 1e-5 is not timed."""
    small = Shape(rows=300, hidden=64, vocab=3000, top_k=16, dtype="float32", device=device)
    data = make_inputs(small)
    exact = Inputs(
        hidden=data.hidden.detach().double().requires_grad_(),
        weight=data.weight.detach().double().requires_grad_(),
        ids=data.ids,
        support=data.support,
        teacher_logprobs=data.teacher_logprobs.double(),
        teacher_log_tail=data.teacher_log_tail.double(),
    )
    logprobs = (exact.hidden @ exact.weight.T).log_softmax(dim=1)
    outside = logprobs.scatter(1, exact.ids[:, :-1], -torch.inf)
    reference = loss_of(exact, logprobs.gather(1, exact.ids), outside.logsumexp(dim=1), slice(None))
    reference.backward()
    want = (reference.detach(), exact.hidden.grad, exact.weight.grad)
    errors = {}
    for name, run in VARIANTS.items():
        if name == ROOF:
            continue
        data = make_inputs(small)
        loss = run(data)
        got = (loss, data.hidden.grad, data.weight.grad)
        errors[name] = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        if errors[name] > 1e-5:
            raise SystemExit(f"{name}: relative error {errors[name]:.2e} against float64, allowed is 1e-5; not timed")
    return errors


def relative_error(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None, "a gradient is missing"  # noqa: PT018 (no test)
    return float((got - want).norm() / want.norm())


def resident_kib(field: str) -> int:
    """VmRSS, what is resident now, or VmHWM, its peak, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}; the CPU benchmark needs Linux")


def measure_cpu(name: str, shape: Shape, threads: int) -> Sample:
    """One sample in this process: memory in a first call, time in a second one that finds warm code and fresh gradients."""
    torch.set_num_threads(threads)
    run, data = VARIANTS[name], make_inputs(shape)
    run(make_inputs(replace(shape, rows=8, vocab=2 * shape.top_k)))  # loads libraries, starts threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident_kib("VmRSS")
    run(data)
    extra_mib = (resident_kib("VmHWM") - before) / 1024
    data.hidden.grad = data.weight.grad = None
    cpu, wall = time.process_time(), time.perf_counter()
    run(data)
    return Sample(time.process_time() - cpu, time.perf_counter() - wall, extra_mib)


def sample_in_subprocess(name: str, arguments: list[str]) -> Sample:
    # Buffers from mmap go back to the system when freed, so that resident memory shows what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, __file__, *arguments, "--sample", name]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def measure_cuda(shape: Shape, repeats: int) -> dict[str, list[Sample]]:
    data = make_inputs(shape)
    flush = torch.empty(256 * MIB, dtype=torch.uint8, device=shape.device)
    samples: dict[str, list[Sample]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats + 5):
        for name, run in VARIANTS.items():
            data.hidden.grad = data.weight.grad = None
            flush.zero_()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            live = torch.cuda.memory_allocated()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(data)
            end.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(end) / 1e3
            if repeat >= 5:  # the first ones warm up
                extra = (torch.cuda.max_memory_allocated() - live) / MIB
                samples[name].append(Sample(seconds, seconds, extra))
    return samples


def summarize(samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    median = {
        name: {field: statistics.median(getattr(s, field) for s in runs) for field in ("cpu_s", "wall_s", "extra_mib")}
        for name, runs in samples.items()
    }
    for name, row in median.items():
        # Ratios of samples taken one after the other, so that slow spells of the machine cancel.
        pairs = zip(samples[name], samples[ROOF], strict=True)
        row["cpu_over_gemms"] = statistics.median(ours.cpu_s / roof.cpu_s for ours, roof in pairs)
        row["naive_memory_over_ours"] = median["naive"]["extra_mib"] / max(row["extra_mib"], 1e-3)
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench/bench_head.json"))
    parser.add_argument("--sample", choices=VARIANTS, help="take one sample of this variant and print it (internal)")
    args = parser.parse_args()
    shape = Shape(args.rows, args.hidden, args.vocab, args.top_k, args.dtype, args.device)
    if args.sample:
        print(json.dumps(asdict(measure_cpu(args.sample, shape, args.threads))))
        return

    torch.set_num_threads(args.threads)
    errors = check_correctness(args.device)
    print("largest relative error against float64: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    if args.device == "cpu":
        samples: dict[str, list[Sample]] = {name: [] for name in VARIANTS}
        for _ in range(args.repeats):
            for name in VARIANTS:
                samples[name].append(sample_in_subprocess(name, sys.argv[1:]))
    else:
        samples = measure_cuda(shape, args.repeats)

    summary = summarize(samples)
    print(f"{'variant':22}{'CPU s':>9}{'wall s':>9}{'/ GEMMs':>9}{'extra MiB':>11}{'naive mem / this':>18}")
    for name, row in summary.items():
        print(
            f"{name:22}{row['cpu_s']:9.3f}{row['wall_s']:9.3f}{row['cpu_over_gemms']:9.2f}"
            f"{row['extra_mib']:11.0f}{row['naive_memory_over_ours']:18.1f}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "shape": asdict(shape),
        "threads": args.threads,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine(),
        "load_average": os.getloadavg(),
        "max_relative_error": errors,
        "median": summary,
        "samples": {name: [asdict(s) for s in runs] for name, runs in samples.items()},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
