"""Does the data path scale: 1 to 16 simulated teachers and 1 to 8 train workers, over five raylets on one machine.

In:  nothing but options. Out: a table, and bench/scale.json. `--quick`: two points of each series, in a few minutes.

Every point is a run of `raykd.train --simulate both` on a cluster of `ray.cluster_utils.Cluster`: a head, two nodes with the
label pool=teacher, two with pool=trainer, on which the pools are placed. Teachers and workers sleep for the time that their
rates say; prompts, payload (K = 64), extractors, stream, collate and ledger are real. Counted is a window of seconds that
begins ten seconds after every teacher has started.

Weak scaling: completion tokens per second and teacher (or worker), divided by those of one, and by what steps of several
workers allow: each waits for the one with the most tokens (`even_steps`). Two series: teachers before one worker that takes
all it gets; and workers, each with two teachers that could write 1.4 times what it takes.
CPU time is that of the driver and of the actor that executes the stream (Ray's SplitCoordinator), for each batch of 8
sequences.
Before that each stage is timed alone, in this process: CPU time and bytes for each completion token.
All processes share the machine's cores: where those are busy, what a point loses is theirs and not the path's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch
import yaml
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.cluster_utils import Cluster
from transformers import AutoTokenizer, Qwen3Config

from raykd.cli import load_config, with_values
from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.data.sources import prepare_prompts
from raykd.data.stream import Extractor, Prompts, Rejects, bytes_per_token, plan_epoch, teacher_cache
from raykd.tracing import quiet_ray, read_metrics
from raykd.train import main as train
from raykd.training.distributed import STOP_FILE
from teacher_serving.actor import BusyClock, answer_block
from teacher_serving.connect import connect
from teacher_serving.simulated import LENGTH_SPREAD

ROOT = Path(__file__).parents[1]
TOP_K = 64
RESPONSE_TOKENS = 100
ROWS = 8  # sequences of a worker's step: what is called a batch
STORE_BYTES = 100 * 2**20  # of every node
LEAD_OF_A_TEACHER = 10_000  # tokens; its running and waiting batches are 3,200 of them
SETTLE_S = 10.0  # before a window begins: the first answers come all at once
AT_ONCE = 1e12  # tokens a second
SPARE = 1.4  # of what a worker takes its teachers can write so much
TEACHER, WORKER, COORDINATOR = "MapWorker(MapBatches(TeacherActor", "RayTrainWorker", "SplitCoordinator"
"""What Ray calls the processes of actors."""


@dataclass(frozen=True)
class Setting:
    """One point: how many of each, and what a worker goes through a second."""

    series: str
    teachers: int
    workers: int
    worker_tokens_per_s: float


@dataclass
class Measured:
    """One point, in its window."""

    setting: Setting
    batches: float  # of ROWS sequences
    tokens_per_s: float  # completion tokens
    driver_ms: float  # CPU time a batch
    coordinator_ms: float
    peak_store_mb: float  # all nodes together
    cores_busy: float  # of the whole machine, whoever keeps them busy
    start_s: float  # from the command to the start of the last teacher
    in_pool: int  # teachers and workers on a node of their pool
    cache_bytes_per_token: float  # on disk
    efficiency: float = 0.0
    even_steps: float = 1.0

    @property
    def per_unit(self) -> float:
        """Tokens per second of each teacher, or of each worker."""
        number = self.setting.teachers if self.setting.series == "teachers" else self.setting.workers
        return self.tokens_per_s / number


def main() -> None:
    """Measure, print, write bench/scale.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 4 teachers, 1 and 2 workers")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a window")
    parser.add_argument("--rate", type=float, default=400.0, help="completion tokens per second of a teacher")
    args = parser.parse_args()
    teachers, workers = ((1, 4), (1, 2)) if args.quick else ((1, 4, 16), (1, 4, 8))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        prompt_tokens = make_world(scratch)
        takes = 2 * args.rate / SPARE * (prompt_tokens + RESPONSE_TOKENS) / RESPONSE_TOKENS
        settings = [Setting("teachers", number, 1, AT_ONCE) for number in teachers]
        settings += [Setting("workers", 2 * number, number, takes) for number in workers]
        quiet_ray()
        measured = []
        with raylets() as cluster:
            alone = stages_alone(load_config(command(settings[0], scratch, args.rate, 0.0)[1:2]), scratch)
            print(alone, flush=True)
            for setting in settings:
                measured.append(measure(setting, scratch, cluster, args.rate, args.seconds))
                print(measured[-1], flush=True)
    for point in measured:
        first = next(other for other in measured if other.setting.series == point.setting.series)
        point.even_steps = even_steps(point.setting.workers, prompt_tokens)
        point.efficiency = point.per_unit / first.per_unit / point.even_steps
    bound = LEAD_OF_A_TEACHER * bytes_per_token(TOP_K) / 1e6
    show(measured, args.rate, bound)
    result = {
        "stages_alone": alone,
        "rate": args.rate,
        "window_s": args.seconds,
        "prompt_tokens": prompt_tokens,
        "lead_bound_mb": bound,
    }
    out = ROOT / "bench" / "scale.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result | {"points": [asdict(point) for point in measured]}, indent=1) + "\n")


