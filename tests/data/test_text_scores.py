"""Scores of texts: the rules by hand, and what the first implementation fined wrongly."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from raykd.data.text_scores import CawsCompliance, caws_compliance, caws_structure_score, holds_calls, judge

CLEAN = CawsCompliance(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "The attribute is set.",  # "but" inside a word
        "It was her debut.",
        "I am from Paris.",  # "from" is no import
        "hello there friend",
        "Let me import the idea that we await.",
        "<bot><bot><eot>It is 3.",  # the first implementation's own latent format
        "<bot>\n<bot>\n<eot>\nIt is 3.",
        '<tool_call>\n{"name": "sum_numbers", "arguments": {"numbers": [1, 2]}}\n</tool_call>',
        "I have no tool for that.",
        "42",
        "```ts\nconst x = await tools.sum_numbers({ numbers: [1, 2] });\n```",
        "Step 1: add.\nStep 2: divide.\nTherefore it is 3.",
    ],
)
def test_what_keeps_the_rules_is_not_fined(text):
    assert caws_compliance(text, tier=2) == CLEAN
    assert caws_compliance(text, tier=2).score == 1.0


@pytest.mark.parametrize(
    ("text", "tier", "penalty"),
    [
        ("<bot><eot>Hi.", 1, CawsCompliance(0.5, 0.0, 0.0)),
        ("<bot><eot><bot><eot>Hi.", 2, CawsCompliance(0.5, 0.0, 0.0)),
        ("<bot><eot>" * 3 + "Hi. " * 60, 3, CLEAN),
        ("<bot><eot>" * 3 + "Hi.", 3, CawsCompliance(0.0, 0.0, 0.3)),
        ("<bot>Hi.", 2, CawsCompliance(1.0, 0.0, 0.0)),
        ("Hi.<eot>", 2, CawsCompliance(1.0, 0.0, 0.0)),
        ("", 2, CawsCompliance(0.0, 1.0, 0.0)),
        ("But it is, although small, BUT fine.", 2, CawsCompliance(0.0, 0.2, 0.0)),
        ("Step 1: a\nStep 2: b", 2, CawsCompliance(0.0, 0.2, 0.0)),
        ("The result:\n" + "".join(f"Step {n}: x\n" for n in range(7)), 2, CawsCompliance(0.4, 0.0, 0.0)),
        ("```python\nimport os\n```", 2, CawsCompliance(0.0, 0.0, 0.5)),
    ],
)
def test_each_rule_costs_what_it_says(text, tier, penalty):
    found = caws_compliance(text, tier)
    assert vars(found) == pytest.approx(vars(penalty))
    weighted = penalty.budget + 1.5 * penalty.quality + 0.8 * penalty.feature
    assert found.score == pytest.approx(math.exp(-weighted))


def test_loops_beyond_the_tier_cost_budget():
    assert [caws_compliance("Hi.", tier, num_loops=3).budget for tier in (1, 2, 3)] == [1.0, 0.5, 0.0]


DOCUMENT = (
    "# Working Spec\nThe service adds numbers.\n## Invariants\n- sums are exact\n## Acceptance\n1. it adds\n"
    '```json\n{"sum": 3}\n```\n' + "word " * 100
)


def test_a_complete_document_has_the_whole_structure_score():
    assert caws_structure_score(DOCUMENT) == pytest.approx(1.0)  # the first implementation never passed 0.71
    assert caws_structure_score("") == 0.0


def test_parts_of_the_structure_count_as_they_say():
    assert caws_structure_score("**Invariants**\n") == pytest.approx(0.4 / 3 + 0.2 * 0.25 + 0.2 * 0.01)
    assert caws_structure_score("We have invariants, acceptance and a working spec.") == pytest.approx(0.2 * 0.08)
    assert caws_structure_score('{"a": 1}') == pytest.approx(0.2 * 0.5 + 0.2 * 0.02)
    assert caws_structure_score("{} {a} #1 -x") == pytest.approx(0.2 * 0.04)


def test_rewards_are_the_weighted_scores_and_no_claims_of_the_teacher_say_nothing():
    texts = ["Oslo has 700000 people.", "<bot>", "Oslo has 5 people."]
    teachers = ["Oslo has 700000 people.", "Hello there.", "Oslo has 700000 people."]
    judged = judge(texts, teachers, [2, 2, 2], caws=1.0, claims=2.0)
    np.testing.assert_allclose(judged.reward, [1 + 2, math.exp(-1), 1 + 2 * 0.5])
    assert judged.complete.tolist() == [False] * 3
    np.testing.assert_allclose(judged.quality, [1, math.exp(-1), 2 / 3])
    assert np.isnan(judge(texts, teachers, [2, 2, 2], caws=0.0, claims=2.0).quality).tolist() == [False, True, False]
    assert np.isnan(judge(texts, teachers, [2, 2, 2], caws=0.0, claims=0.0).quality).all()
    assert [part.shape for part in judge([], [], [], caws=1.0, claims=1.0)] == [(0,)] * 3


def test_each_response_is_rewarded_by_the_tier_of_its_sample():
    text = "<bot>a<eot> <bot>b<eot> Fine."
    judged = judge([text] * 3, [""] * 3, [1, 2, 3], caws=1.0, claims=0.0)
    np.testing.assert_allclose(judged.reward, np.exp([-0.5 * 2, -0.5, 0.0]))


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        (call("book", day="Friday", guests=2), True),
        ("Of course. " + call("book", guests=9, day="Sunday", outdoor=True), True),  # other values, and more of them
        (call("book", day="Friday"), False),
        (call("order", day="Friday", guests=2), False),
        (call("book", day="Friday", guests=2)[:-20], False),  # cut off
        ("I have booked it for Friday.", False),
    ],
)
def test_a_response_with_the_teachers_calls_and_their_arguments_is_complete(text, complete):
    teacher = call("book", day="Monday", guests=4)
    assert holds_calls(text, teacher) is complete
    assert holds_calls(text + text, teacher + teacher) is complete
    assert not holds_calls(call("book", day="Friday", guests=2), teacher + teacher), "one call for two"
    assert not holds_calls(text, "Hello."), "nothing was asked for that could be complete"


@pytest.mark.parametrize("piece", ["Step 1:", "# ", "**a", "- ", "<bot>", "{", "```", "but "])
def test_time_is_linear_in_adversarial_text(piece):
    text = piece * (100_000 // len(piece))
    started = time.process_time()
    caws_compliance(text)
    caws_structure_score(text)
    assert time.process_time() - started < 5.0  # quadratic time would be hours
