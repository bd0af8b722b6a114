from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from raykd.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    read_ledger,
    read_state,
    verify,
)
from raykd.training.rng import restore_rng, rng_state, seed_everything
from raykd.training.trainer import Trainer, make_trainer
from tests.training.tiny_run import make_config, make_rows, run, weights


@pytest.fixture
def trained(student_path, tmp_path) -> Trainer:
    """A run of four steps with checkpoints after steps 2 and 4."""
    config = make_config(student_path, train={"checkpoint_every": 2, "keep_checkpoints": 2})
    return run(config, tmp_path, [make_rows(32)])[0]


def restored(trainer: Trainer) -> Trainer:
    return make_trainer(trainer.config, trainer.run_folder, num_steps=trainer.num_steps, teacher=trainer.teacher)


def test_a_checkpoint_gives_back_all_that_the_run_was_made_of(trained):
    again = restored(trained)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(trained).items())
    for (name, parameter), twin in zip(trained.student.named_parameters(), again.student.parameters(), strict=True):
        for key, value in trained.optimizer.state[parameter].items():
            assert torch.equal(value, again.optimizer.state[twin][key]), (name, key)
    assert again.progress == trained.progress
    assert np.array_equal(again.consumed, np.arange(32))


def test_a_checkpoint_says_what_it_is(trained):
    newest = latest_checkpoint(trained.run_folder)
    assert newest is not None
    state = read_state(newest)
    assert (state["step"], state["sequences"], state["world_size"], state["num_steps"]) == (4, 32, 1, 10)
    assert state["teacher"] == {"fingerprint": "f"}
    assert state["config"] == trained.config.model_dump(mode="json")
    assert not list(newest.rglob("*.pt")) + list(newest.rglob("*.pkl")) + list(newest.rglob("*.bin"))


def test_the_ledger_holds_the_trained_uids_sorted(trained):
    first, second = list_checkpoints(trained.run_folder)
    assert np.array_equal(read_ledger(first), np.arange(16))
    assert np.array_equal(read_ledger(second), np.arange(32))


def test_only_the_newest_are_kept(student_path, tmp_path):
    config = make_config(student_path, train={"checkpoint_every": 1, "keep_checkpoints": 2})
    run(config, tmp_path, [make_rows(32)])
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint-3", "checkpoint-4"]


def test_a_run_of_one_rank_does_not_take_the_random_state_of_two(trained, caplog):
    newest = latest_checkpoint(trained.run_folder)
    assert newest is not None
    files = json.loads((newest / "manifest.json").read_text())
    (newest / "rng-1.safetensors").write_bytes((newest / "rng-0.safetensors").read_bytes())
    files["files"]["rng-1.safetensors"] = files["files"]["rng-0.safetensors"]
    (newest / "manifest.json").write_text(json.dumps(files))
    assert restored(trained).progress == trained.progress
    assert "random states" in caplog.text


FILES = [
    "student/model.safetensors",
    "optimizer.safetensors",
    "ledger.npy",
    "state.json",
    "rng-0.safetensors",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_checkpoint_is_refused_with_the_reason_and_the_one_before(trained, name, damage):
    older, newest = list_checkpoints(trained.run_folder)
    path = newest / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"(?s){name}.*one before is .*{older.name}: remove {newest.name}"):
        restored(trained)
    verify(older)


def test_one_flipped_bit_is_noticed(trained):
    newest = list_checkpoints(trained.run_folder)[-1]
    path = newest / "student" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        verify(newest)


def test_an_optimizer_of_another_model_is_refused(trained, student_path, tmp_path):
    other = make_config(student_path, student={"layers": (0,)})
    run(other, tmp_path / "other", [make_rows(8)])
    newest = latest_checkpoint(trained.run_folder)
    foreign = latest_checkpoint(tmp_path / "other")
    assert newest is not None
    assert foreign is not None
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["optimizer.safetensors"] = json.loads((foreign / "manifest.json").read_text())["files"][
        "optimizer.safetensors"
    ]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / "optimizer.safetensors").write_bytes((foreign / "optimizer.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="another model"):
        restored(trained)


def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(trained):
    trained.progress.step += 1
    # A real limit on what this process may write, between the small and the large files of a checkpoint.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-5 cannot be written: .*too large.*checkpoint-4 is as it was"):
            trained.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in list_checkpoints(trained.run_folder)] == ["checkpoint-2", "checkpoint-4"]
    assert {path.name for path in (trained.run_folder / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert restored(trained).progress.step == 4


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes_with_the_next(trained):
    leftover = trained.run_folder / "checkpoints" / ".writing-checkpoint-9"
    (leftover / "student").mkdir(parents=True)
    newest = latest_checkpoint(trained.run_folder)
    assert newest is not None
    assert newest.name == "checkpoint-4"
    trained.progress.step += 1
    trained.save()
    assert not leftover.exists()


def test_a_sequence_trained_twice_is_never_saved(trained):
    trained.progress.step += 1
    trained.recent.append(np.array([7]))
    with pytest.raises(AssertionError, match="twice, the first has uid 7"):
        trained.save()


def draw() -> list[float]:
    on_gpu = [torch.rand(1, device="cuda").item()] if torch.cuda.is_available() else []
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), *on_gpu]


def test_random_generators_go_on_where_they_were():
    """Those of a GPU too, where there is one."""
    seed_everything(3)
    draw()  # leaves a second Gaussian number waiting in two of the generators
    state = {name: tensor.clone() for name, tensor in rng_state().items()}
    expected = [draw(), draw()]
    seed_everything(4)
    restore_rng(state)
    assert [draw(), draw()] == expected


def test_a_run_without_checkpoints_has_no_latest_one(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert len(read_ledger(None)) == 0
