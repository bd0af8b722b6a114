"""Every file of configs/ makes a run whose plan is sound; those of the demo train, with the live teacher they name."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from raykd.cli import load_configs
from raykd.config import Config
from raykd.demo import answers, corpus, offline
from raykd.tracing import read_metrics
from raykd.train import main
from raykd.training.checkpoint import latest_checkpoint, read_state
from raykd.training.preflight import check, print_summary
from tests.conftest import save_tiny_model

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
UNDER = {
    "answer_generation.yaml": ["qwen3_8b_to_0.6b.yaml"],
    "demo_all.yaml": ["demo.yaml"],
    "process_supervision.yaml": ["qwen3_8b_to_0.6b.yaml"],
    "quant_qat_int8.yaml": ["qwen3_8b_to_0.6b.yaml"],
}
"""What files that are no run by themselves are laid over."""
BESIDE = {"kd_recipe.yaml": ["teacher.model=models/teacher", "student.model=models/student"]}
"""What files leave open."""

DISK = SimpleNamespace(free=2**42)
"""In place of this machine's: checkpoints of large students need hundreds of GB."""


@pytest.fixture(scope="module")
def world(tmp_path_factory, demo_tokenizer) -> Path:
    """A folder that looks like the repository's, with a tiny model to stand for any other."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("raykd", "configs"):
        (folder / name).symlink_to(ROOT / name)
    save_tiny_model(folder / "tiny", demo_tokenizer, seed=0, max_positions=65_536)
    return folder


def make_what_is_named(config: Config, world: Path) -> None:
    """Models and rows where the config looks for them and nothing is."""
    models = (config.teacher.tokenizer_folder, config.student.model, config.student.tokenizer_folder)
    rows = (config.data.prompts, config.data.held_out, *(file.path for file in config.data.offline))
    for path in (Path(name) for name in (*models, *rows) if name is not None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and str(path) in models:
            path.symlink_to(world / "tiny")
        elif not path.exists():
            path.write_text(json.dumps({"prompt": "?", "teacher_text": "!"}) + "\n")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_shipped_config_is_a_sound_plan_for_what_it_names(file, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DISK)
    words = [[str(ROOT / "configs" / name) for name in [*UNDER.get(file.name, []), file.name]], BESIDE.get(file.name, [])]
    for config in load_configs(*words):
        make_what_is_named(config, world)
    for config in load_configs(*words):
        print_summary(config, check(config), numbers=None, cluster=None)
        assert f"name: {config.run.name}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def demo_world(world) -> Path:
    """The same with a few rows of the demo world where scripts/demo_rows.sh makes many."""
    rows = world / "runs" / "demo-prompts"
    corpus.main(["--out", str(rows), "--train", "12", "--held-out", "2"])
    offline.main(["--out", str(rows / "offline.jsonl"), "--rows", "12"])
    answers.main(["--out", str(rows / "answers.jsonl"), "--answers", "12"])
    answers.main(["--out", str(rows / "held_out_answers.jsonl"), "--answers", "2", "--split", "held_out"])
    return world


def train(files: list[str], *options: str) -> tuple[int, list[Config]]:
    """Two steps of what the files describe, through the command; its exit code, and the configs."""
    small = ["train.max_steps=2", "train.log_every=1", "tracking.tensorboard=false", "tracking.progress_bar=false"]
    small += ["teacher.max_num_seqs=8", "teacher.batch_size=6", "teacher.concurrent_batches=1"]
    small += ["teacher.sampling.max_tokens=40", *options]
    paths = [str(ROOT / "configs" / file) for file in files]
    return main(["--config", *paths, *small]), load_configs(paths, [word for word in small if "=" in word])


def check_run(config: Config) -> None:
    """The run made two steps, with kd or self_kd and every other loss in the logs."""
    run = Path(config.run.dir) / config.run.name
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == 2
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all(math.isfinite(entry["loss/total"]) and entry["count/kd"] > 0 for entry in entries)
    assert {name for name in entries[0] if name.startswith("count/")} == {f"count/{term}" for term in config.loss.terms}


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_the_demo_trains_with_every_loss_on_as_it_is_shipped(demo_world, monkeypatch, ray_cluster):
    monkeypatch.chdir(demo_world)
    code, (config,) = train(["demo.yaml", "demo_all.yaml"], "rollouts.max_tokens=16")
    assert code == 0
    check_run(config)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_the_pipeline_trains_its_four_stages_and_goes_on_where_it_stopped(demo_world, monkeypatch, ray_cluster, caplog):
    monkeypatch.chdir(demo_world)
    code, configs = train(["pipeline.yaml"])
    assert code == 0
    assert [config.stage for config in configs] == ["kd", "process", "answer", "qat"]
    for config in configs:
        check_run(config)
    shutil.rmtree(Path(configs[-1].run.dir) / configs[-1].run.name)
    kept = {config.run.name: finished(config) for config in configs[:3]}
    caplog.clear()
    caplog.set_level(logging.INFO, logger="raykd.train")
    assert train(["pipeline.yaml"], "--resume")[0] == 0  # with the flag, which stages that have not begun do not need
    assert [record.message for record in caplog.records if "is done" in record.message] == [
        f"stage {number} of 4, {name}, is done" for number, name in enumerate(kept, 1)
    ]
    assert {config.run.name: finished(config) for config in configs[:3]} == kept
    check_run(configs[-1])


def finished(config: Config) -> str:
    """What a stage says of itself at its end."""
    return (Path(config.run.dir) / config.run.name / "manifest.json").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_what_make_plan_runs_plans_a_recipe_and_a_stage_on_top_of_it():
    """With stand-ins of the true sizes: the numbers of parameters are the published ones."""
    names = ["worker_9b", "qwen3_8b_to_0.6b + quant_qat_int8"]
    found = subprocess.run(
        [sys.executable, ROOT / "scripts" / "plan.py", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for words in ("8,047,038,464 parameters", "596,049,920 parameters", "stage: qat", "on GPUs"):
        assert words in found.stdout, words
