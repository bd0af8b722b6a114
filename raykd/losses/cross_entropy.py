"""Cross-entropies on chosen tokens: whole responses by who wrote them, and the steps of tool use.

In:  log-probability [N] that the student gives to each target token, and what the tokens are (marks, source).
Out: TokenLoss in nats. Each loss is -log q(target), summed with the weights of the function beside it, which need no
     student: the training loop counts tokens with them before the forward pass.

Tokens that the student itself wrote are never a target here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raykd.losses.reduction import masked_sum
from raykd.types import Mark, Source, TokenLoss


def ce_teacher_weight(source: Tensor) -> Tensor:
    """Weight [N]: 1 on tokens the teacher wrote."""
    return (source == Source.TEACHER).float()


def ce_teacher_argmax_weight(source: Tensor, has_teacher: Tensor) -> Tensor:
    """Weight [N] where the target is the teacher's most likely token: 1 on all text that the teacher scored."""
    return (has_teacher & (source != Source.STUDENT)).float()


def ce_truth_weight(source: Tensor) -> Tensor:
    """Weight [N]: 1 on tokens of recorded conversations."""
    return (source == Source.GOLD).float()


def tool_name_weight(marks: Tensor, source: Tensor) -> Tensor:
    """Weight [N]: 1 on tokens that overlap a tool name inside a call."""
    return _marked(marks, Mark.TOOL_NAME, source).float()


def json_argument_weight(
    marks: Tensor,
    source: Tensor,
    *,
    structure_weight: float = 1.0,
    key_weight: float = 1.0,
    value_weight: float = 1.0,
) -> Tensor:
    """Weight [N] of argument tokens: of the classes that a token covers, the largest weight. Class weight 0: not counted."""
    weight = torch.zeros(marks.shape, dtype=torch.float32, device=marks.device)
    for mark, class_weight in (
        (Mark.ARGUMENT_STRUCTURE, structure_weight),
        (Mark.ARGUMENT_KEY, key_weight),
        (Mark.ARGUMENT_VALUE, value_weight),
    ):
        weight = torch.maximum(weight, _marked(marks, mark, source) * class_weight)
    return weight


def integration_copy_weight(marks: Tensor, source: Tensor) -> Tensor:
    """Weight [N]: 1 on response tokens that reuse a value of a tool result."""
    return _marked(marks, Mark.INTEGRATION, source).float()


def ce_teacher_loss(target_logprobs: Tensor, source: Tensor) -> TokenLoss:
    """Cross-entropy on text that the teacher sampled (Kim & Rush, 2016: sequence-level distillation).

    Args:
        target_logprobs: [N] student log-probability of the token, nats.
        source: [N] Source of the token's sequence.
    """
    return masked_sum(-target_logprobs, ce_teacher_weight(source))


def ce_truth_loss(target_logprobs: Tensor, source: Tensor) -> TokenLoss:
    """Cross-entropy on recorded text. Arguments as in `ce_teacher_loss`."""
    return masked_sum(-target_logprobs, ce_truth_weight(source))


def tool_name_loss(target_logprobs: Tensor, marks: Tensor, source: Tensor) -> TokenLoss:
    """Cross-entropy on the tokens of tool names, of all calls.

    Args:
        target_logprobs: [N] student log-probability of the token, nats.
        marks: [N] bits of Mark.
        source: [N] Source of the token's sequence.
    """
    return masked_sum(-target_logprobs, tool_name_weight(marks, source))


def json_argument_loss(
    target_logprobs: Tensor,
    marks: Tensor,
    source: Tensor,
    *,
    structure_weight: float = 1.0,
    key_weight: float = 1.0,
    value_weight: float = 1.0,
) -> TokenLoss:
    """Cross-entropy on the tokens of tool-call arguments, weighted by class. Arguments as in `json_argument_weight`."""
    weight = json_argument_weight(
        marks, source, structure_weight=structure_weight, key_weight=key_weight, value_weight=value_weight
    )
    return masked_sum(-target_logprobs, weight)


def integration_copy_loss(target_logprobs: Tensor, marks: Tensor, source: Tensor) -> TokenLoss:
    """Cross-entropy on response tokens that reuse a value of a tool result. Arguments as in `tool_name_loss`."""
    return masked_sum(-target_logprobs, integration_copy_weight(marks, source))


def _marked(marks: Tensor, mark: Mark, source: Tensor) -> Tensor:
    return ((marks & int(mark)) != 0) & (source != Source.STUDENT)
