"""`ray job submit` to a head node with its dashboard: what travels, what comes back, what the dashboard shows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import pytest

from raykd.ray_metrics import metric_name
from raykd.tracing import read_metrics
from raykd.training.checkpoint import latest_checkpoint, read_state
from tests.conftest import save_student_and_questions

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "configs" / "grafana" / "raykd.json"
RAY = Path(sys.executable).with_name("ray")
MAX_UPLOAD_BYTES = 8 * 2**20
T = TypeVar("T")
LEFT_BEHIND = 3 * MAX_UPLOAD_BYTES


class HeadNode(NamedTuple):
    """A Ray of its own, beside any other of this machine."""

    dashboard: str  # address
    metrics: str  # address of the Prometheus endpoint
    folder: Path

    def get(self, path: str) -> Any:
        """What the dashboard's server says."""
        with urllib.request.urlopen(f"{self.dashboard}{path}", timeout=30) as answer:
            return json.load(answer)

    def scrape(self) -> str:
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            return answer.read().decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Jobs run `python`: the one of this environment must come first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours = {
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # else other tests beside this one starve the job
        "RAY_metrics_report_interval_ms": "1000",
    }
    return kept | ours


@pytest.fixture(scope="module")
def head_node() -> Iterator[HeadNode]:
    """A head node with its dashboard."""
    port, metrics, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="rk", dir="/tmp")  # sockets want a short path
    words = f"start --head --block --port={free_port()} --dashboard-port={port} --temp-dir={folder} --num-cpus=8"
    words += f" --dashboard-agent-listen-port={free_port()}"  # its default may be taken by another Ray
    words += f" --metrics-export-port={metrics} --object-store-memory={200 * 2**20} --disable-usage-stats"
    with (Path(folder) / "head.log").open("wb") as log:
        head = subprocess.Popen([RAY, *words.split()], env=environment(), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for url in (f"{address}/api/version", f"http://127.0.0.1:{metrics}/metrics"):  # the agent comes last
            wait_for(url, head)
        yield HeadNode(address, f"http://127.0.0.1:{metrics}/metrics", Path(folder))
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in processes:  # at once: asked to end, a node takes half a minute
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert head.poll() is None and time.monotonic() < deadline, f"no answer from {url}"  # noqa: PT018 (one reason)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A user's working directory: the packages, configs of their own, and what grows beside them."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("raykd", "teacher_serving", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".rayignore", folder)
    for name in ("runs/run/checkpoints", ".venv/lib", ".git/objects", "bench", "wandb"):
        (folder / name).mkdir(parents=True)
        with (folder / name / "large").open("wb") as file:
            file.truncate(LEFT_BEHIND)
    (folder / "mine").mkdir()
    (folder / "mine" / "base.yaml").write_text("train: {sequences_per_step: 6, log_every: 1}\n")
    (folder / "mine" / "job.yaml").write_text("include: [base.yaml]\ntracking: {tensorboard: false}\n")
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory, demo_tokenizer, tiny_model_path) -> list[str]:
    """A run of three steps, and prompts for more, so that teachers and extractors are there while it lasts. Data, models and
    the run's folder are where every node sees them."""
    folder = tmp_path_factory.mktemp("job")
    options = save_student_and_questions(folder, demo_tokenizer, prompts=80, held_out=2)
    teacher = {"kind": "hf", "model": str(tiny_model_path), "dtype": "float32", "top_k": 8, "max_model_len": 64}
    options |= {"teacher": teacher | {"sampling": {"max_tokens": 8}}}
    sections = [f"{name}={json.dumps(section)}" for name, section in options.items()]
    lasting = ["train.max_steps=3", "teacher.batch_size=4", "data.max_lead_tokens=64"]
    return [f"run.dir={folder / 'runs'}", "run.name=job", *sections, "train.sequences_per_step=4", *lasting]


def run_folder(words: list[str]) -> Path:
    return Path(words[0].removeprefix("run.dir=")) / "job"


