"""Losses beside the sweep: wide sets of ids at few tokens, whole sequences at once, heads, hidden states.

In:  Batch, StudentOutput, hidden states [N, H] before each response token, the student's head. Out: sums and counts by name.

Rows of the LM head that are needed here are computed once more, and only those: first tokens of turns, tokens with id sets,
arguments with a grammar, rollouts, pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raykd.loss_config import LossConfig
from raykd.losses import heads, id_sets
from raykd.losses.context import Head, LossContext
from raykd.losses.early_tool_call import opening_loss
from raykd.losses.full import full_kd_loss, full_kd_states, full_kd_weight
from raykd.losses.grammar import json_grammar_loss, json_grammar_weight
from raykd.losses.head import head_logprobs
from raykd.losses.intermediate import intermediate_layer_loss, intermediate_weight
from raykd.losses.length_aware import excess_weight, length_aware_kd_loss
from raykd.losses.sweep import code_mode, early_weights, sequence_of_token
from raykd.types import Batch, SetKind, Source, StudentOutput

SET_KINDS = {
    "tool_choice": SetKind.TOOL_CHOICE,
    "copy_mass": SetKind.COPY,
    "number_contradiction": SetKind.CONTRADICTION,
}


def beside_counts(batch: Batch, config: LossConfig) -> dict[str, Tensor]:
    """Count of every active term that is computed here."""
    counts: dict[str, Tensor] = {}
    for name in config.weights:
        if name in SET_KINDS:
            counts[name] = _set_weight(batch, name).sum()
        elif name == "json_grammar":
            counts[name] = json_grammar_weight(batch.response_source[batch.grammar_row]).sum()
        elif name == "kd" and config.kd_support == "full":
            counts[name] = full_kd_weight(batch).sum()
        elif name == "self_kd":
            counts[name] = self_kd_weight(batch).sum()
        elif name == "intermediate_layer":
            counts[name] = intermediate_weight(batch, config.intermediate_tokens).sum()
        elif name == "halt":
            assert config.halt_class_weights is not None, "halt_class_weights is settled before each step"
            counts[name] = heads.halt_head_weight(batch.halt_targets, config.halt_class_weights).sum()
        elif name == "early_tool_call":
            counts[name] = early_weights(batch, config).prior.sum()
        elif name == "length_aware":
            counts["length_aware/excess"] = excess_weight(batch.target_length).sum()
        elif name == "code_mode_preference":
            counts["code_mode_preference/pair"] = code_mode(config).num_pairs(batch.pair, batch.reference_logprob)
        elif name == "halt_ponder":
            counts[name] = heads.num_refined(_sequence_of_decision(batch))
        elif name == "self_evaluation":
            counts[name] = heads.self_evaluation_weight(batch.quality).sum()
    return counts


def _sequence_of_decision(batch: Batch) -> Tensor:
    return batch.decision_index // batch.input_ids.shape[1]


def beside_sums(
    batch: Batch, output: StudentOutput, hidden: Tensor, head: Head, config: LossConfig, context: LossContext
) -> dict[str, Tensor]:
    """Sum (scalar with graph) of every active term that is computed here."""
    names = config.weights.keys()
    sums: dict[str, Tensor] = {}
    if names & SET_KINDS.keys():
        sums |= _set_sums(batch, hidden, head, config)
    if "json_grammar" in names:
        sums["json_grammar"] = json_grammar_loss(
            hidden[batch.grammar_row],
            head.weight,
            batch.grammar_mask,
            batch.grammar_masks,
            json_grammar_weight(batch.response_source[batch.grammar_row]),
            bias=head.bias,
            num_valid_ids=head.num_valid_ids,
        ).sum
    if "kd" in names and config.kd_support == "full":
        sums["kd"] = _full_kd_sum(batch, hidden, head, config, context)
    if "self_kd" in names:
        sums["self_kd"] = _self_kd_sum(batch, output, hidden, head, context)
    if "early_tool_call" in names:
        weights = early_weights(batch, config)
        openings = context.opening_ids.expand(len(weights.first), -1)
        logprobs = _logprobs(hidden[weights.first], head, openings)
        sums["early_tool_call"] = opening_loss(logprobs, weights.has_call, weights.prior).sum
    if "length_aware" in names:
        sums["length_aware/excess"] = _excess_sum(batch, hidden, head, config, context)
    if "code_mode_preference" in names:
        sums["code_mode_preference/pair"] = _pair_sum(batch, hidden, head, config)
    return sums | _head_sums(batch, output, config) | _layer_sums(batch, output, config, context)


def _logprobs(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """Log-probability [R, C] of ids [R, C] at rows of hidden states [R, H]."""
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    return head_logprobs(hidden, head.weight, ids, nothing, bias=head.bias, num_valid_ids=head.num_valid_ids)[0]


def _set_weight(batch: Batch, name: str) -> Tensor:
    """Which id sets [S] count in a loss, 0 or 1."""
    return id_sets.id_set_weight(batch.set_kind, batch.response_source[batch.set_row], SET_KINDS[name])


def _set_sums(batch: Batch, hidden: Tensor, head: Head, config: LossConfig) -> dict[str, Tensor]:
    sets, present, written = id_sets.set_logprobs(
        hidden[batch.set_row],
        head.weight,
        batch.set_ids,
        batch.response_ids[batch.set_row],
        bias=head.bias,
        num_valid_ids=head.num_valid_ids,
    )
    sums = {}
    for name in config.weights.keys() & SET_KINDS.keys():
        weight = _set_weight(batch, name)
        if name == "tool_choice":
            weight = weight * batch.tool_name_weight[batch.set_row]
            temperature = config.tool_choice_temperature
            sums[name] = id_sets.tool_choice_loss(sets, present, written, weight, temperature=temperature).sum
        elif name == "copy_mass":
            sums[name] = id_sets.copy_mass_loss(sets, present, weight).sum
        else:
            sums[name] = id_sets.number_contradiction_loss(sets, present, weight).sum
    return sums


def _full_kd_sum(batch: Batch, hidden: Tensor, head: Head, config: LossConfig, context: LossContext) -> Tensor:
    assert context.teacher_top is not None, "kd_support=full without the teacher's norm and head"
    norm, weight, bias = context.teacher_top
    return full_kd_loss(
        hidden,
        head.weight,
        full_kd_states(batch),
        norm,
        weight,
        full_kd_weight(batch),
        divergence=config.kd_divergence,
        beta=config.kd_beta,
        temperature=config.kd_temperature,
        student_bias=head.bias,
        teacher_bias=bias,
        num_valid_ids=head.num_valid_ids,
    ).sum


def self_kd_weight(batch: Batch) -> Tensor:
    """Weight [N], float32: 1 on response tokens of texts to follow."""
    return (batch.response_source != Source.STUDENT).float()


def _self_kd_sum(batch: Batch, output: StudentOutput, hidden: Tensor, head: Head, context: LossContext) -> Tensor:
    assert output.reference_hidden is not None, "self_kd without the states of the frozen student"
    assert context.reference_head is not None, "self_kd without the head of the frozen student"
    return full_kd_loss(
        hidden,
        head.weight,
        output.reference_hidden.flatten(0, 1).index_select(0, batch.response_index - 1),
        nn.Identity(),  # they are behind the final norm
        context.reference_head.weight,
        self_kd_weight(batch),
        student_bias=head.bias,
        teacher_bias=context.reference_head.bias,
        num_valid_ids=head.num_valid_ids,
    ).sum


def _excess_sum(batch: Batch, hidden: Tensor, head: Head, config: LossConfig, context: LossContext) -> Tensor:
    """The rollout part of length_aware: tokens of sequences with a target length."""
    rows, chosen = sequence_of_token(batch), batch.rollout_row
    assert context.eos_id is not None, "length_aware without the id that ends a turn"
    eos = torch.full_like(chosen, context.eos_id)[:, None]
    logprobs = _logprobs(hidden[chosen], head, eos)[:, 0]
    return length_aware_kd_loss(
        logprobs,
        torch.zeros_like(logprobs),
        rows[chosen],
        batch.target_length,
        hinge=config.length_hinge,
        slope=config.length_slope,
    ).sum


def _pair_sum(batch: Batch, hidden: Tensor, head: Head, config: LossConfig) -> Tensor:
    """The preference between the sequences of pairs; their tokens have no weight in the sweep."""
    rows, chosen = sequence_of_token(batch), batch.pair_row
    logprobs = _logprobs(hidden[chosen], head, batch.response_ids[chosen][:, None])[:, 0]
    unmarked = torch.zeros_like(chosen)
    return code_mode(config)(logprobs, unmarked, rows[chosen], batch.pair, batch.reference_logprob).sum


def _head_sums(batch: Batch, output: StudentOutput, config: LossConfig) -> dict[str, Tensor]:
    sums = {}
    if "halt" in config.weights:
        assert output.halt_logits is not None, "halt without its head"
        assert config.halt_class_weights is not None, "halt_class_weights is settled before each step"
        sums["halt"] = heads.halt_head_loss(
            output.halt_logits,
            batch.halt_targets,
            class_weights=config.halt_class_weights,
            label_smoothing=config.halt_label_smoothing,
        ).sum
    if "halt_ponder" in config.weights:
        assert output.halt_logits is not None, "halt_ponder without the halt head"
        sums["halt_ponder"] = heads.expected_loops(output.halt_logits, _sequence_of_decision(batch)).sum
    if "self_evaluation" in config.weights:
        assert output.quality_logits is not None, "self_evaluation without its head"
        sums["self_evaluation"] = heads.self_evaluation_loss(
            output.quality_logits, batch.quality, kind=config.self_evaluation_kind
        ).sum
    return sums


def _layer_sums(batch: Batch, output: StudentOutput, config: LossConfig, context: LossContext) -> dict[str, Tensor]:
    if "intermediate_layer" not in config.weights:
        return {}
    loss = intermediate_layer_loss(
        [layer.flatten(0, 1).index_select(0, batch.state_index) for layer in output.layers],
        batch.teacher_hidden,
        intermediate_weight(batch, config.intermediate_tokens),
        context.layer_pairs,
        context.projections,
        context.rms,
        mse_weight=config.intermediate_mse_weight,
        cosine_weight=config.intermediate_cosine_weight,
    )
    return {"intermediate_layer": loss.sum}
