"""How well the stream overlaps teacher and trainer: timed stand-ins for both, everything between them real.

In:  nothing but options; prompts are made up, the teacher and the training step sleep for a set time a batch.
Out: a table, and bench/pipeline.json.

The teacher is the simulated one (teacher_serving/simulated.py), with payload of real size (K = 64), in its actor pool; the
trainer is an actor that reads the stream as a train worker does, collates every step and sleeps as a simulated worker does
(raykd/training/simulated.py). scripts/bench_scale.py has whole runs, and many of both. Efficiency is
max(t_teacher, t_step) / t_pipeline, times a step, start-up excluded; lock-step would give 0.5 where both take the same time.
Store memory is what the node's object store reports, sampled while it runs. The driver's share is counted by what it holds:
references to blocks of descriptors, and their bytes; the stream is executed by an actor of Ray Data, not by the driver.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._private.worker import global_worker
from transformers import AutoTokenizer, Qwen3Config

from raykd.cli import start_ray, with_values
from raykd.config import Config
from raykd.data.cache import CacheIndex
from raykd.data.collate import collate_kd_batch
from raykd.data.sources import PromptSet, prepare_prompts
from raykd.data.stream import build_dataset, bytes_per_token, plan_epoch, teacher_cache
from raykd.tracing import quiet_ray
from raykd.training.simulated import sleep_as_if_trained

ROOT = Path(__file__).parents[1]
TOP_K = 64
ROWS = 32  # a batch of the teacher and a step of the trainer
TOKENS = 128  # of every completion
WARM_UP = 4  # steps before the clock starts


@dataclass(frozen=True)
class Measured:
    """One run of the pipeline; seconds a step."""

    ratio: float  # t_teacher / t_step as asked
    teacher_s: float
    step_s: float
    pipeline_s: float
    first_batch_s: float
    efficiency: float
    peak_store_mb: float
    driver_references: int  # most objects that the driver held references to
    wait_s: float  # of the trainer, per step


@ray.remote(num_cpus=1)
class Trainer:
    """Takes steps of about `seconds` on what it is given, as a train worker would."""

    def train(self, shard: Any, seconds: float) -> dict[str, Any]:
        """From the stream. Times of steps after the warm-up, and of waiting for them."""
        torch.set_num_threads(1)
        asked = time.monotonic()
        tables = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        return self._run(tables, seconds, asked)

    def train_from_memory(self, shard: Any, seconds: float) -> dict[str, Any]:
        """The same steps on blocks that were all fetched before."""
        torch.set_num_threads(1)
        blocks = list(shard.iter_batches(batch_size=None, batch_format="pyarrow"))
        return self._run(iter(blocks), seconds, time.monotonic())

    def _run(self, tables: Iterator[pa.Table], seconds: float, asked: float) -> dict[str, Any]:
        ends, waits, steps, teacher = [], [], [], []
        while True:
            start = time.monotonic()
            table = next(tables, None)
            got = time.monotonic()
            if table is None:
                break
            batch = collate_kd_batch(table, pad_id=0)
            sleep_as_if_trained([batch], int(batch.attention_mask.sum()) / seconds)
            ends.append(time.monotonic())
            waits.append(got - start)
            steps.append(ends[-1] - got)
            teacher.append(float(table["teacher_seconds"].to_numpy().sum()))
        return {
            "pipeline_s": (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP),
            "step_s": float(np.mean(steps[WARM_UP:])),
            "teacher_s": float(np.mean(teacher[WARM_UP:])),
            "wait_s": float(np.mean(waits[WARM_UP:])),
            "first_batch_s": waits[0],
            "steps": len(ends),
        }


def main() -> None:
    """Measure, print, write bench/pipeline.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="steps a run, warm-up excluded")
    parser.add_argument("--seconds", type=float, default=0.4, help="time of the slower side, a step")
    parser.add_argument("--lead", type=int, default=8, help="batches the teacher may run ahead")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4], help="t_teacher / t_step")
    args = parser.parse_args()
    quiet_ray()
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(Path(scratch), (args.steps + WARM_UP) * ROWS, args.lead)
        start_ray(config)
        prompt_set = prepare_prompts(config, Path(scratch) / "run")
        runs = [_measure(config, prompt_set, ratio, args.seconds) for ratio in args.ratios]
        memory = _run(config, prompt_set, 0.0, args.seconds, "train_from_memory")["pipeline_s"]
        stream = _run(config, prompt_set, args.seconds / 4, args.seconds, "train")["pipeline_s"]
        slow = _measure(config, prompt_set, 1 / 16, args.seconds)
        driver = _descriptors(config, prompt_set)
        ray.shutdown()
    result = {
        "runs": [asdict(run) for run in runs],
        "fed_by_ray_over_fed_from_memory": memory / stream,
        "slow_trainer": asdict(slow),
        "lead_bound_mb": config.data.max_lead_tokens * bytes_per_token(TOP_K) / 1e6,
        "batch_mb": ROWS * TOKENS * bytes_per_token(TOP_K) / 1e6,
        "run_mb": (args.steps + WARM_UP) * ROWS * TOKENS * bytes_per_token(TOP_K) / 1e6,
        **driver,
    }
    _print(result)
    out = ROOT / "bench" / "pipeline.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def _config(scratch: Path, num_prompts: int, lead: int) -> Config:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "raykd" / "demo" / "teacher")
    model = scratch / "model"  # never run: it only lends the stream a tokenizer and the sizes
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
    }
    Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=1024, **shape).save_pretrained(
        model
    )
    tokenizer.save_pretrained(model)
    rows = [{"messages": [{"role": "user", "content": f"What is {i} plus {i % 7}?"}]} for i in range(num_prompts)]
    (scratch / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {
        "kind": "simulated",
        "model": str(model),
        "top_k": TOP_K,
        "batch_size": ROWS,
        "max_num_seqs": ROWS,
        "concurrent_batches": 2,  # the second waits for the first one's places: no time is lost between them
        "response_tokens": 1000 * TOKENS,  # all are cut to the same length
        "sampling": {"max_tokens": TOKENS},
    }
    return Config.model_validate(
        {
            "run": {"name": "run", "dir": str(scratch)},
            "teacher": teacher,
            "student": {"model": str(model)},
            "data": {"prompts": str(scratch / "prompts.jsonl"), "max_lead_tokens": lead * ROWS * TOKENS},
        }
    )


def _run(config: Config, prompt_set: PromptSet, teacher_s: float, step_s: float, method: str) -> dict[str, Any]:
    """One pass with nothing cached: the trainer's numbers and the peak of the object store in MB."""
    cache = teacher_cache(config, prompt_set)
    for file in cache.path.glob("*.parquet"):
        file.unlink()

    rate = ROWS * TOKENS / max(teacher_s, 1e-9)
    config = with_values(config, {"teacher.tokens_per_s": rate})
    (shard,) = build_dataset(config, prompt_set, 0, np.empty(0, np.int64)).streaming_split(1, equal=False)
    done = getattr(Trainer.remote(), method).remote(shard, step_s)
    core_worker: Any = global_worker.core_worker  # pyright: ignore[reportAttributeAccessIssue]  (set when Ray starts)
    store_mb, references = 0.0, 0
    while not ray.wait([done], timeout=0.2)[0]:
        store_mb = max(store_mb, _store_mb())
        references = max(references, len(core_worker.get_all_reference_counts()))
    numbers: Any = ray.get(done)
    return numbers | {"peak_store_mb": store_mb, "driver_references": references}


def _measure(config: Config, prompt_set: PromptSet, ratio: float, seconds: float) -> Measured:
    """The slower of the two takes `seconds`."""
    teacher_s, step_s = (seconds, seconds / ratio) if ratio >= 1 else (seconds * ratio, seconds)
    numbers = _run(config, prompt_set, teacher_s, step_s, "train")
    numbers.pop("steps")
    slower = max(numbers["teacher_s"], numbers["step_s"])
    return Measured(ratio=ratio, efficiency=slower / numbers["pipeline_s"], **numbers)


def _store_mb() -> float:
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats.object_store_bytes_used / 1e6


def _descriptors(config: Config, prompt_set: PromptSet) -> dict[str, float]:
    """What the driver handles of a run."""
    nothing = CacheIndex((), np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32))
    plan = plan_epoch(config, prompt_set, 0, np.empty(0, np.int64), nothing)
    return {
        "descriptor_blocks": -(-plan.num_rows // ROWS),
        "descriptor_bytes_per_prompt": plan.nbytes / plan.num_rows,
        "payload_bytes_per_prompt": TOKENS * bytes_per_token(TOP_K),
    }


def _print(result: dict[str, Any]) -> None:
    print("\n t_T/t_S   t_T s   t_S s  t_pipe s  efficiency  wait s  peak store MB")
    for run in [*result["runs"], result["slow_trainer"]]:
        print(
            f"{run['ratio']:8.2f} {run['teacher_s']:7.3f} {run['step_s']:7.3f} {run['pipeline_s']:9.3f} "
            f"{run['efficiency']:11.3f} {run['wait_s']:7.3f} {run['peak_store_mb']:14.1f}"
        )
    print(f"fed by Ray / fed from memory: {result['fed_by_ray_over_fed_from_memory']:.3f}")
    print(
        f"the teacher's lead is bounded to {result['lead_bound_mb']:.1f} MB of {result['run_mb']:.1f} MB that pass; "
        f"a batch has {result['batch_mb']:.1f} MB"
    )
    references = max(run["driver_references"] for run in result["runs"])
    print(
        f"through the driver, per prompt: {result['descriptor_bytes_per_prompt']:.0f} bytes of descriptors, none of "
        f"{result['payload_bytes_per_prompt']} bytes of payload: it held {references} references at most, "
        f"{result['descriptor_blocks']} to blocks of descriptors"
    )


if __name__ == "__main__":
    main()
