"""The command, end to end: trials on one pass of the teacher, one that dies, an interruption, the best config."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import ray
import yaml

from raykd.cli import exit_code, load_config, run_folder
from raykd.evaluation.sweep_records import TrialRecord, read_records, write_record
from raykd.tracing import read_metrics
from raykd.training.distributed import STOP_FILE
from raykd.training.search_space import reported_metrics
from raykd.tune import EARLY, StopEarly, Sweep, Trial, main
from tests.conftest import save_student_and_questions

NUM_PROMPTS, NUM_HELD_OUT = 12, 4


@pytest.fixture(scope="session")
def files(tmp_path_factory, demo_tokenizer, tiny_model_path) -> list[str]:
    """A run of three steps, and a sweep of two trials over it."""
    folder = tmp_path_factory.mktemp("tune")
    student_and_data = save_student_and_questions(folder, demo_tokenizer, prompts=NUM_PROMPTS, held_out=NUM_HELD_OUT)
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
        **student_and_data,
        "train": {
            "sequences_per_step": 4,
            "log_every": 1,
            "validate_every": 1,
            "checkpoint_every": 1,
            "max_failures": 0,
            "max_skipped_steps": 1,
        },
        "tracking": {"tensorboard": False},
    }
    tune = {
        "space": {"train.learning_rate": {"grid": [1e-3, 1e30]}},
        "searcher": "grid",
        "max_concurrent": 2,
        "max_failures": 1,
    }
    for name, content in (("base", base), ("space", {"tune": tune})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(folder / "base.yaml"), str(folder / "space.yaml")]


def folder_of(files: list[str], name: str) -> Path:
    return Path(files[1]).parent / "runs" / name


def steps(trial: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(trial / "metrics.jsonl") if "loss/total" in entry]


def start_driver(files: list[str], fault: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "RAYKD_FAULT": fault,
    }
    return subprocess.Popen([sys.executable, "-m", "raykd.tune", *files], env=environment, start_new_session=True)


@pytest.mark.ray
@pytest.mark.long
def test_a_sweep_whose_driver_is_killed_goes_on_with_what_is_left(files, ray_cluster, monkeypatch, tmp_path, capsys):
    """Trial 0 waits before its third step, trial 1 has a learning rate that gives no numbers; then the driver is killed. On
    --resume, 0 goes on from its checkpoint, dies, and is started again."""
    folder = folder_of(files, "sweep")
    first = folder / "trials" / "0"
    driver = start_driver(files, "worker:wait@step=3")
    states: list[str] = []
    while states != ["unfinished", "failed"] or not (first / "metrics.jsonl").exists() or steps(first) != [1, 2]:
        assert driver.poll() is None, f"the driver ended with {driver.returncode}"
        time.sleep(0.1)
        states = [record.state for record in read_records(folder)]
    driver.kill()
    driver.wait()

    monkeypatch.setenv("RAYKD_FAULT", f"worker:exit@step=3;once={tmp_path / 'struck'}")
    assert main([*files, "--resume"]) == 0
    assert (tmp_path / "struck").exists()
    records = read_records(folder)
    assert [record.state for record in records] == ["done", "failed"]
    assert [record.attempts for record in records] == [3, 2]
    assert steps(first) == [1, 2, 3]
    assert "1 steps in a row" in records[1].message
    assert_one_pass_of_the_teacher(folder, capsys.readouterr().out)
    assert_best_config_is_ready(folder)


def assert_one_pass_of_the_teacher(folder: Path, printed: str) -> None:
    teacher = json.loads((folder / "report" / "sweep.json").read_text())["teacher"]
    caches = list(folder.glob("**/teacher_cache/*/*.parquet"))
    assert all(file.is_relative_to(folder / "teacher_cache") for file in caches)
    tokens = sum(len(ids) for file in caches for ids in pq.read_table(file)["output_ids"].to_pylist())
    assert teacher == {"rows": NUM_PROMPTS + NUM_HELD_OUT, "tokens": tokens, "cached_rows": 0, "tokens_in_trials": 0}
    assert f"16 prompts with {tokens} tokens, once for 2 trials" in printed


def assert_best_config_is_ready(folder: Path) -> None:
    """It is that of the only trial that came to its end, and its metrics are among those that a sweep may look at."""
    best = load_config([folder / "report" / "best.yaml"])
    assert (best.tune, best.train.learning_rate, best.run.name) == (None, 1e-3, "sweep-best")
    assert best.data.teacher_cache == str(folder / "teacher_cache")
    entry = read_metrics(folder / "trials" / "0" / "metrics.jsonl")[-1]
    kinds = ("loss/", "accuracy/", "teacher_", "student_", "response_nll")
    reported = {name for name in entry if name.removeprefix("validation/").startswith(kinds)}
    assert "validation/teacher_kl" in reported
    assert reported <= set(reported_metrics(best))


def make_trial(files: list[str], folder: Path, monkeypatch, train: Callable[[Path], int]) -> Trial:
    """Trial 0 of a sweep in `folder`; `train` stands for the run: it is given its folder."""
    monkeypatch.setattr("raykd.tune.run_stage", lambda run, resume: train(run_folder(run)))
    monkeypatch.setattr("raykd.tune.POLL_S", 0.01)
    if not read_records(folder):
        write_record(folder, TrialRecord(0, {"train.learning_rate": 0.25}))
    trial = Trial.__new__(Trial)  # outside of Tune, whose actor makes it
    trial.setup({"number": 0}, Sweep(load_config(files[1:]), folder, {}))
    return trial


def log(run: Path, *values: tuple[int, float]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "validation/teacher_kl": value}) + "\n" for step, value in values)


def results(trial: Trial) -> list[tuple[int, float, bool]]:
    """All that a trial tells Tune."""
    told: list[tuple[int, float, bool]] = []
    while not told or not told[-1][2]:
        told.append(tuple(trial.step().values()))
    return told


def test_a_trial_tells_every_value_once_and_again_when_the_sweep_is_resumed(files, monkeypatch, tmp_path):
    def train(run: Path) -> int:
        log(run, (1, 0.5), (2, 0.4), (3, 0.3))
        return 0

    told = results(make_trial(files, tmp_path, monkeypatch, train))
    assert told == [(1, 0.5, False), (2, 0.4, False), (3, 0.3, True)]
    [record] = read_records(tmp_path)
    assert (record.state, record.step, record.value, record.attempts) == ("done", 3, 0.3, 1)

    def never(run: Path) -> int:
        raise AssertionError("a trial that is done is not trained again")

    assert results(make_trial(files, tmp_path, monkeypatch, never)) == told
    assert read_records(tmp_path) == [record]


@pytest.mark.parametrize(("whose", "state"), [("scheduler", "stopped"), ("user", "unfinished")])
def test_a_trial_that_is_asked_to_stop_leaves_by_itself(files, monkeypatch, tmp_path, whose, state):
    def train(run: Path) -> int:
        log(run, (1, 0.5))
        while not (run / STOP_FILE).exists():
            time.sleep(0.01)
        log(run, (2, 0.4))
        return 143

    trial = make_trial(files, tmp_path, monkeypatch, train)
    assert trial.step() == {"step": 1, "value": 0.5, "done": False}
    if whose == "scheduler":
        (tmp_path / "trials" / "0" / STOP_FILE).write_text(EARLY)
    else:
        (tmp_path / STOP_FILE).touch()
    assert results(trial)[-1] == (2, 0.4, True)
    assert read_records(tmp_path)[0].state == state


def test_only_what_a_restart_may_mend_is_raised_for_tune_to_try_again(files, monkeypatch, tmp_path):
    def die(run: Path) -> int:
        raise RuntimeError("the node is gone")

    with pytest.raises(RuntimeError, match="the node is gone"):
        results(make_trial(files, tmp_path, monkeypatch, die))
    [record] = read_records(tmp_path)
    assert (record.state, record.message) == ("unfinished", "RuntimeError: the node is gone")

    def diverge(run: Path) -> int:
        log(run, (1, 0.5))
        raise ValueError("no numbers")

    assert results(make_trial(files, tmp_path, monkeypatch, diverge)) == [(1, 0.5, True)]
    [record] = read_records(tmp_path)
    assert (record.state, record.message, record.attempts) == ("failed", "no numbers", 2)


def test_options_that_do_not_go_together_end_the_trial_at_once(files, monkeypatch, tmp_path):
    """Each alone would be right, which is all that can be known before the trials are drawn."""
    write_record(tmp_path, TrialRecord(0, {"loss.kd_support": "topk_tail", "loss.kd_temperature": 2.0}))
    [(step, value, done)] = results(make_trial(files, tmp_path, monkeypatch, lambda run: 0))
    assert (step, done) == (-1, True)
    assert math.isnan(value)
    [record] = read_records(tmp_path)
    assert (record.state, record.attempts) == ("failed", 1)
    assert "kd_temperature" in record.message


def test_a_metric_that_never_comes_is_a_failure_that_says_so(files, monkeypatch, tmp_path):
    [(step, value, done)] = results(make_trial(files, tmp_path, monkeypatch, lambda run: 0))
    assert (step, done) == (-1, True)
    assert math.isnan(value)
    assert "the data has nothing for it" in read_records(tmp_path)[0].message


def test_asha_asks_the_worse_half_to_stop_and_never_kills(tmp_path):
    """At step 4 every second trial goes on: the first always, the others when they are among the better half so far."""
    scheduler = StopEarly(tmp_path, time_attr="step", metric="value", mode="min", grace_period=4, reduction_factor=2)
    stopped, controller = [], cast(Any, None)
    for number, value in enumerate([0.5, 0.6, 0.4, 0.7]):
        trial: Any = SimpleNamespace(trial_id=str(number), config={"number": number})
        stop_file = tmp_path / "trials" / str(number) / STOP_FILE
        stop_file.parent.mkdir(parents=True)
        scheduler.on_trial_add(controller, trial)
        for step in (2, 4):
            assert scheduler.on_trial_result(controller, trial, {"step": step, "value": value}) == "CONTINUE"
            assert step == 4 or not stop_file.exists()
        stopped.append(stop_file.exists() and stop_file.read_text() == EARLY)
    assert stopped == [False, True, False, True]


def test_plan_starts_nothing(files, capsys):
    assert main([*files, "run.name=planned", "--plan"]) == 0
    assert "2 trials, 2 at a time, on one pass of the teacher" in capsys.readouterr().out
    assert not folder_of(files, "planned").exists()


def test_other_commands_refuse_the_section_and_this_one_needs_it(files, capsys):
    from raykd import train

    assert exit_code(lambda: train.main(files)) == 1
    assert "tune: a sweep has no effect in this command" in capsys.readouterr().err
    assert exit_code(lambda: main(files[:2])) == 1
    assert "tune: found no such section" in capsys.readouterr().err


def test_a_mistake_in_the_space_is_one_line_and_exit_code_1(files, capsys):
    assert exit_code(lambda: main([*files, "tune.space.loss.kdd={choice: [1, 2]}"])) == 1
    assert "loss.kdd: no such option; did you mean 'kd'" in capsys.readouterr().err
