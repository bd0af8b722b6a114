"""Answers of /v1/completions as arrays, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_serving.arrow import split_columns
from teacher_serving.http_completions import ReplyError, of_given, of_written

IDS = np.array([7, 9], np.int32)


def test_a_sampled_token_outside_the_top_k_is_on_top_of_it_and_one_within_is_put_in_its_rank():
    logprobs = {
        "tokens": ["token_id:7", "token_id:9"],
        "token_logprobs": [-5.0, -2.0],
        "top_logprobs": [
            {"token_id:7": -5.0, "token_id:3": -0.5, "token_id:4": -1.5},  # sampled outside the top 2
            {"token_id:9": -2.0, "token_id:1": -0.25},  # sampled is the second of the top 2
        ],
    }
    ids, values, sampled = split_columns(*of_written(logprobs, IDS, top_k=2), IDS, top_k=2)
    assert ids.tolist() == [[3, 4], [1, 9]]
    assert values.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
    assert sampled.tolist() == [-5.0, -2.0]


def test_scores_of_given_text_are_read_alike_and_no_mass_is_minus_infinity():
    tops = [
        {"7": {"logprob": -9999.0, "rank": 900}, "3": {"logprob": -0.5, "rank": 1}, "4": {"logprob": -1.5, "rank": 2}},
        {"9": {"logprob": -0.5, "rank": 1}, "1": {"logprob": -1.25, "rank": 2}},
    ]
    ids, values, sampled = split_columns(*of_given(tops, IDS, top_k=2), IDS, top_k=2)
    assert ids.tolist() == [[3, 4], [9, 1]]
    assert values.tolist() == [[-0.5, -1.5], [-0.5, -1.25]]
    assert sampled.tolist() == [-np.inf, -0.5]


def test_an_answer_is_as_wide_as_its_position_with_the_fewest():
    tops = [{"7": {"logprob": -0.1}}, {"9": {"logprob": -0.5}, "1": {"logprob": -1.25}}]
    ids, values = of_given(tops, IDS, top_k=2)
    assert ids.tolist() == [[7, 7], [9, 9]]
    assert values[:, 1].tolist() == pytest.approx([-0.1, -0.5])


@pytest.mark.parametrize(
    ("tops", "words"),
    [
        ([{"7": {"logprob": -1.0}}], "log-probabilities of 1 positions for 2 tokens"),
        ([None, {"9": {"logprob": -1.0}}], "log-probabilities of 1 positions for 2 tokens"),
        ([{"7": {"logprob": -1.0}}, {"8": {"logprob": -1.0}}], "those of other tokens than the text's"),
    ],
)
def test_scores_that_do_not_belong_to_the_text_are_refused(tops, words):
    with pytest.raises(ReplyError, match=words):
        of_given(tops, IDS, top_k=1)
