"""Runs and a sweep on one shared teacher, which has its engine in vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray import serve

from raykd.data.sources import PromptSet
from raykd.train import main as train
from raykd.training.checkpoint import latest_checkpoint, read_ledger
from raykd.tune import main as tune
from teacher_serving.config import SamplingConfig, ServedTeacherConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.serve_config import ENGINES, ServeConfig
from tests.conftest import save_student_and_questions
from tests.shared_teacher import shared_teacher

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.long]

NUM_PROMPTS, NUM_HELD_OUT = 24, 4


@pytest.fixture(scope="module")
def engine(tiny_model_path: Path) -> VllmTeacherConfig:
    """The engine behind the service."""
    return VllmTeacherConfig(
        model=str(tiny_model_path),
        dtype="float32",
        device="cpu",
        top_k=16,
        max_model_len=128,
        max_num_seqs=16,
        kv_cache_memory_bytes=32 << 20,
        sampling=SamplingConfig(max_tokens=8),
    )


@pytest.fixture(scope="module")
def service(ray_cluster: None, engine: VllmTeacherConfig) -> Iterator[ServeConfig]:
    with shared_teacher(teacher=engine) as config:
        yield config


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer, service: ServeConfig, engine: VllmTeacherConfig
) -> Path:
    """Where base.yaml is, a run of six steps on the service."""
    folder = tmp_path_factory.mktemp("served")
    config: dict[str, Any] = {
        "run": {"dir": str(folder / "runs")},
        "teacher": {
            "kind": "served",
            "app": service.app,
            "tokenizer": engine.model,
            "top_k": 8,
            "max_model_len": 64,
            "batch_size": 4,
            "sampling": {"max_tokens": 12},
        },
        **save_student_and_questions(folder, demo_tokenizer, prompts=NUM_PROMPTS, held_out=NUM_HELD_OUT),
        "train": {"sequences_per_step": 4, "log_every": 1, "validate_every": 3, "checkpoint_every": 3},
        "tracking": {"tensorboard": False, "progress_bar": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return folder


def cached(folder: Path) -> list[dict[str, Any]]:
    """Every answer in the teacher caches below a folder."""
    return [row for file in folder.glob("**/teacher_cache/*/*.parquet") for row in pq.read_table(file).to_pylist()]


def assert_trained_on_all_once(run: Path) -> None:
    index = PromptSet(**json.loads((run / "prompts" / "prompt_set.json").read_text())["prompt_set"]).index()
    uids = index["uid"].to_numpy()[~index["held_out"].to_numpy(zero_copy_only=False)]
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert np.array_equal(read_ledger(checkpoint), np.sort(uids))
    assert len(uids) == NUM_PROMPTS


def test_two_runs_at_once_share_one_teacher_each_with_settings_of_its_own(folder: Path, service: ServeConfig):
    """One is in the teacher's cluster and asks its engine, the other knows an address alone."""
    other = [
        "run.name=by_address",
        "teacher.app=null",
        f"teacher.address=http://127.0.0.1:{service.port}",
        "teacher.top_k=5",
        "teacher.sampling.max_tokens=7",
    ]
    command = [sys.executable, "-m", "raykd.train", "--config", str(folder / "base.yaml"), *other]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": root}
    beside = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert train(["--config", str(folder / "base.yaml"), "run.name=by_app"]) == 0
    assert beside.wait() == 0, beside.stderr and beside.stderr.read()
    for name, top_k, most in (("by_app", 8, 12), ("by_address", 5, 7)):
        run = folder / "runs" / name
        assert_trained_on_all_once(run)
        answers = cached(run)
        assert len({row["uid"] for row in answers}) == len(answers) == NUM_PROMPTS + NUM_HELD_OUT
        assert {row["top_k"] for row in answers} == {top_k}
        assert max(len(row["output_ids"]) for row in answers) <= most
    states = serve.status().applications[service.app].deployments[ENGINES].replica_states
    assert {getattr(state, "value", state): count for state, count in states.items()} == {"RUNNING": 1}


def test_a_sweep_asks_the_shared_teacher_once_for_all_its_trials(folder: Path):
    space = {"space": {"train.learning_rate": {"grid": [1e-4, 1e-3]}}, "searcher": "grid", "max_concurrent": 2}
    (folder / "space.yaml").write_text(yaml.safe_dump({"tune": space}))
    assert tune(["--config", str(folder / "base.yaml"), str(folder / "space.yaml"), "run.name=sweep"]) == 0
    sweep = folder / "runs" / "sweep"
    told = json.loads((sweep / "report" / "sweep.json").read_text())["teacher"]
    answers = cached(sweep)
    assert len({row["uid"] for row in answers}) == len(answers) == NUM_PROMPTS + NUM_HELD_OUT
    assert told == {
        "rows": len(answers),
        "tokens": sum(len(row["output_ids"]) for row in answers),
        "cached_rows": 0,
        "tokens_in_trials": 0,
    }
    for trial in ("0", "1"):
        assert_trained_on_all_once(sweep / "trials" / trial)


def test_a_vllm_engine_answers_through_the_service_as_one_of_ones_own(
    folder: Path, service: ServeConfig, engine: VllmTeacherConfig
):
    own = connect(engine)
    ids = np.random.default_rng(0).integers(0, 1000, (12, 9), dtype=np.int32)
    prompts = pa.table({"uid": range(12), "prompt_ids": list(ids)})
    common: dict[str, Any] = {"tokenizer": engine.model, "top_k": engine.top_k, "sampling": engine.sampling}
    written = own.generate(prompts)
    given = written.select(["uid", "prompt_ids", "output_ids"])
    scored = own.score(given)
    for way in ({"app": service.app}, {"address": f"http://127.0.0.1:{service.port}"}):
        served = connect(ServedTeacherConfig(**way, **common, max_model_len=engine.max_model_len))
        assert served.info == own.info
        for answers, expected in ((served.generate(prompts), written), (served.score(given), scored)):
            assert answers.select(["uid", "output_ids", "finish_reason"]).equals(
                expected.select(["uid", "output_ids", "finish_reason"])
            )
            for name in ("topk_logprobs", "sampled_logprob", "log_tail"):  # batches differ, and with them the last bits
                found, wanted = (table[name].combine_chunks().flatten().to_numpy() for table in (answers, expected))
                np.testing.assert_allclose(found, wanted, atol=2e-3)
    own.close()
