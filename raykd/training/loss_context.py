"""What the losses of a run need to know besides batch and config: ids with a meaning, layers that belong together, the
teacher's head.

In:  Config, the student's tokenizer and its Hugging Face config. Out: a `LossContext`, and which projections to make.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raykd.config import Config
from raykd.data.call_openings import call_openings
from raykd.data.prompt_rows import load_tokenizer
from raykd.losses.context import LossContext, TeacherTop
from raykd.losses.intermediate import layer_pairs, projection_shapes
from raykd.student.teacher_head import load_teacher_head
from raykd.vocabulary import compare_vocabularies, token_id
from teacher_serving.identity import read_text_config


def make_context(
    config: Config, tokenizer: PreTrainedTokenizerBase, architecture: PretrainedConfig
) -> tuple[LossContext, dict[int, tuple[int, int]]]:
    """The context of the active losses, and the projections (student layer -> widths in and out) they train.

    Errors: ValueError when a loss needs a token that the tokenizer does not have, or layers that nobody ships.
    """
    losses = config.loss.weights
    pairs: dict[int, int] = {}
    shapes: dict[int, tuple[int, int]] = {}
    shipped = config.teacher.hidden_layers
    if "intermediate_layer" in losses:
        teacher = read_text_config(Path(config.teacher.tokenizer_folder))
        num_layers = teacher["num_hidden_layers"]
        pairs = layer_pairs(config.loss.layer_map, architecture.num_hidden_layers, num_layers, shipped)
        shapes = projection_shapes(pairs, architecture.hidden_size, teacher["hidden_size"])
    eos = tokenizer.eos_token
    assert eos is None or isinstance(eos, str), f"one end-of-turn token expected, found {eos!r}"
    needs_latent = "caws_compliance" in losses
    needs_top = "kd" in losses and config.loss.kd_support == "full" and not config.simulates("step")
    needs_stop = needs_latent or "length_aware" in losses
    context = LossContext(
        eos_id=token_id(tokenizer, eos, "its end-of-turn token") if needs_stop else None,
        bot_id=token_id(tokenizer, config.latent.begin, "latent.begin") if needs_latent else None,
        eot_id=token_id(tokenizer, config.latent.end, "latent.end") if needs_latent else None,
        opening_ids=torch.from_numpy(call_openings(tokenizer)) if "early_tool_call" in losses else torch.empty(0).long(),
        layer_pairs=pairs,
        num_teacher_layers=len(shipped) if pairs else 0,
        rollout_clip=config.rollouts.clip if config.rollouts.every > 1 else None,
        teacher_top=_teacher_top(config, tokenizer) if needs_top else None,
    )
    return context, shapes


def _teacher_top(config: Config, tokenizer: PreTrainedTokenizerBase) -> TeacherTop:
    """The teacher's head with its rows at the student's ids; the student's other ids have no mass (bias -inf)."""
    head = load_teacher_head(config.teacher.tokenizer_folder)
    match = compare_vocabularies(load_tokenizer(config.teacher.tokenizer_folder), tokenizer).require()
    if match.kind == "identical":
        return TeacherTop(*head)
    known = torch.from_numpy(match.id_map >= 0)
    ids = torch.from_numpy(match.id_map).long()[known]
    weight = head.weight.new_zeros(match.num_ids, head.weight.shape[1])
    bias = head.weight.new_full((match.num_ids,), -torch.inf)
    weight[ids] = head.weight[: len(known)][known]
    bias[ids] = 0.0 if head.bias is None else head.bias[: len(known)][known]
    return TeacherTop(head.norm, weight, bias)
