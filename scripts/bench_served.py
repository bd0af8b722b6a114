"""A shared teacher against one of the run's own, side by side: `python scripts/bench_served.py [--quick]`.

In:  a model folder (default: the demo teacher); K = 64. Starts a local Ray.
Out: a printed table and bench/served.json: tokens a second when an actor of one's own is asked, when the service is asked
     by its handle, and when it is asked over HTTP, for writing and for scoring; bytes a scored token over HTTP.

One engine each, the same settings, four calls of 16 rows at a time as a training stage has it. The three take turns in every
round, so that other load on the machine meets each alike; a ratio is the median over rounds. CPU time, of this process and
all that it started (Ray's own with them), is the column to trust on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import psutil
import pyarrow as pa
import ray
from ray import serve

from teacher_serving.config import SamplingConfig, ServedTeacherConfig, VllmTeacherConfig
from teacher_serving.connect import connect, cpu_environment
from teacher_serving.serve import address_of, check_cluster, start, stop
from teacher_serving.serve_config import ServeConfig
from teacher_serving.types import TEACHER_OUTPUT_SCHEMA, Teacher
from teacher_serving.wire import answer_bytes, request_bytes

DEMO_TEACHER = Path(__file__).parents[1] / "raykd" / "demo" / "teacher"
K, ROWS, CALLS = 64, 16, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
GOAL = 0.9


class Own:
    """An engine of one's own, in an actor as a training stage has it."""

    def __init__(self, config: VllmTeacherConfig) -> None:
        self._teacher = connect(config)

    def generate(self, rows: pa.Table) -> pa.Table:
        return self._teacher.generate(rows)

    def score(self, rows: pa.Table) -> pa.Table:
        return self._teacher.score(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds of fewer calls, about two minutes")
    parser.add_argument("--model", type=Path, default=DEMO_TEACHER)
    parser.add_argument("--out", type=Path, default=Path("bench/served.json"))
    args = parser.parse_args()
    num_calls, num_rounds = (8, 3) if args.quick else (16, 7)
    sampling = SamplingConfig(max_tokens=OUTPUT_TOKENS, stop_token_ids=())
    engine = VllmTeacherConfig(
        model=str(args.model), dtype="float32", top_k=K, sampling=sampling, max_model_len=256, max_num_seqs=ROWS * CALLS
    )
    root = str(Path(__file__).parents[1])
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    config = check_cluster(ServeConfig(teacher=engine))
    start(config, None)
    variables = cpu_environment(config.teacher) if has_no_gpu(config) else {}
    options: dict[str, Any] = {"max_concurrency": CALLS, "runtime_env": {"env_vars": variables}}
    actor = ray.remote(**options)(Own).remote(config.teacher)
    common = {"tokenizer": str(args.model), "top_k": K, "sampling": sampling}
    by_handle = connect(ServedTeacherConfig(app=config.app, **common))
    by_http = connect(ServedTeacherConfig(address=address_of(config), **common))
    asks: dict[str, Callable[[str, pa.Table], pa.Table]] = {
        "own actor": lambda method, rows: ray.get(getattr(actor, method).remote(rows)),
        "app": lambda method, rows: getattr(by_handle, method)(rows),
        "address": lambda method, rows: getattr(by_http, method)(rows),
    }
    report: dict[str, object] = {"K": K, "model": args.model.name}
    for method in ("generate", "score"):
        report[method] = race(asks, method, num_calls, num_rounds, by_handle.info.vocab_size)
        print_race(method, report[method])
    report["score_bytes_per_token"] = payload(by_handle)
    print("\nscoring over HTTP, bytes a token:", report["score_bytes_per_token"])
    stop(config)
    serve.shutdown()
    ray.shutdown()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def has_no_gpu(config: ServeConfig) -> bool:
    return config.teacher.device == "cpu"


def rows_of(method: str, vocab_size: int, seed: int, output_tokens: int = OUTPUT_TOKENS) -> pa.Table:
    """A call's rows: random ids, so that no two calls share a prefix."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (ROWS, PROMPT_TOKENS + output_tokens), dtype=np.int32)
    columns = {"uid": np.arange(ROWS), "prompt_ids": pa.array(list(ids[:, :PROMPT_TOKENS]), pa.list_(pa.int32()))}
    if method == "score":
        columns["output_ids"] = pa.array(list(ids[:, PROMPT_TOKENS:]), pa.list_(pa.int32()))
    return pa.table(columns)


def num_tokens(answers: pa.Table) -> int:
    return len(answers["output_ids"].combine_chunks().flatten())


def race(
    asks: dict[str, Callable[[str, pa.Table], pa.Table]], method: str, num_calls: int, num_rounds: int, vocab_size: int
) -> dict[str, dict[str, float]]:
    """Tokens a second of each, and its share of the own actor's, by wall and by CPU time (medians over rounds)."""
    names, rates, cpu_rates = list(asks), {name: [] for name in asks}, {name: [] for name in asks}
    seed = 0
    with ThreadPoolExecutor(CALLS) as threads:
        for round_ in range(-1, num_rounds):  # the first one warms up
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                tables = [rows_of(method, vocab_size, seed := seed + 1) for _ in range(num_calls)]
                began, cpu_began = time.perf_counter(), cpu_seconds()
                answers = list(threads.map(lambda rows, ask=asks[name]: ask(method, rows), tables))
                seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu_began
                assert all(table.schema.equals(TEACHER_OUTPUT_SCHEMA) for table in answers)
                if round_ >= 0:
                    rates[name].append(sum(map(num_tokens, answers)) / seconds)
                    cpu_rates[name].append(sum(map(num_tokens, answers)) / cpu)
    first = names[0]
    return {
        name: {
            "tokens_per_s": statistics.median(rates[name]),
            "share": statistics.median(a / b for a, b in zip(rates[name], rates[first], strict=True)),
            "tokens_per_cpu_s": statistics.median(cpu_rates[name]),
            "share_cpu": statistics.median(a / b for a, b in zip(cpu_rates[name], cpu_rates[first], strict=True)),
        }
        for name in names
    }


def cpu_seconds() -> float:
    """CPU time so far of this process and of all below it that still run."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def print_race(title: str, result: object) -> None:
    assert isinstance(result, dict)
    print(f"\n{title:12}{'tokens/s':>10}{'of own':>10}{'by CPU time':>13}{'goal':>8}")
    for name, row in result.items():
        goal = "" if name == "own actor" else f">={GOAL:g}"
        print(f"{name:12}{row['tokens_per_s']:10.0f}{row['share']:10.2f}{row['share_cpu']:13.2f}{goal:>8}")


def payload(teacher: Teacher) -> dict[str, float]:
    """Bytes on the wire for one scored token: the request, the answer, and the answer were it not compressed."""
    rows = rows_of("score", teacher.info.vocab_size, seed=0, output_tokens=128)
    answers = teacher.score(rows)
    sizes = {"request": request_bytes(rows), "answer": answer_bytes(answers), "answer, plain": request_bytes(answers)}
    return {name: round(len(body) / num_tokens(answers), 1) for name, body in sizes.items()}


if __name__ == "__main__":
    main()
