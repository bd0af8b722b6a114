"""Metrics of the heads: by hand from made-up outputs, and from a real model by its own forward pass."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raykd.config import Config, StudentConfig
from raykd.data.examples import examples_to_table
from raykd.evaluation.head_rows import Drafts, HeadRows
from raykd.evaluation.head_scores import HeadOutputs, halting_by_tier, head_estimates, run_heads
from raykd.evaluation.models import ModelFiles
from raykd.student.heads import make_heads, save_heads
from raykd.student.model import load_student
from raykd.types import Example, Mark, Source
from tests.conftest import DEMO_TEACHER

TARGETS = ([0.0, 0.0, 1.0], [0.0, 1.0], [1.0], [0.0, math.nan])
SCORES = ([0.1, 0.5, 0.9], [0.5, 0.9], [0.9], [0.4, math.nan])
QUALITY = (0.9, 0.9, math.nan, 0.4)


def example(row: int) -> Example:
    """Two tokens of prompt, then for each loop two tokens of draft and one between drafts."""
    num_loops = len(TARGETS[row])
    marks = np.zeros(2 + 3 * num_loops - 1, np.uint16)
    for loop in range(num_loops):
        marks[2 + 3 * loop : 4 + 3 * loop] = Mark.RESPONSE
        marks[3 + 3 * loop] |= np.uint16(Mark.DECISION)
    return Example(
        uid=row,
        source=Source.STUDENT,
        input_ids=np.arange(10, 10 + len(marks), dtype=np.int32),
        marks=marks,
        topk_ids=np.empty((2 * num_loops, 0), np.int32),
        topk_logprobs=np.empty((2 * num_loops, 0), np.float16),
        log_tail=np.empty(0, np.float32),
        halt_targets=np.array(TARGETS[row], np.float32),
        quality=QUALITY[row],
    )


@pytest.fixture
def rows() -> HeadRows:
    refinements = [Drafts(row, 0, np.array(SCORES[row]), 2 + row % 2, 3, 2) for row in range(4)]
    return HeadRows(examples_to_table([example(row) for row in range(4)]), refinements, np.array([20], np.int32), {})


def config_of(model: Path = DEMO_TEACHER, **sections) -> Config:
    settings = {
        "teacher": {"kind": "hf", "model": str(DEMO_TEACHER)},
        "student": {"model": str(model)},
        "data": {"prompts": "none"},
        "evaluate": {"num_bootstrap": 30, "max_tokens": 3, "max_refined": 3},
    }
    return Config.model_validate(settings | sections)


NOTHING = HeadOutputs([], np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
PERFECT = [np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0]), np.array([1.0]), np.array([0.0, 0.3])]


def values(estimates) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def test_a_head_that_is_always_right_costs_nothing(rows):
    found = head_estimates(rows, replace(NOTHING, halt=PERFECT), config_of())
    expected = {"halt_auc": 1.0, "halt_ece": 0.0, "halt_brier": 0.0, "halt_accuracy": 1.0}
    loops = {"halt_loops": 2.0, "halt_oracle_loops": 2.0, "halt_quality_lost": 0.0}  # (3 + 2 + 1 + 2) / 4
    assert values(found) == pytest.approx(expected | loops)
    assert found["halt_auc"].num_prompts == 4
    assert (found["halt_loops"].low, found["halt_loops"].high) != (2.0, 2.0)  # resampled by row


def test_a_head_that_halts_at_once_loses_what_the_later_drafts_were_better_by(rows):
    hasty = [np.full(len(own), 0.9) for own in TARGETS]
    found = values(head_estimates(rows, replace(NOTHING, halt=hasty), config_of()))
    assert found["halt_loops"] == 1.0
    assert found["halt_oracle_loops"] == 2.0
    assert found["halt_quality_lost"] == pytest.approx((0.8 + 0.4 + 0.0) / 3)  # the last one's later draft was not judged
    assert found["halt_auc"] == 0.5
    assert found["halt_accuracy"] == pytest.approx(3 / 7)  # the point without a target is left out
    assert found["halt_brier"] == pytest.approx((4 * 0.81 + 3 * 0.01) / 7)
    assert found["halt_ece"] == pytest.approx(0.9 - 3 / 7)


def test_two_refinements_of_a_row_have_decision_points_of_their_own(rows):
    both = [Drafts(0, 0, np.array([0.1]), 2, 3, 2), Drafts(0, 1, np.array([0.5, 0.9]), 2, 3, 5)]
    outputs = replace(NOTHING, halt=[np.array([0.9, 0.1, 0.9]), *PERFECT[1:]])
    found = head_estimates(replace(rows, refinements=both), outputs, config_of())
    assert found["halt_loops"].value == 1.5
    assert found["halt_oracle_loops"].value == 1.5
    assert found["halt_loops"].num_prompts == 1


def test_where_the_head_halts_is_the_configs_to_say(rows):
    unsure = [np.full(len(own), 0.4) for own in TARGETS]
    config = config_of(halt={"halt_probability": 0.3})
    assert values(head_estimates(rows, replace(NOTHING, halt=unsure), config))["halt_loops"] == 1.0
    assert values(head_estimates(rows, replace(NOTHING, halt=unsure), config_of()))["halt_loops"] == 2.0


def test_tiers_are_judged_apart(rows):
    found = halting_by_tier(rows, replace(NOTHING, halt=PERFECT, quality=np.full(4, 0.5)), config_of())
    assert {tier: own["halt_oracle_loops"].value for tier, own in found.items()} == {"tier 2": 2.0, "tier 3": 2.0}
    assert found["tier 2"]["halt_oracle_loops"].num_prompts == 2
    assert "halt_auc" in found["tier 2"]
    assert not any(name.startswith("self_evaluation") for own in found.values() for name in own)
    one_tier = replace(rows, refinements=[replace(own, tier=1) for own in rows.refinements])
    assert halting_by_tier(one_tier, replace(NOTHING, halt=PERFECT), config_of()) == {}


def test_quality_is_held_against_the_rows_that_have_one(rows):
    said = np.array([0.8, 0.8, 0.1, 0.3])
    found = values(head_estimates(rows, replace(NOTHING, quality=said), config_of()))
    assert found == pytest.approx({"self_evaluation_correlation": 1.0, "self_evaluation_ece": 0.1})
    constant = replace(NOTHING, quality=np.full(4, 0.5))
    assert set(head_estimates(rows, constant, config_of())) == {"self_evaluation_ece"}


def test_own_refinements_are_counted_in_loops(rows):
    outputs = replace(NOTHING, refined=np.array([0, 2]), loops=np.array([3, 1]))
    found = head_estimates(rows, outputs, config_of())
    assert values(found) == {"refine_loops": 2.0}
    assert found["refine_loops"].num_prompts == 2


@pytest.fixture
def with_heads(tmp_path, tiny_model_path) -> ModelFiles:
    heads = make_heads(64, {"halt": 1.0, "self_evaluation": 1.0, "intermediate_layer": 1.0}, {0: (64, 32)}, seed=1)
    save_heads(heads, tmp_path / "heads.safetensors")
    return ModelFiles(tiny_model_path, tmp_path / "heads.safetensors")


def test_the_heads_of_a_checkpoint_are_read_as_in_training_and_halt_its_own_drafts(rows, with_heads, tiny_model_path):
    config = config_of(tiny_model_path)
    outputs = run_heads(config, with_heads, rows, [0])
    student = load_student(StudentConfig(model=str(tiny_model_path)), 0)
    student.heads = make_heads(64, {"halt": 1.0, "self_evaluation": 1.0}, seed=1)
    ids = torch.from_numpy(example(0).input_ids.astype(np.int64))[None]
    with torch.no_grad():
        output = student.eval()(ids, torch.tensor([3, 6, 9]), torch.tensor([9]))
    assert output.halt_logits is not None
    assert output.quality_logits is not None
    np.testing.assert_allclose(outputs.halt[0], output.halt_logits.softmax(-1)[:, 1].numpy(), atol=1e-6)
    assert outputs.quality[0] == pytest.approx(output.quality_logits.sigmoid().item(), abs=1e-6)
    assert [len(own) for own in outputs.halt] == [len(own) for own in TARGETS]
    assert outputs.refined.tolist() == [0, 1, 2]
    assert ((outputs.loops >= 1) & (outputs.loops <= 3)).all()

    never = config_of(tiny_model_path, halt={"halt_probability": 1.0})
    assert run_heads(never, with_heads, rows, [0]).loops.tolist() == [3, 3, 3]  # the cap
    at_once = config_of(tiny_model_path, halt={"halt_probability": 0.0})
    assert run_heads(at_once, with_heads, rows, [0]).loops.tolist() == [1, 1, 1]
    long = config_of(tiny_model_path, evaluate={"max_tokens": 2000})
    assert len(run_heads(long, with_heads, rows, [0]).loops) == 0  # no refinement would fit the context
