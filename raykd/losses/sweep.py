"""Losses and metrics that are sums over response tokens: computed chunk by chunk while the head's logits exist.

In:  log-probabilities of the columns of `sweep_columns` for the rows of a chunk. Out: TokenLoss by name.

Columns: 0..K-1 the teacher's ids, K the written token (which may be one of them); with caws_compliance <bot>, <eot>, EOS.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from raykd.loss_config import LossConfig
from raykd.losses import cross_entropy, scored
from raykd.losses.code_mode import CodeModePreferenceLoss, code_mode_metric_weights
from raykd.losses.context import LossContext
from raykd.losses.early_tool_call import EarlyCallWeights, early_tool_call_weight
from raykd.losses.entropy import kd_weight
from raykd.losses.head import HeadRows
from raykd.losses.kd import sparse_kd_loss
from raykd.losses.length_aware import stop_weight
from raykd.losses.reduction import log1mexp, masked_sum
from raykd.types import ARGUMENT_MARKS, CAWS_TIERS, Batch, Mark, Source, TokenLoss

Weights = Mapping[str, Tensor]


def sequence_of_token(batch: Batch) -> Tensor:
    """Row [N] of each response token's sequence."""
    return batch.response_index // batch.input_ids.shape[1]


def sweep_columns(batch: Batch, config: LossConfig, context: LossContext) -> tuple[Tensor, Tensor]:
    """Ids [N, C] whose log-probability the sweep needs, and which columns [N, C] are the teacher's entries."""
    columns = [batch.topk_ids, batch.response_ids[:, None]]
    if "caws_compliance" in config.weights:
        sentinels = (_known(context.bot_id), _known(context.eot_id), _known(context.eos_id))
        columns += [torch.full_like(batch.response_ids[:, None], sentinel) for sentinel in sentinels]  # filled on the device
    ids = torch.cat(columns, dim=1)
    support = functional.pad(batch.topk_logprobs > -torch.inf, (0, ids.shape[1] - batch.topk_ids.shape[1]), value=False)
    return ids, support


def _known(token_id: int | None) -> int:
    assert token_id is not None, "a loss needs a token that the context does not name"
    return token_id


def code_mode(config: LossConfig) -> CodeModePreferenceLoss:
    """The loss with its sharpness; how much its parts weigh is the business of `LossConfig.terms`."""
    return CodeModePreferenceLoss(beta=config.code_mode_beta)


def sweep_weights(batch: Batch, config: LossConfig, context: LossContext) -> dict[str, Tensor]:
    """Weight [N] (caws_compliance: bool [N, 3]) of every token, by name of the active term."""
    marks, source = batch.response_marks, batch.response_source
    weights: dict[str, Tensor] = {}
    for name in config.weights:
        if name == "kd" and config.kd_support != "full":
            weights[name] = kd_weight(batch, config)
        elif name == "ce_teacher" and config.ce_teacher_target == "sampled":
            weights[name] = cross_entropy.ce_teacher_weight(source)
        elif name == "ce_teacher":
            weights[name] = cross_entropy.ce_teacher_argmax_weight(source, batch.has_teacher)
        elif name == "ce_truth":
            weights[name] = cross_entropy.ce_truth_weight(source)
        elif name == "tool_name":
            weights[name] = cross_entropy.tool_name_weight(marks, source) * batch.tool_name_weight
        elif name == "json_argument":
            weights[name] = cross_entropy.json_argument_weight(
                marks,
                source,
                structure_weight=config.json_structure_weight,
                key_weight=config.json_key_weight,
                value_weight=config.json_value_weight,
            )
        elif name == "integration_copy":
            weights[name] = cross_entropy.integration_copy_weight(marks, source)
        elif name == "claim_extraction":
            weights[name] = scored.claim_extraction_weight(marks, source)
        elif name == "policy_gradient":
            weights[name] = batch.response_advantage.nan_to_num(nan=0.0)
        elif name == "early_tool_call":
            weights["early_tool_call/ce"] = early_weights(batch, config).ce
        elif name == "length_aware":
            weights[name] = stop_weight(batch.response_ids, source, _known(context.eos_id))
        elif name == "caws_compliance":
            weights[name] = _caws_terms(batch, config, context)
        elif name == "code_mode_preference":
            code, direct = code_mode(config).weights(marks, sequence_of_token(batch), batch.pair, batch.reference_logprob)
            weights[name], weights[f"{name}/direct"] = code * (source != Source.STUDENT), direct
    return weights


def early_weights(batch: Batch, config: LossConfig) -> EarlyCallWeights:
    """Weights of early_tool_call, 0 or 1."""
    return early_tool_call_weight(batch, num_tokens=config.early_tool_tokens, ce_weight=1.0, prior_weight=1.0)


def _caws_terms(batch: Batch, config: LossConfig, context: LossContext) -> Tensor:
    tier = torch.where(batch.caws_tier > 0, batch.caws_tier, config.caws_tier)
    max_spans = torch.zeros_like(tier)
    for number, allowed in CAWS_TIERS.items():
        max_spans.masked_fill_(tier == number, allowed.max_spans)  # filled on the device
    return scored.caws_terms(
        batch.response_ids,
        sequence_of_token(batch),
        bot_id=_known(context.bot_id),
        eot_id=_known(context.eot_id),
        max_spans=max_spans,
    )


