"""Every file of configs/ makes a run whose plan is sound; those of the demo train, with the live teacher they name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from raykd.cli import load_configs
from raykd.config import Config
from raykd.demo import corpus, offline
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
    models = (config.teacher.model, config.student.model, config.student.tokenizer_folder)
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
def rows(tmp_path_factory) -> Path:
    """A few rows of the demo world, as scripts/demo.sh makes many."""
    folder = tmp_path_factory.mktemp("rows")
    corpus.main(["--out", str(folder), "--train", "12", "--held-out", "2", "--answers", "2"])
    offline.main(["--out", str(folder / "offline.jsonl"), "--rows", "12"])
    return folder


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("files", [["demo.yaml"], ["demo.yaml", "demo_all.yaml"]], ids=["demo", "demo_all"])
def test_the_demos_train_as_they_are_shipped(files, rows, tmp_path, monkeypatch, ray_cluster):
    monkeypatch.chdir(ROOT)
    options = [f"run.dir={tmp_path}", f"data.prompts={rows}/train.jsonl", f"data.held_out={rows}/held_out.jsonl"]
    options += ["train.max_steps=2", "train.log_every=1", "tracking.tensorboard=false", "tracking.progress_bar=false"]
    options += ["teacher.max_num_seqs=8", "teacher.batch_size=6", "teacher.concurrent_batches=1"]
    options += ["teacher.sampling.max_tokens=40"]
    if "demo_all.yaml" in files:
        options += [f"data.offline=[{{path: {rows}/offline.jsonl, weight: 0.5}}]", "rollouts.max_tokens=16"]
    words = [str(ROOT / "configs" / file) for file in files] + options
    (config,) = load_configs(words[: len(files)], options)
    assert main(["--config", *words]) == 0
    run = tmp_path / config.run.name
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == 2
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all(math.isfinite(entry["loss/total"]) and entry["count/kd"] > 0 for entry in entries)
    assert {name for name in entries[0] if name.startswith("count/")} == {f"count/{term}" for term in config.loss.terms}
