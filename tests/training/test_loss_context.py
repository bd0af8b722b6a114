"""What the losses are told about the student's vocabulary: ids of tokens, and the teacher's head at the student's ids."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raykd.config import Config
from raykd.losses.context import TeacherTop
from raykd.losses.full import full_kd_loss
from raykd.student.model import Student, load_student
from raykd.training.loss_context import make_context
from tests.moved_ids import save_moved

ROWS = 6


def config_for(teacher: Path, **student) -> Config:
    values = {
        "teacher": {"kind": "hf", "model": str(teacher), "hidden_layers": [1]},
        "student": {"model": str(teacher), **student},
        "data": {"prompts": "none"},
        "loss": {"kd": 1.0, "kd_support": "full"},
    }
    return Config.model_validate(values)


def top_and_student(config: Config) -> tuple[TeacherTop, Student]:
    student = load_student(config.student, 0).eval()
    context, _ = make_context(config, student.tokenizer, student.model.config)
    assert context.teacher_top is not None
    return context.teacher_top, student


def full_loss(top: TeacherTop, student: Student) -> tuple[Tensor, Tensor]:
    """The loss on made-up states, and its gradient with respect to the student's head [V, H]."""
    generator = torch.Generator().manual_seed(0)
    hidden, state = (torch.randn(ROWS, student.hidden_size, generator=generator) for _ in range(2))
    weight = student.head_weight.detach().clone().requires_grad_()
    loss = full_kd_loss(
        hidden, weight, state, top.norm, top.weight, torch.ones(ROWS), teacher_bias=top.bias,
        num_valid_ids=student.num_valid_ids,
    ).mean()  # fmt: skip
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def test_the_whole_vocabulary_is_compared_id_by_id_whatever_the_students_ids_are(tiny_model_path, tmp_path):
    top, student = top_and_student(config_for(tiny_model_path))
    expected, gradient = full_loss(top, student)
    places = torch.from_numpy(save_moved(tmp_path / "moved", tiny_model_path, extra=()))
    moved_top, moved = top_and_student(config_for(tiny_model_path, model=str(tmp_path / "moved")))
    loss, moved_gradient = full_loss(moved_top, moved)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved_gradient[places], gradient, atol=1e-6, rtol=1e-4)


def test_a_students_own_tokens_have_no_mass_in_the_teachers_distribution(tiny_model_path):
    top, student = top_and_student(config_for(tiny_model_path))
    expected, _ = full_loss(top, student)
    grown_top, grown = top_and_student(config_for(tiny_model_path, new_tokens={"<bot>": "", "<eot>": ""}))
    loss, gradient = full_loss(grown_top, grown)
    old = len(student.head_weight)
    assert grown_top.bias is not None
    assert (grown_top.bias == -torch.inf).nonzero()[:, 0].tolist() == [old, old + 1]
    assert torch.isfinite(loss)
    assert loss > expected, "what the student puts on its own tokens costs"
    assert gradient[old : old + 2].abs().sum(dim=1).gt(0).all()
    assert gradient[old + 2 :].abs().sum() == 0, "padding"


def test_a_token_that_a_loss_needs_and_nobody_has_is_asked_for(tiny_model_path, demo_tokenizer):
    config = config_for(tiny_model_path)
    config = Config.model_validate(config.model_dump() | {"loss": {"caws_compliance": 1.0}})
    architecture = load_student(config.student, 0).model.config
    words = re.escape("latent.begin is '<bot>', which the tokenizer") + ".*add it to student.new_tokens"
    with pytest.raises(ValueError, match=words):
        make_context(config, demo_tokenizer, architecture)