def sweep_counts(batch: Batch, weights: Weights) -> dict[str, Tensor]:
    """Count of every term with `sweep_weights`: its weights, where those are no trust or reward."""
    counts = {name: weight.sum(dtype=torch.float32) for name, weight in weights.items()}
    if "tool_name" in counts:
        counts["tool_name"] = cross_entropy.tool_name_weight(batch.response_marks, batch.response_source).sum()
    if "policy_gradient" in counts:
        counts["policy_gradient"] = scored.policy_gradient_weight(batch.response_advantage).sum()
    if "caws_compliance" in counts:
        counts["caws_compliance"] = weights["caws_compliance"].any(dim=1).float().sum()
    return counts


def sweep_parts(
    head: HeadRows, batch: Batch, config: LossConfig, context: LossContext, weights: Weights
) -> dict[str, TokenLoss]:
    """The losses of the sweep on the rows of one chunk; sums only, their counts are those of `sweep_counts`."""
    num_ids = batch.topk_ids.shape[1]
    label = head.logprobs[:, num_ids]
    parts = {}
    for name, token_weight in weights.items():
        weight = token_weight[head.rows]
        if name == "kd":
            parts[name] = _sparse_kd(head, batch, config, weight)
        elif name == "ce_teacher" and config.ce_teacher_target == "argmax":
            parts[name] = masked_sum(-_at_teacher_argmax(head, batch), weight)
        elif name == "claim_extraction":
            ce, kl = masked_sum(-label, weight), _sparse_kd(head, batch, config, weight * batch.has_teacher[head.rows])
            parts[name] = TokenLoss(config.claim_ce_share * ce.sum + (1.0 - config.claim_ce_share) * kl.sum, ce.count)
        elif name == "policy_gradient":
            parts[name] = _policy_gradient(head, batch, label, context.rollout_clip)
        elif name == "caws_compliance":
            parts[name] = scored.caws_compliance_loss(head.logprobs[:, num_ids + 1 :], weight)
        elif name == "code_mode_preference/direct":
            parts[name] = masked_sum(-log1mexp(label.masked_fill(weight == 0, -1.0)), weight)
        else:
            parts[name] = masked_sum(-label, weight)
    return parts


def _policy_gradient(head: HeadRows, batch: Batch, label: Tensor, clip: float | None) -> TokenLoss:
    advantage = batch.response_advantage[head.rows]
    if clip is None:
        return scored.policy_gradient_loss(label, advantage)
    return scored.policy_gradient_loss(label, advantage, batch.response_old_logprob[head.rows], clip=clip)


def _sparse_kd(head: HeadRows, batch: Batch, config: LossConfig, weight: Tensor) -> TokenLoss:
    return sparse_kd_loss(
        head.logprobs[:, : batch.topk_ids.shape[1]],
        head.log_tail,
        batch.topk_logprobs[head.rows],
        batch.log_tail[head.rows],
        weight,
        divergence=config.kd_divergence,
        beta=config.kd_beta,
        support="topk_tail" if config.kd_support == "full" else config.kd_support,
        temperature=1.0 if config.kd_support == "full" else config.kd_temperature,
    )


def metric_weights(batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Weight [N] of every response token in every metric; tokens the student wrote are no targets.

    accuracy: the student's most likely token is the written one (ties count); agreement: it is the teacher's. nll and
    logprob are in nats, teacher_kl is the forward KL with tail bucket whatever the losses, masses are those on the K ids.
    """
    marks, has_teacher = batch.response_marks, batch.has_teacher.float()
    target = (batch.response_source != Source.STUDENT).float()
    of_code_mode = code_mode_metric_weights(marks) if "code_mode_preference" in config.weights else {}
    return {
        "tool_name_accuracy": target * ((marks & int(Mark.TOOL_NAME)) != 0),
        "json_argument_accuracy": target * ((marks & int(ARGUMENT_MARKS)) != 0),
        "response_accuracy": target,
        "response_nll": target,
        "teacher_agreement": has_teacher,
        "teacher_kl": has_teacher,
        "teacher_topk_mass": has_teacher,
        "student_topk_mass": has_teacher,
        **of_code_mode,
    }


def metric_values(head: HeadRows, batch: Batch, weights: Weights) -> dict[str, TokenLoss]:
    """The metrics on the rows of one chunk."""
    num_ids = batch.topk_ids.shape[1]
    label = head.logprobs[:, num_ids]
    teacher_logprobs, teacher_tail = batch.topk_logprobs[head.rows], batch.log_tail[head.rows]
    is_label = (label >= head.top_logprob).float()
    values = {
        "tool_name_accuracy": is_label,
        "json_argument_accuracy": is_label,
        "response_accuracy": is_label,
        "response_nll": -label,
        "teacher_agreement": (_at_teacher_argmax(head, batch) >= head.top_logprob).float(),
        "teacher_topk_mass": teacher_logprobs.exp().sum(dim=1),
        "student_topk_mass": -head.log_tail.expm1(),
        "code_mode_logprob": label,
        "direct_tool_logprob": label,
    }
    metrics = {name: masked_sum(values[name], weights[name][head.rows]) for name in weights if name in values}
    metrics["teacher_kl"] = sparse_kd_loss(
        head.logprobs[:, :num_ids], head.log_tail, teacher_logprobs, teacher_tail, weights["teacher_kl"][head.rows]
    )
    return metrics


def _at_teacher_argmax(head: HeadRows, batch: Batch) -> Tensor:
    """Student log-probability [c] of the teacher's most likely id; of the written token in a batch without a teacher."""
    if batch.topk_ids.shape[1] == 0:
        return head.logprobs[:, 0]
    best = batch.topk_logprobs[head.rows].argmax(dim=1, keepdim=True)
    return head.logprobs.gather(1, best)[:, 0]
