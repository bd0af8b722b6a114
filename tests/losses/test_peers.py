"""Our dense and top-k divergences against those of other libraries, on identical tensors, in float64: value and gradient.

TRL (Hugging Face): GKDTrainer.generalized_jsd_loss, and the top-k helpers of its self-distillation trainer.
Liger Kernel: the chunk loss of its fused linear JSD. Both mean forward KL at beta 0 and reverse KL at beta 1.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from raykd.losses.combined import combined_kd_loss
from raykd.losses.kd import dense_kd_loss, sparse_kd_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
from trl.experimental.gkd import GKDTrainer
from trl.experimental.sdft.loss_utils import add_tail_bucket, compute_divergence

B, T, V = 3, 7, 50
DIVERGENCES = [
    ("forward_kl", 0.0),
    ("reverse_kl", 1.0),
    ("jsd", 0.1),
    ("jsd", 0.5),
    ("jsd", 0.9),
    ("jsd", 0.0),
    ("jsd", 1.0),
]
TOLERANCE: Any = {"rtol": 0.0, "atol": 1e-6}


def make_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Student (with graph) and teacher [B, T, V], and labels [B, T] of which some are not supervised."""
    g = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(B, T, V, generator=g).double()).requires_grad_()
    teacher = 3 * torch.randn(B, T, V, generator=g).double()
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[:, :2] = -100
    labels[0, 5:] = -100
    return student, teacher, labels


def assert_same(ours: Tensor, theirs: Tensor, student: Tensor) -> None:
    """Value and gradient by the student's logits."""
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_divergences_are_those_of_trl(divergence, beta, temperature):
    student, teacher, labels = make_logits()
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, temperature=temperature)
    weight = (labels != -100).flatten()
    ours = dense_kd_loss(
        student.flatten(0, 1), teacher.flatten(0, 1), weight, divergence=divergence, beta=beta, temperature=temperature
    )
    assert_same(ours.mean() / temperature**2, theirs, student)  # TRL leaves Hinton's factor out


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_dense_divergences_are_those_of_liger(divergence, beta):
    student, teacher, labels = make_logits()
    rows = student.flatten(0, 1), teacher.flatten(0, 1)
    theirs = LigerFusedLinearJSDFunction.distillation_loss_fn(*rows, beta=beta, target=labels.flatten())
    ours = dense_kd_loss(*rows, (labels != -100).flatten(), divergence=divergence, beta=beta)
    assert_same(ours.sum, theirs, student)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_the_top_k_with_its_tail_is_that_of_trl(divergence, beta):
    student, teacher, _ = make_logits()
    log_p = teacher.flatten(0, 1).log_softmax(dim=1)
    ids = log_p.topk(8, dim=1).indices
    log_p, log_q = log_p.gather(1, ids), student.flatten(0, 1).log_softmax(dim=1).gather(1, ids)
    with_tails = add_tail_bucket(log_q), add_tail_bucket(log_p)
    theirs = compute_divergence(*with_tails, alpha=beta).sum()
    tails = [bucketed[:, -1] for bucketed in with_tails]
    ours = sparse_kd_loss(log_q, tails[0], log_p, tails[1], torch.ones(B * T), divergence=divergence, beta=beta)
    assert_same(ours.sum, theirs, student)


def test_the_plain_tensor_face_has_trls_convention_of_labels_and_logits():
    student, teacher, labels = make_logits()
    theirs = GKDTrainer.generalized_jsd_loss(student[:, :-1], teacher[:, :-1], labels=labels[:, 1:], beta=0.5)
    ours = combined_kd_loss(student, labels, {"kd": 1.0}, teacher_logits=teacher, divergence="jsd")
    assert_same(ours["total"], theirs, student)
