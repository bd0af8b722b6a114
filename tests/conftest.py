"""Shared fixtures: tiny models on disk, one Ray cluster per session; the environment that CPU engines need."""

from __future__ import annotations

import json
import os

# Settings that make a vLLM engine start in seconds on a CPU; teacher actors inherit them.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # else whatever runs beside the cluster comes first
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")  # for a dashboard, which the cluster below has not
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

# No test depends on how fast the machine is at the moment.
hypothesis.settings.register_profile("raykd", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("raykd")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Who runs what under `pytest -n 2`: one process all files that need Ray and share its cluster, the other the rest."""
    return ByCluster(config, log)


class ByCluster(LoadScopeScheduling):
    """Keeps together what must not meet another Ray on the machine, and the tests of a file with their fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if needs_ray(file) else file


@cache
def needs_ray(file: str) -> bool:
    """Whether a test file has tests that start or join a Ray cluster."""
    return "mark.ray" in (Path(__file__).parents[1] / file).read_text()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEMO_TEACHER = Path(__file__).parents[1] / "raykd" / "demo" / "teacher"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def demo_tokenizer():
    """The demo world's tokenizer (byte-level BPE, Hermes-style chat template)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_TEACHER)


def save_tiny_model(
    path: Path, tokenizer, *, seed: int, num_layers: int = 2, hidden_size: int = 64, max_positions: int = 2048
) -> Path:
    """A random Qwen3 model (tied embeddings) with the given tokenizer, as a Hugging Face folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # peaked distributions, so that rankings are stable
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_student_and_questions(folder: Path, tokenizer, **num_rows: int) -> dict[str, Any]:
    """A one-layer student and, by name, files of short prompts; the `student` and `data` sections of a run on them."""
    student = save_tiny_model(folder / "student", tokenizer, seed=1, num_layers=1)
    for name, count in num_rows.items():
        rows = [json.dumps({"prompt": f"{name}: what is {i} times {i + 3}?"}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    files = {name: str(folder / f"{name}.jsonl") for name in num_rows}
    return {"student": {"model": str(student)}, "data": {**files, "fixed_order": True}}


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory, demo_tokenizer) -> Path:
    """A random 2-layer model with the demo tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", demo_tokenizer, seed=0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray with 8 logical CPUs and a small object store, shared by the session."""
    import ray

    ray.init(
        num_cpus=8,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    yield
    ray.shutdown()
