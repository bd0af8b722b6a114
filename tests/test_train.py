"""The command, end to end on one Ray cluster: a live teacher, and workers and drivers that die on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml
from safetensors.torch import load_file

from raykd.cli import exit_code
from raykd.data.sources import PromptSet
from raykd.tracing import read_metrics
from raykd.train import main
from raykd.training.checkpoint import latest_checkpoint, list_checkpoints, read_ledger, read_state
from tests.completion_server import completion_server
from tests.conftest import save_student_and_questions

NUM_PROMPTS = 32
NUM_HELD_OUT = 4
NUM_OFFLINE = 16


@pytest.fixture(scope="session")
def config_file(tmp_path_factory, demo_tokenizer, tiny_model_path) -> Path:
    """A run of eight steps in a fixed order, with a checkpoint after every third."""
    folder = tmp_path_factory.mktemp("train")
    student_and_data = save_student_and_questions(folder, demo_tokenizer, prompts=NUM_PROMPTS, held_out=NUM_HELD_OUT)
    for name, count in (("offline", NUM_OFFLINE), ("offline_held_out", NUM_HELD_OUT)):
        rows = [json.dumps({"prompt": f"{name}: {i} plus 3 is ", "teacher_text": f"{i + 3}."}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    config = {
        "run": {"dir": str(folder / "runs")},
        "teacher": {
            "kind": "hf",
            "model": str(tiny_model_path),
            "dtype": "float32",
            "top_k": 8,
            "max_model_len": 64,
            "batch_size": 8,
            "sampling": {"max_tokens": 12},
        },
        **student_and_data,
        "loss": {"kd": 1.0, "ce_teacher": 0.5},
        "train": {
            "sequences_per_step": 4,
            "learning_rate": 1e-3,
            "log_every": 1,
            "validate_every": 4,
            "checkpoint_every": 3,
            "max_failures": 1,
        },
        "tracking": {"tensorboard": False, "progress_bar": False},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def folder_of(config_file: Path, name: str) -> Path:
    return config_file.parent / "runs" / name


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def losses(run: Path) -> list[float]:
    return [entry["loss/total"] for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry]


def train_uids(run: Path) -> np.ndarray:
    index = PromptSet(**json.loads((run / "prompts" / "prompt_set.json").read_text())["prompt_set"]).index()
    return np.sort(index["uid"].to_numpy()[~index["held_out"].to_numpy(zero_copy_only=False)])


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Every prompt went into exactly one step of the final weights, and the steps are those of the other run."""
    assert np.array_equal(read_ledger(newest(run)), train_uids(run))
    assert len(train_uids(run)) == NUM_PROMPTS
    # The teacher's batches differ after a restart, and with them its last float bits.
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-3)
    weights, expected = (load_file(newest(folder) / "student" / "model.safetensors") for folder in (run, undisturbed))
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 1e-4
    state, twin = read_state(newest(run)), read_state(newest(undisturbed))
    assert {name: state[name] for name in ("step", "sequences", "skipped_steps")} == {
        name: twin[name] for name in ("step", "sequences", "skipped_steps")
    }


@pytest.fixture(scope="session")
def undisturbed(config_file, ray_cluster) -> Path:
    """The folder of a run in which nothing died."""
    assert main(["--config", str(config_file), "run.name=undisturbed"]) == 0
    return folder_of(config_file, "undisturbed")


@pytest.mark.ray
def test_a_run_trains_on_every_prompt_once_and_never_on_held_out_ones(undisturbed):
    assert np.array_equal(read_ledger(newest(undisturbed)), train_uids(undisturbed))
    assert [path.name for path in list_checkpoints(undisturbed)] == ["checkpoint-6", "checkpoint-8"]
    entries = read_metrics(undisturbed / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, 9))
    assert [entry["step"] for entry in entries if "validation/teacher_kl" in entry] == [4, 8]
    assert entries[-1]["sequences"] == NUM_PROMPTS
    assert all(entry["speed/teacher_tokens_per_s"] > 0 for entry in entries)
    assert entries[-1]["validation/teacher_kl"] < entries[3]["validation/teacher_kl"]


@pytest.mark.ray
def test_a_run_goes_on_when_a_teacher_dies_and_then_a_worker(config_file, undisturbed, monkeypatch, tmp_path):
    teacher, worker = tmp_path / "teacher", tmp_path / "worker"
    monkeypatch.setenv("RAYKD_FAULT", f"teacher:exit@batch=2;once={teacher} worker:exit@step=5;once={worker}")
    assert main(["--config", str(config_file), "run.name=worker_died"]) == 0
    assert teacher.exists()
    assert worker.exists()
    assert_same_run(folder_of(config_file, "worker_died"), undisturbed)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.long