def ray_job(node: HeadNode, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", words[0], "--address", node.dashboard, *words[1:]]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400, **options)


def submit(node: HeadNode, project: Path, *words: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """In the project's folder: ray job submit --working-dir . -- python -m raykd.train --config mine/job.yaml …"""
    entrypoint = ["python", "-m", "raykd.train", "--config", "mine/job.yaml", *words]
    deadline = time.monotonic() + 120
    while True:
        done = ray_job(node, "submit", "--working-dir", ".", *options, "--", *entrypoint, cwd=project)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # the node is still starting
            return done
        time.sleep(1)


def until(condition: Callable[[], T | None], what: str) -> T:
    """Wait for what is not None."""
    deadline = time.monotonic() + 300
    while (found := condition()) is None:
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def waiting(head_node, project, words) -> str:
    """Id of a job that has made one step and waits."""
    name = "waits"
    variables = {"RAYKD_FAULT": "worker:wait@step=2", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    options = ["--no-wait", "--submission-id", name, "--runtime-env-json", json.dumps({"env_vars": variables})]
    start = time.time()
    done = submit(head_node, project, *words, options=options)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = run_folder(words) / "metrics.jsonl"

    def first_step() -> float | None:
        job = head_node.get(f"/api/jobs/{name}")
        assert job["status"] in ("PENDING", "RUNNING"), job["message"]
        return next((entry["time"] for entry in read_metrics(metrics)), None) if metrics.exists() else None

    print(f"first step {until(first_step, 'no step') - start:.1f} s after ray job submit")
    return name


@pytest.mark.ray
def test_what_is_uploaded_is_the_code_and_the_configs_alone(head_node, waiting):
    [unpacked] = head_node.folder.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
    files = {path.relative_to(unpacked).as_posix(): path.stat().st_size for path in unpacked.rglob("*") if path.is_file()}
    assert {"raykd/train.py", "teacher_serving/actor.py", "mine/job.yaml", "mine/base.yaml"} <= files.keys()
    assert sum(files.values()) < MAX_UPLOAD_BYTES
    assert {name for name in files if not name.startswith(("raykd/", "teacher_serving/", "configs/", "mine/"))} == {
        ".rayignore"
    }


@pytest.mark.ray
def test_the_dashboard_shows_the_run_and_its_stages_by_name(head_node, waiting):
    job = head_node.get(f"/api/jobs/{waiting}")["job_id"]
    [run] = [run for run in head_node.get("/api/train/v2/runs/v1")["train_runs"] if run["job_id"] == job]
    assert run["name"].startswith("job-epoch-0-")
    assert run["status"] == "RUNNING"
    assert run["run_settings"]["train_loop_config"]["train"]["sequences_per_step"] == 4  # the override, not the file's 6
    assert run["run_settings"]["datasets"] == ["prompts"]

    [dataset] = head_node.get(f"/api/data/datasets/{job}")["datasets"]
    assert dataset["dataset"].startswith("job-prompts_")
    stages = [operator["name"] for operator in dataset["operators"]]
    assert [name for name in ("Prompts", "TeacherActor", "Extractor") if not any(name in stage for stage in stages)] == []

    actors = head_node.get("/logical/actors")["data"]["actors"].values()
    classes = {actor["actorClass"] for actor in actors if actor["jobId"] == job and actor["state"] == "ALIVE"}
    wanted = {"MapWorker(MapBatches(TeacherActor))", "MapWorker(MapBatches(Extractor))", "RayTrainWorker"}
    assert wanted <= classes


@pytest.mark.ray
def test_numbers_of_the_run_are_at_the_prometheus_endpoint_and_grafana_asks_for_no_others(head_node, waiting, words):
    [entry] = read_metrics(run_folder(words) / "metrics.jsonl")
    of_rank_0 = {f"ray_{metric_name(name)}" for name in entry if entry[name] is not None} - {"ray_raykd_time"}
    of_actors = {
        f"ray_raykd_{name}"
        for name in ("lead_tokens", "rows_rejected", "rows_kept_total", "teacher_tokens_total", "teacher_seconds_total")
    }

    def exported() -> dict[str, float] | None:
        lines = re.findall(r"^(ray_raykd_\w+)\{(.*)\} (\S+)$", head_node.scrape(), flags=re.MULTILINE)
        found = {name: float(value) for name, tags, value in lines if 'run="job"' in tags and 'stage="kd"' in tags}
        return found if of_rank_0 | of_actors <= found.keys() else None

    found = until(exported, "metrics of the run are not exported")
    assert found["ray_raykd_loss_kd"] == pytest.approx(entry["loss/kd"], rel=1e-6)
    assert found["ray_raykd_step"] == 1
    assert found["ray_raykd_rows_rejected"] == 0

    names, patterns = grafana_names(GRAFANA)
    assert names - found.keys() == {"ray_raykd_rows_cached_total"}  # of nothing cached Ray cannot tell
    unmatched = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in found)]
    assert unmatched == ["ray_raykd_validation_loss_.+"]  # not validated yet


@pytest.mark.ray
def test_a_stopped_job_leaves_a_checkpoint_and_another_goes_on_from_it_to_the_end(head_node, project, waiting, words):
    stopped = ray_job(head_node, "stop", waiting)
    assert stopped.returncode == 0, stopped.stderr
    assert head_node.get(f"/api/jobs/{waiting}")["status"] == "STOPPED"
    assert trained_steps(words) == 2
    assert "stopped; --resume goes on from" in head_node.get(f"/api/jobs/{waiting}/logs")["logs"]

    done = submit(head_node, project, *words, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert trained_steps(words) == 3
    assert re.search(r"step 3/3", done.stdout), done.stdout  # the run's log is that of the job
    assert "succeeded" in done.stdout


def grafana_names(file: Path) -> tuple[set[str], set[str]]:
    """Names of metrics that its queries ask for, and patterns of names."""
    queries = "\n".join(target["expr"] for panel in json.loads(file.read_text())["panels"] for target in panel["targets"])
    patterns = set(re.findall(r'__name__=~"([^"]+)"', queries))
    return set(re.findall(r"\b(ray_raykd_\w+)\{", queries)), patterns


def trained_steps(words: list[str]) -> int:
    checkpoint = latest_checkpoint(run_folder(words))
    assert checkpoint is not None
    return read_state(checkpoint)["step"]


@pytest.mark.ray
def test_a_job_that_fails_says_why_and_exits_with_1(head_node, project, words):
    failed = submit(head_node, project, *words, "run.name=other", "train.num_workers=4", "train.cpus_per_worker=9")
    assert failed.returncode == 1
    assert "error: the run reserves" in failed.stdout + failed.stderr
    assert not (run_folder(words).parent / "other").exists()  # mended, it begins as if it had never been started
