"""Divergences between the teacher's and the student's next-token distributions.

In:  log-probabilities of both at the teacher's K ids and the mass of the rest (sparse), or both logits (dense).
Out: TokenLoss in nats, multiplied by temperature squared (Hinton et al., 2015), value and gradient alike.

T is the teacher's distribution, S the student's, b is `beta`:

| divergence | value | source |
|---|---|---|
| forward_kl | KL(T, S) | Hinton et al., 2015 |
| reverse_kl | KL(S, T) | Gu et al., 2024 (MiniLLM) |
| jsd | b KL(T, M) + (1-b) KL(S, M), M = b T + (1-b) S | Agarwal et al., 2024 (GKD) |
| tvd | half the sum of absolute differences | Wen et al., 2023 |
| skewed_forward_kl | KL(T, b T + (1-b) S) | Ko et al., 2024 (DistiLLM) |
| skewed_reverse_kl | KL(S, b S + (1-b) T) | Ko et al., 2024 (DistiLLM) |

At b = 0 and 1 jsd is 0; it means forward KL and reverse KL there, the limits of its direction.

All categories, K + 1 or V, go through one function; log-probabilities of -inf are absent categories and contribute exactly
0 to value and gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from raykd.losses.reduction import masked_sum
from raykd.types import TokenLoss

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl"]
Support = Literal["topk_tail", "topk_renorm", "topk_zero"]

_LOG_LEAST_MASS = math.log(torch.finfo(torch.float32).tiny)  # -87.3


def sparse_kd_loss(
    student_logprobs: Tensor,
    student_log_tail: Tensor,
    teacher_logprobs: Tensor,
    teacher_log_tail: Tensor,
    weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    support: Support = "topk_tail",
    temperature: float = 1.0,
) -> TokenLoss:
    """Divergence on the teacher's K ids and, with topk_tail, one category for all other ids.

    Args:
        student_logprobs: [N, K] at the teacher's ids, normalised over the whole vocabulary at temperature 1.
        student_log_tail: [N] log of the student's mass outside the teacher's present entries.
        teacher_logprobs: [N, K] likewise; -inf marks a missing entry (`head_logprobs` gets it with support False, so that
            the student's mass there is part of its tail).
        teacher_log_tail: [N]; -inf means no mass, as with K = V.
        weight: [N] per token; the values of tokens with weight 0 are not looked at.
        support: topk_tail compares K + 1 categories: a lower bound of the full divergence, equal to it at K = V.
            topk_renorm renormalises both sides over the K. topk_zero renormalises the teacher over the K, the student
            stays as it is over the whole vocabulary.
        temperature: softens both sides. Other than 1 only with topk_renorm, see ValueError.

    Raises:
        ValueError: temperature != 1 with topk_tail or topk_zero, whose normalisers at that temperature cannot be known
            from K entries; a divergence that is infinite by construction (reverse_kl with topk_zero).
    """
    _check_options(divergence, beta, support, temperature)
    counted = weight > 0
    present = (teacher_logprobs > -torch.inf) & counted[:, None]
    teacher = teacher_logprobs.to(student_logprobs.dtype).masked_fill(~present, -torch.inf)
    student = student_logprobs.masked_fill(~present, -torch.inf)
    if support != "topk_tail":
        teacher = _log_softmax_of_present(teacher / temperature, present)
    if support == "topk_renorm":
        student = _log_softmax_of_present(student_logprobs / temperature, present)
    else:
        teacher_tail = teacher_log_tail.to(student.dtype).masked_fill(~counted, 0.0)
        if support == "topk_zero":
            teacher_tail = torch.full_like(teacher_tail, -torch.inf)
        else:
            # Where the student has mass outside the K, so has the teacher, if less than float32 can say: else the reverse
            # KL would be infinite. Where the student has no ids outside the K, what the teacher has there is round-off.
            no_tail = student_log_tail == -torch.inf
            teacher_tail = teacher_tail.clamp(min=_LOG_LEAST_MASS).masked_fill(no_tail, -torch.inf)
        teacher = torch.cat([teacher, teacher_tail[:, None]], dim=1)
        student = torch.cat([student, student_log_tail[:, None]], dim=1)
    values = _divergence(teacher, student, divergence, beta)
    return masked_sum(values * temperature**2, weight)


def dense_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> TokenLoss:
    """Divergence over the whole vocabulary, for teachers whose logits are at hand.

    Args:
        student_logits, teacher_logits: [N, V]; -inf where an id does not exist.
        weight: [N] per token; the logits of tokens with weight 0 are not looked at.
    """
    _check_options(divergence, beta, "topk_renorm", temperature)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher = (teacher_logits.to(dtype) / temperature).log_softmax(dim=1)
    # Filled before the divergence: where that is not finite, a weight of 0 alone would leave a gradient of NaN.
    student = (student_logits.to(dtype) / temperature).masked_fill((weight == 0)[:, None], 0.0).log_softmax(dim=1)
    return masked_sum(_divergence(teacher, student, divergence, beta) * temperature**2, weight)


def _check_options(divergence: str, beta: float, support: str, temperature: float) -> None:
    if divergence not in _DIVERGENCES:
        raise ValueError(f"kd_divergence is {divergence!r}; expected one of {', '.join(_DIVERGENCES)}")
    if support not in ("topk_tail", "topk_renorm", "topk_zero"):
        raise ValueError(f"kd_support is {support!r}; expected topk_tail, topk_renorm or topk_zero")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"kd_beta is {beta}; expected a number from 0 to 1")
    if not temperature > 0.0:
        raise ValueError(f"kd_temperature is {temperature}; expected a positive number")
    if temperature != 1.0 and support != "topk_renorm":
        whose = "teacher's" if support == "topk_tail" else "student's"
        raise ValueError(
            f"kd_temperature={temperature} with kd_support={support}: the {whose} normaliser over the whole vocabulary at "
            "that temperature cannot be known from top-k log-probabilities; use kd_temperature=1 or kd_support=topk_renorm"
        )
    reverse = divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0)
    if support == "topk_zero" and (reverse or (divergence == "skewed_reverse_kl" and beta == 0.0)):
        raise ValueError(
            f"kd_divergence={divergence} (kd_beta={beta}) with kd_support=topk_zero is infinite: the teacher's mass outside "
            "its top-k is taken as 0 where the student has some; use kd_support=topk_tail or topk_renorm"
        )


_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl")


def _divergence(teacher: Tensor, student: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergence [N] of two categorical distributions given as log-probabilities [N, C]."""
    if divergence == "tvd":
        return 0.5 * (teacher.exp() - student.exp()).abs().sum(dim=1)
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0.0):
        return _kl(teacher, student)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0):
        return _kl(student, teacher)
    if divergence == "skewed_forward_kl":
        return _kl(teacher, _mixture(teacher, student, beta))
    if divergence == "skewed_reverse_kl":
        return _kl(student, _mixture(student, teacher, beta))
    mixture = _mixture(teacher, student, beta)
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) [N]; categories without p contribute 0 to value and gradient, whatever q is there."""
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)).sum(dim=1)


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q); -inf, with a gradient of 0, where both are absent."""
    if share == 0.0 or share == 1.0:
        return log_p if share == 1.0 else log_q
    absent = (log_p == -torch.inf) & (log_q == -torch.inf)
    # Absent categories get a value before logaddexp: its gradient at (-inf, -inf) is NaN, also when masked afterwards.
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share)).masked_fill(absent, -torch.inf)


def _log_softmax_of_present(logits: Tensor, present: Tensor) -> Tensor:
    """Log-softmax [N, K] over the present entries; -inf elsewhere, also in rows without any."""
    filled = logits.masked_fill(~present, torch.finfo(logits.dtype).min / 2)
    return filled.log_softmax(dim=1).masked_fill(~present, -torch.inf)
