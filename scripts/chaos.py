"""Runs that lose processes: small distillations on a cluster of several nodes, killed at random times drawn from a seed.

In:  --schedules N --seed S [--only KIND ...] [--keep].
Out: a table and bench/chaos.json: what was killed and when, prompts lost and repeated, seconds until steps went on.

Every schedule is a run of its own, of the command as a user starts it, on one Ray cluster: a head node for the driver alone
and two nodes for everything else, each with its raylet. SIGKILL meets a train worker, a teacher's actor, an engine's
process, a node (its raylet and all below it at once; or the raylet alone: the others must find out), the driver (started
again with --resume), or two of them; some are told before (SIGTERM, `ray drain-node`). A node that went is replaced seconds
later, or not before the run is over. Two kinds kill nothing: full object stores, and one teacher of two that is slow.

That every prompt went into the weights exactly once is shown from the run's files alone (scripts/chaos_evidence.py). A
deadline ends a run that hangs. Afterwards nothing but the cluster may be left of the processes below this one, to which
orphans fall (it is their subreaper).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from chaos_cluster import CPUS_OF_A_NODE, STORE_MB, Nodes, kill, wait_until, with_title
from chaos_evidence import judge
from rich.console import Console
from rich.table import Table

from raykd.training.checkpoint import latest_checkpoint

ROOT = Path(__file__).parents[1]
NUM_PROMPTS, PER_STEP = 96, 4
NUM_STEPS = NUM_PROMPTS // PER_STEP
DEADLINE_S = 900.0
PATIENCE_S = 60.0  # until processes of a run that is over must be gone
PR_SET_CHILD_SUBREAPER = 36
FEW_STEPS = 5  # tell nothing of a rate
COLUMNS = ("", "kind", "killed", "lost", "repeated", "s until the next step", "rate", "steps redone", "s in all", "problems")

SLOW = "teacher:slow@ms=500"
VLLM = ("teacher.kind=vllm", "teacher.max_num_seqs=16", f"teacher.kv_cache_memory_bytes={32 << 20}")
TWO = ("train.num_workers=2",)
UNSAVED = ("train.checkpoint_every=100",)
ELASTIC = (*TWO, "train.min_workers=1", "train.cpus_per_worker=2")


@dataclass(frozen=True)
class Kind:
    """What happens in a run, and what the run is told; `faults` as in teacher_serving/faults.py, {once} is a file's name."""

    targets: tuple[str, ...]
    words: tuple[str, ...] = ()
    faults: str = SLOW
    after_steps: range = range(NUM_STEPS * 3 // 4)


KINDS = {
    "worker": Kind(("worker",)),
    "teacher": Kind(("teacher",)),
    "node": Kind(("node",)),
    "driver": Kind(("driver",)),
    "engine": Kind(("engine",), VLLM),
    "worker, teacher": Kind(("worker", "teacher")),
    "raylet": Kind(("raylet",)),
    "node, driver": Kind(("node", "driver")),
    "worker of two, node": Kind(("worker", "node"), TWO),
    # Time to go on with one worker from a checkpoint, and with two again once there is a second node.
    "node, elastic": Kind(("worker's node",), ELASTIC, "worker:slow@ms=2500 " + SLOW, range(6, 8)),
    "controller": Kind(("controller",)),
    "coordinator": Kind(("coordinator",)),
    # Their only checkpoint before the last is what a notice has them write.
    "worker, asked to end": Kind(("asked worker",), UNSAVED, "worker:slow@ms=1000 " + SLOW, range(1, 8)),
    "node, announced": Kind(("announced node",), UNSAVED, "worker:slow@ms=1000 " + SLOW, range(1, 8)),
    "object stores full": Kind(("stores",)),
    "one teacher slow": Kind((), (), "teacher:slow@ms=5000;once={once} " + SLOW),
}
NODES = ("node", "worker's node", "raylet", "announced node")
NOTICE_S = 10  # from the announcement to the end of a node; half of it from SIGTERM to the end of a worker
TITLES = {
    "worker": "RayTrainWorker",
    "teacher": "TeacherActor",
    "engine": "EngineCore",
    "controller": "TrainController",  # of Ray Train
    "coordinator": "SplitCoordinator",  # of Ray Data: hands the stream to the workers
}


@dataclass(frozen=True)
class Kill:
    """After so many steps in metrics.jsonl and `delay_s` more, all processes of a target are looked up and one is killed."""

    target: str
    after_step: int
    delay_s: float


@dataclass(frozen=True)
class Schedule:
    """One run and what dies in it."""

    number: int
    kind: str
    kills: tuple[Kill, ...]
    replace_after_s: float | None  # a node that went; None: not while the run lasts


@dataclass
class Outcome:
    """What became of it. `problems`: empty where all is as it must be."""

    schedule: Schedule
    killed: list[str] = field(default_factory=list)
    recovery_s: list[float | None] = field(default_factory=list)  # of each kill, until the next step; None: it was the last
    num_workers: str = ""  # where it changed
    redone: int = 0  # steps made again from a checkpoint
    rate: float | None = None  # steps/s after the last recovery ÷ before the first kill; None: too few to tell
    lost: int = 0
    repeated: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def draw(seed: int, number: int, kinds: list[str]) -> Schedule:
    """The schedule of a number; kinds take turns, all else is drawn."""
    kind = kinds[number % len(kinds)]
    targets = KINDS[kind].targets
    rng = random.Random(f"{seed} {number}")
    steps = sorted(rng.choice(KINDS[kind].after_steps) for _ in targets)
    kills = tuple(Kill(target, step, round(rng.uniform(0, 1.5), 2)) for target, step in zip(targets, steps, strict=True))
    replaced = round(rng.uniform(1, 10), 1) if rng.random() < 0.6 or KINDS[kind].words == TWO else None
    return Schedule(number, kind, kills, replaced)


# --- the world ------------------------------------------------------------------------------------------------------------


def make_world(folder: Path) -> Path:
    """Prompts, and the config of a run of about ten seconds once it is under way, as it would be without a fault."""
    teacher = ROOT / "raykd" / "demo" / "teacher"
    rows = [json.dumps({"prompt": f"What is {i} times {i + 3}?"}) + "\n" for i in range(NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    config = {
        "run": {"dir": str(folder / "runs")},
        "teacher": {
            "kind": "hf", "model": str(teacher), "dtype": "float32", "top_k": 8, "max_model_len": 256, "batch_size": 4,
            "concurrent_batches": 1, "num_replicas": 2, "num_cpus": 0.5, "sampling": {"max_tokens": 24},
        },
        "student": {"model": str(teacher), "random_weights": True, "layers": [0]},
        "data": {"prompts": str(folder / "prompts.jsonl"), "fixed_order": True, "num_extractors": 1, "extractor_cpus": 0.25},
        "loss": {"kd": 1.0, "ce_teacher": 0.5},
        "train": {
            "sequences_per_step": PER_STEP, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 5, "max_failures": 4,
        },
        "tracking": {"tensorboard": False, "progress_bar": False},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


# --- a run and its kills --------------------------------------------------------------------------------------------------


class Run:
    """The run of a schedule: its driver, started again where it was killed."""

    def __init__(self, config: Path, name: str, kind: Kind, address: str) -> None:
        self.folder = config.parent / "runs" / name
        self._command = [sys.executable, "-m", "raykd.train", "--config", str(config), f"run.name={name}", *kind.words]
        faults = kind.faults.format(once=config.parent / f"{name}.once")
        self._environment = os.environ | {"RAY_ADDRESS": address, "RAYKD_FAULT": faults, "PYTHONPATH": str(ROOT)}
        if kind.words == VLLM:
            self._environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        self.hoard: subprocess.Popen[bytes] | None = None
        self.log = config.parent / f"{name}.log"
        self.start()

    def start(self, *words: str) -> None:
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [*self._command, *words], env=self._environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def is_over(self) -> bool:
        return self.driver.poll() is not None

    def lines(self) -> list[dict[str, Any]]:
        """All that was written to metrics.jsonl, superseded lines too."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def entries(self) -> list[dict[str, Any]]:
        """Those of steps."""
        return [line for line in self.lines() if "loss/total" in line]

    def recovery(self, kill: float, next_kill: float) -> float | None:
        """Seconds from a kill until the first step of workers that began after it, or, where none did, the next step."""
        begun = [line["time"] for line in self.lines() if line.keys() == {"step", "time"}]
        since = min((when for when in begun if kill < when < next_kill), default=kill)
        later = [entry["time"] for entry in self.entries() if entry["time"] > since]
        return round(later[0] - kill, 1) if later else None

    def numbers_of_workers(self) -> list[str]:
        """How many there were after one another; empty where that never changed."""
        changes = re.findall(r"was written by (\d+) workers, now there are (\d+)", self.log.read_text())
        numbers = [changes[0][0], *(now for _, now in changes)] if changes else []
        return [number for number, _ in groupby(numbers)]  # each worker says so

    def reached(self, step: int) -> bool:
        """Whether the run has made that many steps, at any time."""
        return self.is_over() or step == 0 or any(entry["step"] >= step for entry in self.entries())


def play(schedule: Schedule, config: Path, nodes: Nodes, seed: int, deadline_s: float) -> tuple[Run, Outcome]:
    """Start the run, kill what the schedule says, wait for the end."""
    rng = random.Random(f"{seed} {schedule.number} victims")
    outcome = Outcome(schedule)
    start = time.monotonic()
    deadline = start + deadline_s
    run = Run(config, f"chaos-{schedule.number}", KINDS[schedule.kind], nodes.address)
    kill_times, replace_at = [], float("inf")
    for planned in schedule.kills:
        wait_until(lambda step=planned.after_step: run.reached(step), deadline)
        wait_until(run.is_over, time.monotonic() + planned.delay_s)
        if victim := strike(planned.target, run, nodes, rng, deadline):
            kill_times.append(time.time())
            step, saved = max([0, *(entry["step"] for entry in run.entries())]), latest_checkpoint(run.folder)
            outcome.killed.append(f"{victim} at step {step}, {saved.name if saved else 'no checkpoint'}")
            if planned.target in ("asked worker", "announced node") and saved is None:
                outcome.problems.append(f"no checkpoint was written by the end of the {planned.target}")
            if planned.target in NODES and schedule.replace_after_s is not None:
                replace_at = time.monotonic() + schedule.replace_after_s
    if kill_times and KINDS[schedule.kind].words == ELASTIC:  # not before it goes on with fewer workers
        wait_until(lambda: run.is_over() or run.recovery(kill_times[-1], float("inf")) is not None, deadline)
        replace_at = 0.0
    if not wait_until(run.is_over, min(deadline, replace_at)) and time.monotonic() < deadline:
        nodes.fill()
    if not wait_until(run.is_over, deadline):
        outcome.problems.append(f"not over after {deadline_s:.0f} s")
        run.driver.kill()
        run.driver.wait()
    outcome.seconds = round(time.monotonic() - start, 1)
    if run.driver.returncode != 0:
        outcome.problems.append(f"exit code {run.driver.returncode}, see {run.log}")
    if run.hoard is not None:
        run.hoard.kill()
    entries = run.entries()
    outcome.num_workers = " → ".join(run.numbers_of_workers())
    outcome.redone = len(entries) - len({entry["step"] for entry in entries})
    times = np.array([entry["time"] for entry in entries])
    outcome.recovery_s = [run.recovery(*pair) for pair in pairwise([*kill_times, float("inf")])]
    if kill_times and outcome.recovery_s[-1] is not None:
        before, after = times[times < kill_times[0]], times[times - kill_times[-1] > outcome.recovery_s[-1]]
        if min(len(before), len(after)) > FEW_STEPS:
            outcome.rate = round(float(per_second(after) / per_second(before)), 2)
    return run, outcome


def per_second(times: np.ndarray) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def strike(target: str, run: Run, nodes: Nodes, rng: random.Random, deadline: float) -> str | None:
    """Have one die; says which, or None where the run was over first."""
    if target in TITLES or target == "asked worker":
        wait_until(lambda: run.is_over() or with_title(TITLES[target.split()[-1]]), deadline)
    if run.is_over():
        return None
    if target == "stores":
        run.hoard = nodes.fill_stores()
        return f"{STORE_MB * 9 // 10} of {STORE_MB} MB of every object store taken"
    if target == "driver":
        run.driver.kill()
        run.driver.wait()
        time.sleep(rng.uniform(0, 3))
        run.start(*(["--resume"] if (run.folder / "config.yaml").exists() else []))
        return "driver"
    if target in NODES:
        trains = [] if target == "node" else nodes.with_process(TITLES["worker"])
        node = rng.choice(trains or nodes.nodes)
        if target == "announced node":
            nodes.announce(node, NOTICE_S)
            wait_until(run.is_over, time.monotonic() + NOTICE_S)
        nodes.kill(node, with_processes=target != "raylet")
        return f"{target} of {CPUS_OF_A_NODE} CPUs"
    alive = sorted(with_title(TITLES[target.split()[-1]]))
    victim = rng.choice(alive)
    if target == "asked worker":
        os.kill(victim, signal.SIGTERM)
        wait_until(run.is_over, time.monotonic() + NOTICE_S / 2)
    kill(victim)
    return f"{target} of {len(alive)}"


def leftovers(of_a_run: bool) -> dict[int, str]:
    """Processes that should be gone: those of a run, or, after the cluster's end, all of them."""
    words = (*TITLES.values(), "raykd.train", "Extractor", "Prompts") if of_a_run else ("",)
    wait_until(lambda: not with_title(*words), time.monotonic() + PATIENCE_S)
    return with_title(*words)


# --- the command ----------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds for a run with all its restarts")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # what else runs on this machine may fill it
    os.environ["PYTHONPATH"] = str(ROOT)  # of the raylets' workers
    folder = Path(tempfile.mkdtemp(prefix="raykd-chaos-"))
    config, nodes, outcomes = make_world(folder), Nodes(), []
    undisturbed: dict[tuple[str, ...], Run] = {}
    for number in range(args.schedules):
        schedule = draw(args.seed, number, args.only)
        words = KINDS[schedule.kind].words
        twin = VLLM if words == VLLM else ()
        if twin not in undisturbed:
            undisturbed[twin] = Run(config, f"undisturbed-{len(undisturbed)}", Kind((), twin), nodes.address)
            if not wait_until(undisturbed[twin].is_over, time.monotonic() + args.deadline):
                raise TimeoutError(f"the run in which nothing dies is not over, see {undisturbed[twin].log}")
        run, outcome = play(schedule, config, nodes, args.seed, args.deadline)
        evidence = judge(run.folder, undisturbed[twin].folder if TWO[0] not in words else None)
        outcome.lost, outcome.repeated = evidence.lost, evidence.repeated
        outcome.problems.extend(evidence.problems)
        if left := leftovers(of_a_run=True):
            outcome.problems.append(f"left behind: {left}")
        outcomes.append(outcome)
        print_table(outcomes[-1:])
        write(outcomes, {}, args.seed)
        nodes.fill()
    nodes.shutdown()
    orphans = leftovers(of_a_run=False)
    Console().print(f"processes left after the cluster's end: {orphans or 'none'}")
    print_table(outcomes)
    write(outcomes, orphans, args.seed)
    if not args.keep and not any(outcome.problems for outcome in outcomes):
        shutil.rmtree(folder)
    return 1 if orphans or any(outcome.problems for outcome in outcomes) else 0


def print_table(outcomes: list[Outcome]) -> None:
    table = Table(*COLUMNS, box=None)
    for outcome in outcomes:
        workers = [f"workers {outcome.num_workers}"] if outcome.num_workers else []
        killed, problems = "; ".join([*outcome.killed, *workers]) or "nothing", "; ".join(outcome.problems) or "none"
        seconds = ", ".join("–" if value is None else f"{value:g}" for value in outcome.recovery_s)
        rate = "–" if outcome.rate is None else outcome.rate
        row = (outcome.schedule.number, outcome.schedule.kind, killed, outcome.lost, outcome.repeated, seconds, rate)
        table.add_row(*map(str, (*row, outcome.redone, outcome.seconds, problems)))
    Console(width=200).print(table)


def write(outcomes: list[Outcome], orphans: dict[int, str], seed: int) -> None:
    file = ROOT / "bench" / "chaos.json"
    values = {"seed": seed, "orphans": list(orphans.values()), "schedules": [asdict(outcome) for outcome in outcomes]}
    file.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
