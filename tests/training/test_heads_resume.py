"""Heads in training: their own learning rate, and a run that is resumed with them goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raykd.config import Config
from raykd.losses.context import LossContext
from raykd.losses.heads import halt_head_loss, self_evaluation_loss
from raykd.training.checkpoint import CheckpointError, latest_checkpoint
from raykd.training.ranks import Ranks
from raykd.training.schedules import learning_rate
from raykd.training.trainer import Trainer, make_trainer
from tests.training.tiny_run import VOCAB, make_config, weights

LOSS = {"halt": 0.1, "self_evaluation": 0.1}
CONTEXT = LossContext(layer_pairs={1: 0}, num_teacher_layers=1)
PROJECTIONS = {1: (32, 24)}


def trainer_of(config, folder: Path, projections=PROJECTIONS) -> Trainer:
    return make_trainer(config, folder, num_steps=10, teacher={"fingerprint": "f"}, context=CONTEXT, projections=projections)


def train(trainer: Trainer, steps: int, num_decisions: int = 3) -> None:
    """Optimizer steps on random tokens (of the global generator, whose state is part of a checkpoint)."""
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (2, 6))
        output = trainer.model(ids, torch.tensor([3, 5, 9])[:num_decisions], torch.tensor([5, 11]))
        assert output.halt_logits is not None
        assert output.quality_logits is not None
        total = (
            halt_head_loss(output.halt_logits, torch.rand(num_decisions)).mean()
            + self_evaluation_loss(output.quality_logits, torch.rand(2)).mean()
            + trainer.student.heads["projections"].get_submodule("1")(output.layers[0]).square().mean()
        )
        total.backward()
        for group in trainer.optimizer.param_groups:
            rate = learning_rate(trainer.progress.step, trainer.num_steps, trainer.config.train)
            group["lr"] = rate * group["lr_scale"]
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.progress.step += 1


def test_a_run_resumed_with_heads_goes_on_bit_for_bit(student_path, tmp_path):
    config = make_config(student_path, loss=LOSS, train={"head_learning_rate": 0.03})
    whole = trainer_of(config, tmp_path / "whole")
    before = weights(whole)
    train(whole, 3)
    whole.save()
    train(whole, 3)
    resumed = trainer_of(config, tmp_path / "whole")
    assert resumed.progress.step == 3
    train(resumed, 3)
    again = weights(resumed)
    assert sum(name.startswith("heads.") for name in again) == 7
    for name, value in weights(whole).items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, before[name]) or "norm" in name, name
    for name, parameter in whole.student.named_parameters():
        twin = resumed.optimizer.state[resumed.student.get_parameter(name)]
        assert all(torch.equal(value, twin[key]) for key, value in whole.optimizer.state[parameter].items()), name


def test_heads_have_a_learning_rate_of_their_own(student_path, tmp_path):
    config = make_config(student_path, loss=LOSS, train={"head_learning_rate": 0.03, "learning_rate": 0.01})
    trainer = trainer_of(config, tmp_path)
    groups = trainer.optimizer.param_groups
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in trainer.student.named_parameters():
        scale = 3.0 if name.startswith("heads.") else 1.0
        assert of[id(parameter)] == (pytest.approx(scale), 0.1 if parameter.ndim >= 2 else 0.0), name
    plain = make_trainer(make_config(student_path), tmp_path / "plain", num_steps=10, teacher={})
    assert [group["lr_scale"] for group in plain.optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("damage", ["one bit", "gone"])
def test_damaged_heads_are_noticed(student_path, tmp_path, damage):
    config = make_config(student_path, loss=LOSS)
    trainer = trainer_of(config, tmp_path)
    trainer.save()
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    file = newest / "heads.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"heads\.safetensors"):
        trainer_of(config, tmp_path)


def test_heads_of_other_losses_are_refused(student_path, tmp_path):
    config = make_config(student_path, loss=LOSS)
    trainer_of(config, tmp_path).save()
    with pytest.raises(CheckpointError, match=r"projections\.1\.weight"):
        trainer_of(config, tmp_path, projections={})
    without = make_config(student_path, loss={"halt": 0.1})
    with pytest.raises(CheckpointError, match=r"self_evaluation\.0\.bias"):
        trainer_of(without, tmp_path)
    with pytest.raises(CheckpointError, match="other heads"):
        make_trainer(make_config(student_path), tmp_path, num_steps=10, teacher={})


def test_ranks_agree_though_one_has_no_decision_point(student_path, tmp_path):
    config = make_config(student_path, loss=LOSS)
    torch.multiprocessing.spawn(_train_rank, (config, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt") for rank in range(2))
    assert sum(name.startswith("heads.") for name in first) == 7
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    before = weights(trainer_of(config, tmp_path / "new"))
    assert not torch.equal(first["heads.halt.weight"], before["heads.halt.weight"])


def _train_rank(rank: int, config: Config, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    trainer = make_trainer(
        config, folder, num_steps=10, teacher={}, ranks=Ranks.of_process_group(), context=CONTEXT, projections=PROJECTIONS
    )
    train(trainer, 2, num_decisions=3 if rank == 0 else 0)
    torch.save(weights(trainer), folder / f"weights-{rank}.pt")
    dist.destroy_process_group()


def test_a_run_without_heads_has_no_file_of_them(student_path, tmp_path):
    folder = make_trainer(make_config(student_path), tmp_path, num_steps=10, teacher={}).save()
    assert folder is not None
    assert not (folder / "heads.safetensors").exists()
