"""The command, end to end: trials on one pass of the teacher, one that dies, an interruption, the best config."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import yaml

from raykd.cli import exit_code, load_config
from raykd.evaluation.sweep_records import read_records
from raykd.tracing import read_metrics
from raykd.training.checkpoint import latest_checkpoint
from raykd.training.search_space import reported_metrics
from raykd.tune import main
from tests.conftest import save_tiny_model

NUM_PROMPTS, NUM_HELD_OUT = 12, 4


@pytest.fixture(scope="session")
def files(tmp_path_factory, demo_tokenizer, tiny_model_path) -> list[str]:
    """A run of three steps, and a sweep of three trials over it, one at a time."""
    folder = tmp_path_factory.mktemp("tune")
    save_tiny_model(folder / "student", demo_tokenizer, seed=1, num_layers=1)
    for name, count in (("prompts", NUM_PROMPTS), ("held_out", NUM_HELD_OUT)):
        rows = [json.dumps({"prompt": f"{name}: what is {i} times {i + 3}?"}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    base = {
        "run": {"dir": str(folder / "runs"), "name": "sweep"},
        "teacher": {
            "kind": "hf",
            "model": str(tiny_model_path),
            "dtype": "float32",
            "top_k": 8,
            "max_model_len": 64,
            "batch_size": 16,
            "sampling": {"max_tokens": 8},
        },
        "student": {"model": str(folder / "student")},
        "data": {"prompts": str(folder / "prompts.jsonl"), "held_out": str(folder / "held_out.jsonl"), "fixed_order": True},
        "train": {"sequences_per_step": 4, "log_every": 1, "validate_every": 1, "checkpoint_every": 1, "max_failures": 0},
        "tracking": {"tensorboard": False},
    }
    tune = {
        "space": {"train.learning_rate": {"grid": [1e-3, 1e-2, 1e-9]}},
        "searcher": "grid",
        "max_concurrent": 1,
        "scheduler": "asha",
        "grace_steps": 1,
        "max_failures": 1,
    }
    for name, content in (("base", base), ("space", {"tune": tune})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(folder / "base.yaml"), str(folder / "space.yaml")]


def folder_of(files: list[str], name: str) -> Path:
    return Path(files[1]).parent / "runs" / name


def steps(trial: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(trial / "metrics.jsonl") if "loss/total" in entry]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on_with_what_is_left(files, ray_cluster, monkeypatch, tmp_path, capsys):
    """Trial 0 dies before its third step. Its second attempt waits before it, and the driver is killed. On --resume it goes
    on from its checkpoint; trial 1 runs to its end, and trial 2, which learns nothing, is stopped early."""
    folder = folder_of(files, "sweep")
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "RAYKD_FAULT": f"worker:exit@step=3;once={tmp_path / 'struck'}",
    }
    first = folder / "trials" / "0"
    driver = subprocess.Popen([sys.executable, "-m", "raykd.tune", *files], env=environment, start_new_session=True)
    while not (first / "trial.json").exists() or read_records(folder)[0].attempts < 2:
        assert driver.poll() is None, f"the driver ended with {driver.returncode}"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert (tmp_path / "struck").exists()
    assert latest_checkpoint(first) is not None

    assert main([*files, "--resume"]) == 0
    records = read_records(folder)
    assert [record.state for record in records] == ["done", "done", "stopped"]
    assert [record.settings["train.learning_rate"] for record in records] == [1e-3, 1e-2, 1e-9]
    assert steps(first) == [1, 2, 3]
    assert records[2].step < 3
    # The teacher was asked once, for all trials.
    facts = json.loads((folder / "report" / "sweep.json").read_text())
    assert facts["teacher"]["rows"] == NUM_PROMPTS + NUM_HELD_OUT
    assert facts["teacher"]["tokens"] > 0
    assert facts["teacher"]["tokens_in_trials"] == 0
    assert "once for 3 trials" in capsys.readouterr().out
    assert (folder / "report" / "parallel-coordinates.svg").exists()
    # The best config is one to train with, and knows the cache.
    best = load_config([folder / "report" / "best.yaml"])
    assert best.tune is None
    assert best.train.learning_rate == records[facts["best"]].settings["train.learning_rate"]
    assert best.data.teacher_cache == str(folder / "teacher_cache")
    # Everything a run reports of its student can be a metric.
    [entry] = read_metrics(first / "metrics.jsonl")[-1:]
    kinds = ("loss/", "accuracy/", "teacher_", "student_", "response_nll")
    reported = {name for name in entry if name.removeprefix("validation/").startswith(kinds)}
    assert reported <= set(reported_metrics(best))

    before = [path.stat().st_mtime_ns for path in sorted(folder.glob("trials/*/metrics.jsonl"))]
    assert main([*files, "--resume"]) == 0  # nothing is left: the trials are only read
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("trials/*/metrics.jsonl"))] == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_fails_does_not_end_the_sweep(files, ray_cluster):
    """The first learning rate gives no numbers, which no second try would mend; Optuna's others come through."""
    words = [
        "run.name=failing",
        "tune.searcher=optuna",
        "tune.num_trials=2",
        "tune.max_concurrent=2",
        "tune.scheduler=none",
        "tune.grace_steps=null",
        "train.max_skipped_steps=1",
        "train.max_steps=2",
        "tune.seed=0",
    ]
    space = yaml.safe_dump({"tune": {"space": {"train.learning_rate": {"choice": [1e30, 1e-3]}}}})
    own = Path(files[1]).parent / "failing.yaml"
    own.write_text(space)
    base, sweep = files[1:]
    content = yaml.safe_load(Path(sweep).read_text())
    content["tune"]["space"] = {"train.learning_rate": {"choice": [1e30, 1e-3]}}
    own.write_text(yaml.safe_dump(content))
    assert main(["--config", base, str(own), *words]) == 0
    records = read_records(folder_of(files, "failing"))
    by_rate = {record.settings["train.learning_rate"]: record for record in records}
    assert by_rate[1e-3].state == "done"
    assert by_rate[1e30].state == "failed"
    assert by_rate[1e30].attempts == 1
    assert "1 steps in a row" in by_rate[1e30].message


def test_plan_starts_nothing(files, capsys):
    assert main([*files, "run.name=planned", "--plan"]) == 0
    assert "3 trials, 1 at a time, on one pass of the teacher" in capsys.readouterr().out
    assert not folder_of(files, "planned").exists()


def test_other_commands_refuse_the_section_and_this_one_needs_it(files, capsys):
    from raykd import train

    assert exit_code(lambda: train.main(files)) == 1
    assert "a sweep over train.learning_rate has no effect in this command" in capsys.readouterr().err
    assert exit_code(lambda: main(files[:2])) == 1
    assert "tune: found no such section" in capsys.readouterr().err


def test_a_mistake_in_the_space_is_one_line_and_exit_code_1(files, capsys):
    assert exit_code(lambda: main([*files, "tune.space.loss.kdd={choice: [1, 2]}"])) == 1
    assert "loss.kdd: no such option; did you mean 'kd'" in capsys.readouterr().err
