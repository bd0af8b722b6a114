"""What counts as a claim, where it stands, and how a student's claims compare with the teacher's."""

from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykd.data.claims import claim_score, claim_spans, extract_claims, latent_spans


def claims(text: str) -> list[str]:
    return [text[start:end] for start, end in claim_spans(text)]


@pytest.mark.parametrize(
    "text",
    [
        "hello there friend",  # the first implementation: two words in a row are a proper noun
        "Hello there friend.",
        "it is very nice here.",
        "The weather is nice today.",
        "Is Paris the capital of France?",
        "Perhaps it costs 30 euros in Rome.",
        "I think Oslo is the capital of Norway.",
        "It might be 12 degrees in Oslo.",
        "Sorry, I have no tool to check the weather.",
        '{"city": "Paris", "is": "large, has 2 towers, and was built in 1889"}',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo was 12"}}\n</tool_call>',
        "```python\nx = 3  # it is 3 in Oslo\n```",
        "<bot>Oslo is the capital of Norway.<eot>",
        "",
        "...",
    ],
)
def test_no_claim(text):
    assert claims(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The capital of France is Paris.", ["The capital of France is Paris."]),
        ("In Oslo it is -3 degrees and sunny.", ["In Oslo it is -3 degrees and sunny."]),
        ("Version 2.10 was released on 2024-05-01. It is good.", ["Version 2.10 was released on 2024-05-01."]),
        ("New York is large. Really large it is.", ["New York is large."]),
        ("It costs 30 euros, and Dr. Who lives in St. Gallen.", ["It costs 30 euros", "Dr. Who lives in St. Gallen."]),
        ("Paris, France, is old; maybe 2000 years are enough.", ["Paris, France, is old"]),
        ("See below.\n  The sum is 12  \nBye", ["The sum is 12"]),
        ("May 5 is the day when Anna arrives.", ["May 5 is the day when Anna arrives."]),
        ('Here: {"a": 1} The order costs 12 dollars.', ["The order costs 12 dollars."]),
        ("It is at https://a.b/c?d=1.", ["It is at https://a.b/c?d=1."]),
    ],
)
def test_claims_and_where_they_stand(text, expected):
    assert claims(text) == expected


def test_anchors_are_numbers_names_and_references():
    (claim,) = extract_claims('On 2024-05-01 Anna Berg paid 1,234.50 for the "Blue Door" at https://x.y.')
    assert claim.anchors == {"2024-05-01", "anna", "berg", "1,234.50", "blue door", "blue", "door", "https://x.y."}


def test_a_latent_span_reaches_from_the_first_begin_to_the_next_end():
    text = "a<bot><bot><eot>b<eot>c<bot>d"
    spans, unmatched = latent_spans(text)
    assert [text[start:end] for start, end in spans] == ["<bot><bot><eot>", "<bot>d"]
    assert unmatched == 2
    assert latent_spans("<bot><bot><eot>").num_unmatched == 0


TEACHER = "The capital of France is Paris. Oslo has 700000 people. Rome was built by Romulus. Cairo lies in Egypt."


def test_the_penalty_is_that_of_the_formula():
    assert claim_score(TEACHER, TEACHER) == (0.0, 1.0)
    # One claim of four: 0.6 (1 - 0.25 / 0.5); one statement of two a claim: 0.4 (1 - 0.5 / 0.7).
    score = claim_score("Oslo has 700000 people. It is nice.", TEACHER)
    assert score.penalty == pytest.approx(0.6 * 0.5 + 0.4 * (1 - 0.5 / 0.7))
    assert score.support == 1.0
    assert claim_score("", TEACHER) == (1.0, 0.0)


def test_claims_that_the_teacher_does_not_support_cost_the_reward():
    wrong = claim_score("The capital of France is Lyon. Oslo has 700000 people.", TEACHER)
    assert wrong.support == 0.5
    assert wrong.reward < claim_score("The capital of France is Paris. Oslo has 700000 people.", TEACHER).reward


def test_a_teacher_without_claims_says_nothing_about_the_student():
    score = claim_score(TEACHER, "Hello there friend.")
    assert math.isnan(score.penalty)
    assert math.isnan(score.reward)


@given(st.text(alphabet=st.sampled_from('aB.,;? \n{}[]"`<>1éß。') | st.characters(), max_size=300))
def test_claims_are_trimmed_ordered_disjoint_spans_of_the_text(text):
    spans = claim_spans(text)
    assert all(0 <= start < end <= len(text) and text[start:end] == text[start:end].strip() for start, end in spans)
    assert all(before.end <= after.start for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize(
    "piece", ["{", '{"a', "<bot>", "A. ", "a", "Aa ", "1.", '"', "`", "; ", "\n", "```\n", ", and ", "https://", "is it 1. "]
)
def test_time_is_linear_in_adversarial_text(piece):
    text = piece * (100_000 // len(piece))
    started = time.process_time()
    claim_spans(text)
    assert time.process_time() - started < 10.0  # quadratic time would be hours
