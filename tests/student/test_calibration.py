"""Numbers about the heads: against definitions by hand and by brute force, and NaN where the data cannot tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raykd.config import HaltConfig
from raykd.data.halt_targets import halt_targets
from raykd.student.calibration import accuracy, brier, correlation, expected_calibration_error, halting_cost, roc_auc

NAN = math.nan


def test_the_auc_counts_the_pairs_that_are_ranked_rightly():
    random = np.random.default_rng(0)
    probability, target = random.integers(0, 6, 60) / 5, random.integers(0, 2, 60).astype(float)
    pairs = [(p > n) + 0.5 * (p == n) for p in probability[target == 1] for n in probability[target == 0]]
    assert roc_auc(probability, target) == pytest.approx(np.mean(pairs))
    assert roc_auc(np.array([0.1, 0.9]), np.array([0.0, 1.0])) == 1.0
    assert roc_auc(np.array([0.4, 0.4]), np.array([0.0, 1.0])) == 0.5
    assert roc_auc(np.array([0.1, 0.9, 0.0]), np.array([0.2, 0.7, NAN])) == 1.0


def test_brier_and_calibration_error_by_hand():
    probability, target = np.array([0.1, 0.19, 0.85, 1.0, 0.3]), np.array([0.0, 1.0, 1.0, 1.0, NAN])
    assert brier(probability, target) == pytest.approx((0.01 + 0.81**2 + 0.15**2) / 4)
    assert expected_calibration_error(probability, target) == pytest.approx((abs(0.29 - 1) + 0.15 + 0) / 4)
    assert expected_calibration_error(np.array([0.7] * 10), np.array([1.0] * 7 + [0.0] * 3)) == pytest.approx(0.0)
    assert expected_calibration_error(np.array([0.7]), np.array([0.7])) == 0.0  # soft targets are probabilities too


def test_accuracy_counts_decisions_from_the_threshold_on():
    probability, target = np.array([0.2, 0.6, 0.7, 0.9, 0.9]), np.array([0.0, 1.0, 0.4, 0.5, NAN])
    assert accuracy(probability, target) == pytest.approx(3 / 4)
    assert accuracy(probability, target, threshold=0.7) == pytest.approx(2 / 4)  # exactly the threshold halts
    assert accuracy(probability, target, threshold=0.71) == pytest.approx(3 / 4)


def test_correlation_leaves_out_what_has_no_score():
    assert correlation(np.array([0.1, 0.2, 0.9, 0.3]), np.array([0.2, 0.4, NAN, 0.6])) == pytest.approx(1.0)


def test_data_that_cannot_tell_gives_no_number():
    nothing, unknown = np.empty(0), np.array([NAN, NAN])
    for measure in (roc_auc, accuracy, brier, expected_calibration_error, correlation):
        assert math.isnan(measure(nothing, nothing))
        assert math.isnan(measure(np.array([0.2, 0.3]), unknown))
    assert math.isnan(roc_auc(np.array([0.2, 0.3]), np.array([1.0, 1.0])))
    assert math.isnan(correlation(np.array([0.2, 0.2]), np.array([0.1, 0.5])))
    no_loops = np.empty((0, 0))
    assert all(map(math.isnan, halting_cost(no_loops, no_loops, no_loops, np.empty(0, int))))


def test_halting_is_compared_with_the_rule_that_made_the_targets():
    scores = np.array([[0.5, 0.9, 0.91], [0.9, 0.9, NAN], [0.2, 0.6, NAN]])
    num_loops = np.array([3, 2, 2])
    targets = halt_targets(scores, num_loops, np.zeros(3, int), np.full(3, 9), HaltConfig()).halt
    head = np.array([[0.7, 0.1, 0.9], [0.4, 0.2, 0.9], [0.1, 0.2, 0.9]])  # too early once; else never
    loops, oracle_loops, lost = halting_cost(head, scores, targets, num_loops)
    assert (loops, oracle_loops) == pytest.approx(((1 + 2 + 2) / 3, (3 + 2 + 2) / 3))
    assert lost == pytest.approx((0.91 - 0.5) / 3)
    assert halting_cost(targets, scores, targets, num_loops).quality_lost == 0.0
    assert halting_cost(head, scores, targets, num_loops, threshold=0.75).loops == pytest.approx(7 / 3)
