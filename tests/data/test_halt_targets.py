"""When a refinement should have ended: every rule by hand, and what the first implementation of it got wrong."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data.halt_targets import HaltSource, halt_targets, loop_caps
from raykd.sample_config import HaltConfig

NAN = float("nan")


def targets(scores: list[float], *, cap: int = 9, tier: int = 0, stage: Literal[0, 1, 2] | None = None, **options):
    """Targets and sources of one refinement."""
    config = HaltConfig(curriculum_stage=stage, **options)
    halt, source = halt_targets(np.array([scores]), np.array([len(scores)]), np.array([tier]), np.array([cap]), config)
    return halt[0].tolist(), [HaltSource(code).name for code in source[0]]


def unjudged(num_loops: int, **options) -> list[float]:
    return targets([NAN] * num_loops, **options)[0]


def test_tier_caps_are_applied_inside():
    assert loop_caps(np.array([0, 1, 2, 3, 3]), np.array([7, 7, 7, 7, 2])).tolist() == [7, 1, 2, 3, 2]
    for tier, loops in ((1, 1), (2, 2), (3, 3)):
        halt, source = targets([0.1] * 4, tier=tier)
        assert halt == [0.0] * (loops - 1) + [1.0] * (5 - loops)
        assert source == ["JUDGE"] * (loops - 1) + ["CAP"] * (5 - loops)


@pytest.mark.parametrize(
    ("cap", "stage", "expected"),
    [
        (4, 0, [0, 0, 0, 1]),
        (4, 1, [0, 0, 1, 1]),
        (4, 2, [0, 1, 1, 1]),
        (8, 1, [0, 0, 0, 0, 0, 1, 1, 1]),
        (3, 1, [0, 1, 1]),  # where the first implementation's stage 1 was the cap and nothing else
        (3, 2, [1, 1, 1]),
        (2, 1, [1, 1]),
        (1, 2, [1]),
    ],
)
def test_the_curriculum_halts_earlier_from_stage_to_stage(cap, stage, expected):
    assert unjudged(cap, cap=cap, stage=stage) == expected


def test_a_missing_score_is_unknown_and_not_a_wish_to_go_on():
    assert targets([NAN, NAN, NAN], cap=3)[1] == ["NONE", "NONE", "CAP"]
    halt, source = targets([0.5, NAN, 0.9, 0.9, 0.9], stage=0)
    assert np.isnan(halt).tolist() == [False, True, True, False, False]  # the third has nothing to be compared with
    assert source == ["JUDGE", "NONE", "NONE", "DELTA", "DELTA"]
    assert np.isnan(targets([0.9, NAN, 0.9], cap=4, stage=2)[0]).tolist() == [False, True, False]
    assert targets([0.9, NAN, 0.9], cap=4, stage=2)[0][2] == 1.0  # the curriculum halts whatever came before
    assert targets([NAN, NAN, 0.3], stage=2)[0][2] == 0.0  # and a low score needs no history


def test_the_judge_may_veto_the_curriculum_and_not_only_add_halts():
    halt, source = targets([0.2, 0.3, 0.9, 0.9], cap=5, stage=2)
    assert halt == [0.0, 0.0, 1.0, 1.0]
    assert source == ["JUDGE", "JUDGE", "CURRICULUM", "DELTA"]


def test_a_settled_good_score_halts_and_a_changing_one_does_not():
    assert targets([0.85, 0.88])[0] == [0.0, 1.0]
    assert targets([0.85, 0.95])[0] == [0.0, 0.0]  # still improving
    assert targets([0.95, 0.82])[0] == [0.0, 0.0]  # falls: the first implementation halted on the worse draft
    assert targets([0.95, 0.94])[0] == [0.0, 1.0]
    assert targets([0.7, 0.71])[0] == [0.0, 0.0]  # settled, but no good
    assert targets([0.80, 0.85])[0] == [0.0, 0.0]  # 0.05 is not below 0.05, whatever the rounding
    assert targets([0.75, 0.8])[1] == ["JUDGE", "JUDGE"]


def test_the_change_is_measured_over_the_window_and_as_a_share_where_asked():
    rising = [0.80, 0.84, 0.88, 0.92]
    assert targets(rising)[0] == [0.0, 1.0, 1.0, 1.0]
    assert targets(rising, delta_window=2)[0] == [0.0, 0.0, 0.0, 0.0]
    assert targets([0.84, 0.80, 0.84, 0.84], delta_window=2)[0] == [0.0, 0.0, 1.0, 1.0]
    assert targets([0.84, 0.89], delta_threshold=0.055)[0] == [0.0, 1.0]
    assert targets([0.84, 0.89], delta_threshold=0.055, delta_relative=True)[0] == [0.0, 0.0]
    assert targets([0.9], delta_window=3)[0] == [0.0]


def test_columns_beyond_the_loops_of_a_row_are_empty_and_rows_do_not_meet():
    scores = np.array([[0.9, 0.9, 0.9], [0.3, 0.9, 0.91], [0.9, 0.9, 0.9]])
    halt, source = halt_targets(scores, np.array([1, 3, 0]), np.array([0, 0, 0]), np.array([2, 9, 9]), HaltConfig())
    assert np.array_equal(halt, np.array([[0, NAN, NAN], [0, 0, 1], [NAN] * 3], np.float32), equal_nan=True)
    assert source[0].tolist() == [HaltSource.JUDGE, HaltSource.NONE, HaltSource.NONE]
    order = [2, 0, 1]
    again = halt_targets(scores[order], np.array([0, 1, 3]), np.zeros(3, int), np.array([9, 2, 9]), HaltConfig())
    assert np.array_equal(again.halt, halt[order], equal_nan=True)


def test_rows_may_be_at_stages_of_their_own():
    halt = halt_targets(
        np.full((3, 4), NAN), np.full(3, 4), np.zeros(3, int), np.full(3, 4), HaltConfig(), stage=np.array([-1, 1, 2])
    ).halt
    assert np.array_equal(halt, np.array([[NAN, NAN, NAN, 1], [0, 0, 1, 1], [0, 1, 1, 1]], np.float32), equal_nan=True)


def test_soft_targets_are_probabilities_around_the_thresholds():
    halt, source = targets([0.8, 0.8, 0.9, 0.9], soft_targets=True, cap=5)
    assert halt[0] == 0.0  # no history yet: nothing is settled
    assert halt[1] == pytest.approx(0.5 / (1 + np.exp(-2.5)), abs=1e-4)
    assert halt[3] == pytest.approx(1 / (1 + np.exp(-5)) / (1 + np.exp(-2.5)), abs=1e-4)
    assert halt[2] < 0.1
    assert source == ["JUDGE", "DELTA", "JUDGE", "DELTA"]


def test_no_loops_at_all_give_no_targets():
    assert halt_targets(np.empty((0, 0)), np.empty(0), np.empty(0, int), np.empty(0, int), HaltConfig()).halt.shape == (0, 0)


grid = st.one_of(st.just(NAN), st.integers(0, 100).map(lambda hundredths: hundredths / 100))


@settings(max_examples=150, deadline=None)
@given(st.lists(grid, min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 3), st.sampled_from([None, 0, 1, 2]))
def test_hard_targets_are_the_limit_of_soft_ones_and_the_cap_always_holds(scores, cap, tier, stage):
    hard, source = targets(
        scores, cap=cap, tier=tier, stage=stage, delta_window=2, delta_threshold=0.055, judge_threshold=0.795
    )
    soft, _ = targets(
        scores, cap=cap, tier=tier, stage=stage, delta_window=2, delta_threshold=0.055, judge_threshold=0.795,
        soft_targets=True, soft_width=1e-5,
    )  # fmt: skip
    known = ~np.isnan(hard)
    allowed = int(loop_caps(np.array([tier]), np.array([cap]))[0])
    assert (np.array(source) == "NONE").tolist() == (~known).tolist()
    np.testing.assert_allclose(np.array(soft)[known & ~np.isnan(soft)], np.array(hard)[known & ~np.isnan(soft)], atol=1e-6)
    assert all(value == 1.0 for value in hard[allowed - 1 :])
    assert "CAP" not in source[: allowed - 1]