def test_a_run_goes_on_when_the_process_of_its_teachers_engine_is_killed(config_file, undisturbed, monkeypatch, tmp_path):
    """The engine is in a process of its own, which dies in mid-stream: its actor ends, a new one answers the same block."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("RAYKD_FAULT", f"teacher:engine_kill@batch=2;once={tmp_path / 'struck'}")
    engine = [
        "teacher.kind=vllm",
        "teacher.max_num_seqs=8",
        "teacher.concurrent_batches=1",
        f"teacher.kv_cache_memory_bytes={32 << 20}",
    ]
    assert main(["--config", str(config_file), "run.name=engine_died", *engine]) == 0
    assert (tmp_path / "struck").exists()
    run = folder_of(config_file, "engine_died")
    assert_same_run(run, undisturbed)
    assert not (run / "rejected.jsonl").read_text()


def start_driver(config_file: Path, *words: str, fault: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": str(root),
        "RAYKD_FAULT": fault,
    }
    command = [sys.executable, "-m", "raykd.train", "--config", str(config_file), *words]
    return subprocess.Popen(command, env=environment, cwd=root, start_new_session=True)


def wait_for_step(run: Path, step: int, driver: subprocess.Popen[bytes]) -> None:
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < step:
        assert driver.poll() is None, f"the driver ended with {driver.returncode} before step {step}"
        time.sleep(0.05)


@pytest.mark.ray
def test_a_run_goes_on_after_its_driver_was_asked_to_stop_and_then_killed(config_file, undisturbed):
    run, name = folder_of(config_file, "driver_died"), "run.name=driver_died"
    driver = start_driver(config_file, name, fault="worker:wait@step=4")
    wait_for_step(run, 3, driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait() == 128 + signal.SIGTERM
    stopped_at = read_state(newest(run))["step"]
    assert stopped_at in (3, 4)  # asked before or while the fourth step waited

    driver = start_driver(config_file, name, "--resume", fault="worker:wait@step=6")
    wait_for_step(run, 5, driver)
    driver.kill()
    driver.wait()
    assert read_state(newest(run))["step"] == stopped_at

    assert main(["--config", str(config_file), name, "--resume"]) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.ray
@pytest.mark.long
def test_a_full_disk_ends_a_run_cleanly_and_it_goes_on_once_there_is_room(
    config_file, undisturbed, monkeypatch, capsys, tmp_path
):
    """From step 5 on the worker can write no large file: the checkpoint of step 6 fails."""
    monkeypatch.setenv("RAYKD_FAULT", f"worker:full_disk@step=5;once={tmp_path / 'struck'}")
    command = ["--config", str(config_file), "run.name=full_disk"]
    assert exit_code(lambda: main(command)) == 1
    run = folder_of(config_file, "full_disk")
    error = capsys.readouterr().err
    assert f"{run / 'checkpoints' / 'checkpoint-6'} cannot be written" in error
    assert "MiB are free there" in error
    assert "make room and go on with --resume" in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert main([*command, "--resume"]) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.ray
@pytest.mark.long
def test_a_teacher_that_dies_over_every_prompt_ends_the_run_with_one_message(config_file, undisturbed, monkeypatch, capsys):
    monkeypatch.setenv("RAYKD_FAULT", "teacher:exit@batch=1")
    assert exit_code(lambda: main(["--config", str(config_file), "run.name=hopeless", "teacher.max_restarts=1"])) == 1
    assert "error: a teacher ended 2 times in a row before it had answered anything" in (error := capsys.readouterr().err)
    assert "teacher.max_restarts=1 allows 1" in error


@pytest.mark.ray
@pytest.mark.long
def test_a_worker_that_is_asked_to_end_saves_first(config_file, undisturbed):
    """SIGTERM, and SIGKILL once the checkpoint is there, as a node that is taken away does it; no step is made twice."""
    run = folder_of(config_file, "asked_to_end")
    # The checkpoint that it writes when asked is the only one before the last.
    driver = start_driver(config_file, "run.name=asked_to_end", "train.checkpoint_every=100", fault="worker:slow@ms=1000")
    wait_for_step(run, 4, driver)
    (worker,) = [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if b"RayTrainWorker" in path.read_bytes()
    ]
    os.kill(worker, signal.SIGTERM)
    while (saved := latest_checkpoint(run)) is None:
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    assert driver.wait() == 0
    assert_same_run(run, undisturbed)
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [entry["step"] for entry in entries if "loss/total" in entry]
    assert saved.name in ("checkpoint-5", "checkpoint-6", "checkpoint-7")
    assert len(steps) <= len(losses(undisturbed)) + 1


@pytest.mark.ray
def test_two_workers_and_two_epochs_drop_and_repeat_nothing(config_file, undisturbed):
    options = ["run.name=two", "train.num_workers=2", "train.epochs=2", "train.sequences_per_step=5"]
    assert main(["--config", str(config_file), *options]) == 0
    run = folder_of(config_file, "two")
    ledger = read_ledger(newest(run))
    assert len(ledger) == 2 * NUM_PROMPTS
    assert np.isin(train_uids(run), ledger).all()
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if "loss/total" in entry]
    assert {entry["epoch"] for entry in entries} == {0, 1}
    # The second epoch reads what the teacher said in the first.
    assert all((entry["speed/teacher_tokens_per_s"] > 0) == (entry["epoch"] == 0) for entry in entries)


@pytest.mark.ray
def test_what_only_the_user_can_mend_ends_the_run_with_one_message(config_file, undisturbed, capsys):
    options = ["run.name=diverged", "train.learning_rate=1e30", "train.max_skipped_steps=2", "train.max_failures=0"]
    assert exit_code(lambda: main(["--config", str(config_file), *options])) == 1
    error = capsys.readouterr().err
    assert "error: 2 steps in a row" in error
    assert "Lower train.learning_rate" in error


@pytest.mark.ray
def test_a_damaged_checkpoint_is_refused_before_anything_starts(config_file, undisturbed, capsys):
    run = folder_of(config_file, "damaged")
    shutil.copytree(undisturbed, run)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(saved | {"run": saved["run"] | {"name": "damaged"}}))
    weights = newest(run) / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    command = ["--config", str(config_file), "run.name=damaged", "--resume"]
    assert exit_code(lambda: main(command)) == 1
    assert "has 1000 bytes" in (error := capsys.readouterr().err)
    assert "the one before is" in error


def offline(config_file: Path, *, weight: float = 1.0) -> str:
    return f"data.offline=[{{path: {config_file.parent / 'offline.jsonl'}, weight: {weight}}}]"


@pytest.mark.ray
def test_with_offline_files_alone_there_is_no_teacher(config_file, ray_cluster):
    data = ["data.prompts=null", f"data.held_out={config_file.parent / 'offline_held_out.jsonl'}"]
    no_room = "teacher.num_cpus=64"  # in a cluster of 8
    command = ["--config", str(config_file), "run.name=offline", *data, offline(config_file, weight=1.5), no_room]
    assert main(command) == 0
    run = folder_of(config_file, "offline")
    assert len(np.unique(read_ledger(newest(run)))) == len(read_ledger(newest(run))) == 1.5 * NUM_OFFLINE
    entries = read_metrics(run / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert all(entry["loss/ce_teacher"] > 0 for entry in entries)
    assert [entry["step"] for entry in entries if "validation/loss/total" in entry] == [4, 6]
    assert not (run / "teacher_cache").exists()
    assert not (run / "prompts").exists()


@pytest.fixture(scope="session")
def undisturbed_mixture(config_file, ray_cluster) -> Path:
    """The folder of a run on prompts and offline rows, two to one, in which nothing died.

    Of the CPUs that the worker leaves, each of the two datasets is given half: less than the teacher's.
    """
    options = ["run.name=mixture", offline(config_file), "train.sequences_per_step=6", "teacher.num_cpus=4"]
    assert main(["--config", str(config_file), *options]) == 0
    return folder_of(config_file, "mixture")


@pytest.mark.ray
def test_a_mixture_trains_on_all_rows_of_both_and_every_step_on_some_of_each(config_file, undisturbed_mixture):
    steps = [path.name for path in list_checkpoints(undisturbed_mixture)]
    assert steps == ["checkpoint-6", "checkpoint-8"]
    for path, step in zip(list_checkpoints(undisturbed_mixture), (6, 8), strict=True):
        ledger = read_ledger(path)
        of_prompts = np.isin(ledger, train_uids(undisturbed_mixture))
        assert (int(of_prompts.sum()), int((~of_prompts).sum())) == (4 * step, 2 * step)
    assert len(np.unique(ledger)) == NUM_PROMPTS + NUM_OFFLINE
    entries = read_metrics(undisturbed_mixture / "metrics.jsonl")
    assert all(entry["speed/teacher_tokens_per_s"] > 0 for entry in entries)
    assert [entry["step"] for entry in entries if "validation/teacher_kl" in entry] == [4, 8]


@pytest.mark.ray
@pytest.mark.long
def test_a_mixture_goes_on_after_its_driver_was_killed_and_after_a_worker_died(
    config_file, undisturbed_mixture, monkeypatch, tmp_path
):
    options = ["run.name=mixture_died", offline(config_file), "train.sequences_per_step=6", "teacher.num_cpus=4"]
    run = folder_of(config_file, "mixture_died")
    driver = start_driver(config_file, *options, fault="worker:wait@step=5")
    wait_for_step(run, 4, driver)
    driver.kill()
    driver.wait()
    monkeypatch.setenv("RAYKD_FAULT", f"worker:exit@step=8;once={tmp_path / 'struck'}")
    assert main(["--config", str(config_file), *options, "--resume"]) == 0
    assert (tmp_path / "struck").exists()
    assert np.array_equal(read_ledger(newest(run)), read_ledger(newest(undisturbed_mixture)))
    assert losses(run) == pytest.approx(losses(undisturbed_mixture), rel=1e-3)
    weights = [load_file(newest(folder) / "student" / "model.safetensors") for folder in (run, undisturbed_mixture)]
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-4


@pytest.mark.ray
@pytest.mark.long
def test_two_workers_that_share_a_student_and_two_epochs_of_a_mixture_drop_and_repeat_nothing(config_file, ray_cluster):
    options = ["train.num_workers=2", "train.epochs=2", "train.sequences_per_step=5", offline(config_file, weight=0.5)]
    assert main(["--config", str(config_file), "run.name=two_mixed", "train.parallel_strategy=fsdp", *options]) == 0
    run = folder_of(config_file, "two_mixed")
    assert len(list((newest(run) / "optimizer").iterdir())) == 2
    ledger = read_ledger(newest(run))
    assert len(np.unique(ledger)) == len(ledger) == 2 * (NUM_PROMPTS + NUM_OFFLINE // 2)
    assert np.isin(train_uids(run), ledger).all()


@pytest.mark.ray
@pytest.mark.long
def test_a_run_stops_when_the_budget_of_its_teacher_is_spent_and_goes_on_with_a_larger_one(
    config_file, tiny_model_path, ray_cluster, capsys
):
    """What was answered is trained on and checkpointed; nothing is asked twice, nothing is left out."""
    with completion_server() as server:
        config = yaml.safe_load(config_file.read_text())
        config["teacher"] = {
            "kind": "http",
            "address": server.address,
            "model": "tiny",
            "tokenizer": str(tiny_model_path),
            "top_k": 3,
            "batch_size": 4,
            "sampling": {"max_tokens": 12},
            "budget": {"max_tokens": 120},  # a request takes 5 and reserves about 40
        }
        file = config_file.with_name("paid.yaml")
        file.write_text(yaml.safe_dump(config))
        assert exit_code(lambda: main(["--config", str(file), "run.name=paid"])) == 1
        assert "some prompts were not asked" in capsys.readouterr().err
        run = folder_of(config_file, "paid")
        assert 0 < len(read_ledger(newest(run))) < NUM_PROMPTS
        command = ["--config", str(file), "run.name=paid", "--resume", "teacher.budget.max_tokens=null"]
        assert main(command) == 0
        assert np.array_equal(read_ledger(newest(run)), train_uids(run))
        asked = [tuple(body["prompt"]) for body in server.asked if body["max_tokens"] > 1]
        assert len(asked) == len(set(asked)) == NUM_PROMPTS + NUM_HELD_OUT


def test_plan_starts_nothing(config_file, capsys):
    assert main(["--config", str(config_file), "run.name=planned", "--plan"]) == 0
    assert "the run in numbers" in capsys.readouterr().out
    assert not folder_of(config_file, "planned").exists()


def test_a_mistake_in_the_config_is_one_line_and_exit_code_1(config_file, capsys):
    command = ["--config", str(config_file), "train.learnin_rate=1"]
    assert exit_code(lambda: main(command)) == 1
    assert "did you mean 'learning_rate'" in capsys.readouterr().err