def make_world(scratch: Path) -> float:
    """A model's config and tokenizer, without weights; returns the mean length of a prompt in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "raykd" / "demo" / "teacher")
    tokenizer.save_pretrained(scratch / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "head_dim": 64}
    Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,  # pyright: ignore[reportArgumentType]
    ).save_pretrained(scratch / "model")
    texts = [tokenizer.apply_chat_template([question(i)], add_generation_prompt=True, tokenize=False) for i in range(20)]
    return sum(len(tokenizer(text)["input_ids"]) for text in texts) / len(texts)


def question(number: int) -> dict[str, str]:
    """A prompt of its own."""
    return {"role": "user", "content": f"What is {number} plus {number % 7}, and who asked for it first?"}


@contextlib.contextmanager
def raylets() -> Iterator[Cluster]:
    """A head and two nodes for each pool."""
    cluster = Cluster()
    cluster.add_node(num_cpus=4, object_store_memory=STORE_BYTES)
    for pool in ("teacher", "teacher", "trainer", "trainer"):
        cluster.add_node(num_cpus=1, labels={"pool": pool}, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def command(setting: Setting, scratch: Path, rate: float, seconds: float) -> list[str]:
    """What raykd.train is told, and the prompts for it: more than the window can use."""
    name = f"{setting.series}-{setting.teachers}-{setting.workers}"
    number = int((seconds + 120) * setting.teachers * rate / RESPONSE_TOKENS) + ROWS * setting.workers
    prompts = scratch / f"{name}.jsonl"
    prompts.write_text("".join(json.dumps({"messages": [question(i)]}) + "\n" for i in range(number)))
    places = {"max_num_seqs": 16, "batch_size": 4, "concurrent_batches": 8, "num_replicas": setting.teachers}
    config = {
        "run": {"name": name, "dir": str(scratch / "runs")},
        "teacher": {
            "kind": "simulated",
            "model": str(scratch / "model"),
            "top_k": TOP_K,
            "node_labels": {"pool": "teacher"},
            "sampling": {"max_tokens": 1000},
            **places,
        },
        "student": {"model": str(scratch / "model")},
        "data": {"prompts": str(prompts), "max_lead_tokens": LEAD_OF_A_TEACHER * setting.teachers, "num_extractors": 2},
        "loss": {"kd": 1.0, "tool_name": 0.1, "json_argument": 0.1, "integration_copy": 0.2},
        "train": {
            "num_workers": setting.workers,
            "sequences_per_step": ROWS * setting.workers,
            "log_every": 1,
            "node_labels": {"pool": "trainer"},
        },
        "rates": {
            "teacher_tokens_per_s": rate,
            "worker_tokens_per_s": setting.worker_tokens_per_s,
            "response_tokens": RESPONSE_TOKENS,
        },
        "tracking": {"progress_bar": False, "tensorboard": False},
    }
    file = scratch / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["--config", str(file), "--simulate", "both"]


def stages_alone(given: Config, scratch: Path) -> dict[str, float]:
    """Microseconds of CPU, and bytes, that each stage takes for a completion token."""
    config = with_values(given, {"teacher.tokens_per_s": AT_ONCE, "teacher.response_tokens": RESPONSE_TOKENS})
    prompts = prepare_prompts(config, scratch / "alone")
    cache = teacher_cache(config, prompts)
    plan = plan_epoch(config, prompts, 0, np.empty(0, np.int64), cache.index())
    teacher, read = connect(config.teacher), Prompts(prompts.folder, cache)
    extractor = Extractor(config, cache, Rejects.of(prompts.folder, prompts.counts, config))
    torch.set_num_threads(1)
    totals: Counter[str] = Counter()
    for start in range(0, plan.num_rows, ROWS):
        clocks = [time.process_time()]
        rows = read(plan.slice(start, ROWS).combine_chunks())
        clocks.append(time.process_time())
        answers = answer_block(teacher, rows, BusyClock())
        clocks.append(time.process_time())
        examples = extractor(answers)
        clocks.append(time.process_time())
        collate_kd_batch(examples, pad_id=0)
        clocks.append(time.process_time())
        if not start:
            continue  # the first block finds nothing loaded
        micros = 1e6 * np.diff(clocks)
        totals.update(dict(zip(("prompts_us", "teacher_us", "extractor_us", "collate_us"), micros, strict=True)))
        totals.update(tokens=len(answers["output_ids"].combine_chunks().flatten()), answer_bytes=answers.nbytes)
        totals.update(example_bytes=examples.nbytes)
    return {name: float(value) / totals["tokens"] for name, value in totals.items() if name != "tokens"}


def measure(setting: Setting, scratch: Path, cluster: Cluster, rate: float, seconds: float) -> Measured:
    """Run one point, and look at it from outside while it runs."""
    words = command(setting, scratch, rate, seconds)
    run = scratch / "runs" / Path(words[1]).stem
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(train, words)
        while len(named(cluster, TEACHER)) < setting.teachers or not steps(run):
            wait(code, 0.5)
        start_s = time.monotonic() - begun
        wait(code, SETTLE_S)
        before, psutil_idle = Reading.of(cluster, run), psutil.cpu_times()
        peak = 0.0
        while time.monotonic() < begun + start_s + SETTLE_S + seconds:
            peak = max(peak, store_mb())
            wait(code, 1.0)
        after, now = Reading.of(cluster, run), psutil.cpu_times()
        pools = {TEACHER: "teacher", WORKER: "trainer"}
        in_pool = sum(found == pool for name, pool in pools.items() for found in named(cluster, name).values())
        (run / STOP_FILE).touch()
        code.result()
    window, batches = after.time - before.time, (after.sequences - before.sequences) / ROWS
    busy = sum(now) - sum(psutil_idle) - (now.idle - psutil_idle.idle) - (now.iowait - psutil_idle.iowait)
    return Measured(
        setting=setting,
        batches=batches,
        tokens_per_s=(after.tokens - before.tokens) / window,
        driver_ms=1000 * (after.driver_s - before.driver_s) / batches,
        coordinator_ms=1000 * (after.coordinator_s - before.coordinator_s) / batches,
        peak_store_mb=peak,
        cores_busy=busy / window,
        start_s=start_s,
        in_pool=in_pool,
        cache_bytes_per_token=cache_bytes_per_token(run),
    )


def even_steps(num_workers: int, prompt_tokens: float) -> float:
    """Mean share of a step in which a worker has something to do, lengths being drawn as the simulated teacher does."""
    mu = math.log(RESPONSE_TOKENS) - LENGTH_SPREAD**2 / 2
    lengths = np.random.default_rng(0).lognormal(mu, LENGTH_SPREAD, (10_000, num_workers, ROWS)) + prompt_tokens
    tokens = lengths.sum(-1)
    return float(tokens.mean() / tokens.max(-1).mean())


@dataclass(frozen=True)
class Reading:
    """The clocks of a run at one moment."""

    time: float  # of its last step
    sequences: float
    tokens: float
    driver_s: float  # CPU time, without that of this thread
    coordinator_s: float

    @staticmethod
    def of(cluster: Cluster, run: Path) -> Reading:
        """What the run has logged by now, and what its processes have used."""
        last = steps(run)[-1]
        cpu = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in named(cluster, COORDINATOR))
        driver = time.process_time() - time.thread_time()
        return Reading(last["time"], last["sequences"], last["response_tokens"], driver, cpu)


def steps(run: Path) -> list[dict[str, Any]]:
    """What the run has logged by now."""
    file = run / "metrics.jsonl"
    return [entry for entry in read_metrics(file) if "sequences" in entry] if file.exists() else []


def wait(code: Future[int], seconds: float) -> None:
    """Let the run go on. Errors: RuntimeError when it has ended."""
    time.sleep(seconds)
    if code.done():
        raise RuntimeError(f"the run ended with {code.result()} before it was asked to")


def named(cluster: Cluster, name: str) -> dict[int, str]:
    """Processes of actors that have started and are called so: process id -> the pool of their node."""
    pools = {node["NodeID"]: node["Labels"].get("pool", "") for node in ray.nodes()}
    found = {}
    for node in cluster.list_all_nodes():
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for child in raylet.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = "".join(child.cmdline())
                if name in title and "__init__" not in title:
                    found[child.pid] = pools[node.node_id]
    return found


def store_mb() -> float:
    """What the object stores of all nodes hold."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    addresses = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    return sum(get_memory_info_reply(state, *at).store_stats.object_store_bytes_used for at in addresses) / 1e6


