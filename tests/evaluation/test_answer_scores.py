"""Text rules as metrics: which prompts each covers, by the data and the teacher's text alone, and what it says there."""

from __future__ import annotations

import math

import pytest

from raykd.demo.code_mode import generate_pairs
from raykd.evaluation.answer_scores import WITHOUT_SECTIONS, prefers_code, score_answer
from raykd.sample_config import CodeModeConfig

DOCUMENT = """# Working Spec
Add a cache. It holds 100 rows.
# Invariants
- a row is read once
# Acceptance
```json
{"rows": 100}
```
"""
RULES = CodeModeConfig()
CALLS = '<tool_call>\n{"name": "find", "arguments": {"city": "Rome"}}\n</tool_call>'
OFFER = {"role": "system", "content": "Tools may be called from TypeScript:\ndeclare const tools: {\n};"}
ASKED = {"role": "user", "content": "Weather in Rome and in Oslo?"}


def score(text: str, teacher_text: str | None = "Hello.", *, prefers: bool = False, tier: int = 2) -> dict[str, float]:
    found = score_answer(text, teacher_text, prefers_code=prefers, caws_tier=tier)
    return {name: total / count for name, (total, count) in found.items()}


def test_compliance_is_scored_on_every_prompt_with_the_tier_of_the_prompt():
    assert score("Hello.") == {"caws_compliance": 1.0}
    span = "<bot> a <eot> Hello."
    assert score(span, tier=2)["caws_compliance"] == 1.0
    assert score(span, tier=1)["caws_compliance"] == pytest.approx(math.exp(-0.5))
    assert score("<bot> a")["caws_compliance"] == pytest.approx(math.exp(-1.0))


def test_structure_is_asked_for_only_where_the_teacher_wrote_such_a_document():
    assert "caws_structure" not in score(DOCUMENT, "Hello.")
    long_answer = '## Answer\n- one\n```json\n{"a": 1}\n```\n' + "word " * 100
    assert "caws_structure" not in score("Hello.", long_answer)  # 0.6: all but the three headings
    assert score("Hello.", DOCUMENT)["caws_structure"] == pytest.approx(0.2 * 0.01)
    own = score(DOCUMENT, None)["caws_structure"]
    assert own == score(DOCUMENT, DOCUMENT)["caws_structure"] > WITHOUT_SECTIONS


def test_claims_are_held_against_the_teachers_where_it_makes_any():
    teacher = "The train to Oslo leaves at 18:30."
    assert score(teacher, teacher)["claim_score"] == 1.0
    assert score("I do not know.", teacher)["claim_score"] == 0.0
    assert score("The train to Oslo leaves at 17:00.", teacher)["claim_score"] == 0.5  # as many claims, none supported
    assert "claim_score" not in score("The train leaves at 18:30.", "Sure!")
    assert "claim_score" not in score(teacher, None), "the teacher is not held against itself"


def test_code_is_looked_for_where_the_prompt_prefers_it():
    (pair,) = generate_pairs(1, seed=0, split="held_out")
    assert score(pair["teacher_text"], prefers=True)["code_mode_adoption"] == 1.0
    assert score(pair["rejected_text"], prefers=True)["code_mode_adoption"] == 0.0
    assert score("", prefers=True)["code_mode_adoption"] == 0.0
    assert "code_mode_adoption" not in score(pair["teacher_text"])
    assert prefers_code(pair["messages"], 2, RULES)


@pytest.mark.parametrize(
    ("messages", "num_calls", "expected"),
    [
        ([OFFER, ASKED], 2, True),
        ([OFFER, ASKED], 1, False),  # one call is no reason for code
        ([ASKED], 2, False),  # code is not offered
        ([OFFER, ASKED], 0, False),  # nothing is to be called
        ([{"role": "user", "content": OFFER["content"]}], 2, False),
        ([OFFER, ASKED, {"role": "tool", "content": "ana@example.org"}], 1, True),
        ([OFFER, ASKED, {"role": "tool", "content": "x" * 10_000}], 1, True),
        ([{"role": "system", "content": "You may use tools. An api is at hand."}, ASKED], 2, False),
        ([{"role": "developer", "content": "Write `callTool(name, arguments)`."}, ASKED], 2, True),
    ],
)
def test_a_prompt_prefers_code_where_it_offers_it_and_a_rule_of_code_mode_holds(messages, num_calls, expected):
    assert prefers_code(messages, num_calls, RULES) is expected
