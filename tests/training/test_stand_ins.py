"""raykd/training/simulated.py: a run without its models is the same run, but for the models."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import make_config, make_feed, make_rows, save_student

from raykd.cli import load_config
from raykd.data.sources import PromptSet
from raykd.student.model import load_student
from raykd.tracing import read_metrics
from raykd.train import main
from raykd.training.checkpoint import latest_checkpoint, read_ledger, read_state
from raykd.training.loop import fit
from raykd.training.preflight import check
from raykd.training.simulated import with_stand_ins
from raykd.training.trainer import make_trainer
from teacher_serving.config import SimulatedTeacherConfig
from tests.conftest import save_student_and_questions

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory, demo_tokenizer, tiny_model_path) -> Path:
    """Models without their weights, and prompts."""
    folder = tmp_path_factory.mktemp("world")
    save_student_and_questions(folder, demo_tokenizer, prompts=NUM_PROMPTS, held_out=2)
    shutil.copytree(tiny_model_path, folder / "teacher")
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return folder


def words(world: Path, *overrides: str) -> list[str]:
    """A recipe of eight GPUs, its teacher over four of them."""
    files = {name: f"{world / name}.jsonl" for name in ("prompts", "held_out")}
    return [
        str(CONFIGS / "qwen3_32b_to_1.7b.yaml"),
        f"teacher.model={world / 'teacher'}",
        f"student.model={world / 'student'}",
        *(f"data.{name}={path}" for name, path in files.items()),
        "teacher.max_model_len=512",
        "teacher.sampling.max_tokens=64",
        f"run.dir={world / 'runs'}",
        *overrides,
    ]


def test_stand_ins_take_the_place_of_the_models_and_of_nothing_else(world: Path):
    given, *overrides = words(world, "simulate=both", "rates.teacher_tokens_per_s=123", "rates.response_tokens=9")
    real = load_config([given], overrides)
    config = with_stand_ins(real)
    assert with_stand_ins(config) == config
    teacher = config.teacher
    assert isinstance(teacher, SimulatedTeacherConfig)
    assert (teacher.tokens_per_s, teacher.response_tokens, teacher.gpus_per_actor) == (123, 9, 0)
    for name in ("top_k", "num_replicas", "batch_size", "concurrent_batches", "max_num_seqs", "sampling"):
        assert getattr(teacher, name) == getattr(real.teacher, name), name
    assert not config.train.use_gpu
    for section in ("data", "loss", "latent", "halt", "rollouts"):
        assert getattr(config, section) == getattr(real, section)
    assert check(config).student_size.parameters < 20_000
    step_alone = with_stand_ins(load_config([given], [*overrides, "simulate=step"]))
    assert step_alone.teacher == real.teacher
    teacher_alone = with_stand_ins(load_config([given], [*overrides, "simulate=teacher"]))
    assert (teacher_alone.student, teacher_alone.train) == (real.student, real.train)
    assert isinstance(teacher_alone.teacher, SimulatedTeacherConfig)


def test_a_stand_in_of_the_student_has_its_vocabulary_and_layers_and_no_width(tmp_path: Path):
    save_student(tmp_path)
    real = make_config(tmp_path)
    stand_in = load_student(real.student.model_copy(update={"stand_in": True}), seed=0).model.config
    architecture = load_student(real.student, seed=0).model.config
    for name in ("vocab_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(stand_in, name) == getattr(architecture, name), name
    assert stand_in.hidden_size == 4
    cut = load_student(real.student.model_copy(update={"stand_in": True, "layers": (1,)}), seed=0)
    assert cut.model.config.num_hidden_layers == 1


def test_a_step_takes_its_time_and_leaves_the_weights_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    save_student(tmp_path / "student")
    sections = {"simulate": "step", "rates": {"worker_tokens_per_s": 50.0}, "loss": {"kd": 1.0, "self_kd": 1.0}}
    config = with_stand_ins(make_config(tmp_path / "student", **sections))
    trainer = make_trainer(config, tmp_path / "run", num_steps=3, teacher={"fingerprint": "f"})
    assert trainer.reference is None
    before = {name: parameter.clone() for name, parameter in trainer.student.named_parameters()}
    rows = make_rows(20)
    logged: list[dict[str, float]] = []
    feed = make_feed(trainer, [rows, make_rows(2, seed=1, held_out=True)])
    fit(trainer, feed, log=lambda _, metrics: logged.append(dict(metrics)), stop=lambda: False, before_step=lambda _: None)
    lengths = rows["input_ids"].combine_chunks().value_lengths().to_numpy()
    assert slept == pytest.approx([lengths[start : start + 8].sum() / 50.0 for start in (0, 8, 16)])
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.student.named_parameters())
    assert [entry["sequences"] for entry in logged] == [8, 16, 20]
    assert not any(name.startswith(("loss/", "validation/")) for entry in logged for name in entry)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert np.array_equal(read_ledger(checkpoint), np.arange(20))
    again = make_trainer(config, tmp_path / "run", num_steps=3, teacher={"fingerprint": "f"})
    assert again.progress.step == 3
    assert all(torch.equal(before[name], parameter) for name, parameter in again.student.named_parameters())


@pytest.mark.ray
def test_a_recipe_for_eight_gpus_trains_without_one_and_without_weights(world: Path, ray_cluster):
    quick = ["train.sequences_per_step=6", "train.num_workers=2", "teacher.num_replicas=2", "teacher.batch_size=6"]
    quick += ["data.num_extractors=1", "rates.response_tokens=20", "rates.teacher_tokens_per_s=5000", "train.log_every=1"]
    quick += ["tracking.tensorboard=false", "tracking.progress_bar=false", "data.length_stages=[]"]
    assert main(["--config", *words(world, *quick), "--simulate", "both"]) == 0
    run = world / "runs" / "qwen3-32b-to-1.7b"
    index = PromptSet(**json.loads((run / "prompts" / "prompt_set.json").read_text())["prompt_set"]).index()
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    trained = np.sort(index["uid"].to_numpy()[~index["held_out"].to_numpy(zero_copy_only=False)])
    assert np.array_equal(read_ledger(checkpoint), trained)
    assert read_state(checkpoint)["step"] >= 4
    assert sum(file.stat().st_size for file in checkpoint.rglob("*")) < 500_000
    entries = read_metrics(run / "metrics.jsonl")
    assert sum(entry["speed/teacher_tokens_per_s"] * entry["seconds"] for entry in entries) > 100
    assert (run / "teacher_cache").is_dir()