def cache_bytes_per_token(run: Path) -> float:
    """On disk, for every completion token: K scores, and what a prompt's share of it is."""
    files = list((run / "teacher_cache").rglob("*.parquet"))
    lengths = [pq.read_table(file, columns=["output_ids"])["output_ids"].combine_chunks().flatten() for file in files]
    return sum(file.stat().st_size for file in files) / sum(map(len, lengths))


def show(measured: list[Measured], rate: float, bound_mb: float) -> None:
    """Print the table."""
    print(f"\na teacher writes {rate:g} tokens a second; a batch is {ROWS} sequences of {RESPONSE_TOKENS} tokens")
    head = (
        "teachers workers  tokens/s",
        "even steps",
        "efficiency",
        "driver ms",
        "coordinator ms",
        "store MB",
        "cores busy",
    )
    print(*head, "start s", "in pool", sep="  ")
    for point in measured:
        teachers, workers = point.setting.teachers, point.setting.workers
        print(
            f"{teachers:8d} {workers:7d} {point.tokens_per_s:9.0f} {point.even_steps:11.3f} {point.efficiency:11.3f} "
            f"{point.driver_ms:10.1f} {point.coordinator_ms:15.1f} {point.peak_store_mb:9.1f} {point.cores_busy:11.2f} "
            f"{point.start_s:8.0f} {point.in_pool:4d} of {teachers + workers}"
        )
    print(f"CPU times are for each batch; the teachers' lead is bounded to {bound_mb:.1f} MB for each of them")
    disk = sum(point.cache_bytes_per_token for point in measured) / len(measured)
    print(f"the cache takes {disk:.0f} bytes a completion token on disk")


if __name__ == "__main__":
    main()
