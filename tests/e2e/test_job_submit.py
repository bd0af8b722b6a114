"""`ray job submit` to a head node with its dashboard: what travels, what comes back."""

from __future__ import annotations

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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from raykd.training.checkpoint import latest_checkpoint, read_state
from tests.conftest import save_tiny_model

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
MAX_UPLOAD_BYTES = 8 * 2**20


class HeadNode(NamedTuple):
    """A Ray of its own, beside any other of this machine."""

    dashboard: str  # address
    folder: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Jobs run `python`: the one of this environment must come first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{RAY.parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def head_node() -> Iterator[HeadNode]:
    """A head node with its dashboard."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="rk", dir="/tmp")  # sockets want a short path
    words = f"start --head --block --port={free_port()} --dashboard-port={port} --temp-dir={folder} --num-cpus=8"
    words += f" --dashboard-agent-listen-port={free_port()}"  # its default may be taken by another Ray
    words += f" --object-store-memory={200 * 2**20} --disable-usage-stats"
    with (Path(folder) / "head.log").open("wb") as log:
        head = subprocess.Popen([RAY, *words.split()], env=environment(), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api/version", head)
        yield HeadNode(address, Path(folder))
    finally:
        head.terminate()  # ends the node's processes too
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert head.poll() is None and time.monotonic() < deadline, f"no answer from {url}"  # noqa: PT018 (one reason)
            time.sleep(0.5)


def submit(node: HeadNode, *words: str) -> subprocess.CompletedProcess[str]:
    options = ["--address", node.dashboard, "--working-dir", ROOT]
    command = [RAY, "job", "submit", *options, "--", "python", "-m", "raykd.train", *words]
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # the node is still starting
            return done
        time.sleep(1)


@pytest.fixture(scope="module")
def words(tmp_path_factory, demo_tokenizer, tiny_model_path) -> list[str]:
    """A run of three steps, all of it outside the folder that is uploaded."""
    folder = tmp_path_factory.mktemp("job")
    save_tiny_model(folder / "student", demo_tokenizer, seed=1, num_layers=1)
    rows = [json.dumps({"prompt": f"What is {i} times {i}?"}) + "\n" for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "job.yaml").write_text("train: {sequences_per_step: 4}\ntracking: {tensorboard: false}\n")
    teacher = (
        f"{{kind: hf, model: '{tiny_model_path}', dtype: float32, top_k: 8, max_model_len: 64, sampling: {{max_tokens: 8}}}}"
    )
    return [
        "--config", str(folder / "job.yaml"), f"run.dir={folder / 'runs'}", f"teacher={teacher}",
        f"student.model={folder / 'student'}", f"data.prompts={folder / 'prompts.jsonl'}",
    ]  # fmt: skip


@pytest.mark.ray
def test_a_submitted_job_trains_and_its_log_is_that_of_the_run(head_node, words):
    done = submit(head_node, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    checkpoint = latest_checkpoint(Path(words[2].removeprefix("run.dir=")) / "run")
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == 3
    assert "succeeded" in done.stdout
    assert re.search(r"step 3/3", done.stdout), done.stdout

    [unpacked] = head_node.folder.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
    uploaded = sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file())
    assert (unpacked / "raykd" / "train.py").exists()
    assert uploaded < MAX_UPLOAD_BYTES


@pytest.mark.ray
def test_a_job_that_fails_says_why_and_exits_with_1(head_node, words):
    failed = submit(head_node, *words, "data.prompts=/nowhere.jsonl")
    assert failed.returncode == 1
    assert "data.prompts=/nowhere.jsonl: nothing there" in failed.stdout + failed.stderr
