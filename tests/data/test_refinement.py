"""Refinement loops of the user's conversations become decision points with targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from raykd.data.chat import tokenize_row
from raykd.data.conversation import RowError, read_conversation
from raykd.data.refinement import decisions, judge_score, read_refinements
from raykd.sample_config import HaltConfig

TOKENIZER = Path(__file__).parents[2] / "raykd" / "demo" / "teacher"

ASK = {"role": "user", "content": "Name a city."}
AGAIN = {"role": "user", "content": "Once more, better."}


def draft(loop: int | None, score: float | None = None, **keys) -> dict:
    message = {"role": "assistant", "content": f"Draft {loop}", **keys}
    return message | ({} if loop is None else {"loop": loop}) | ({} if score is None else {"judge_score": score})


def spans(messages: list[dict]) -> list[tuple[int, int]]:
    """Four tokens for every message, ten for those of the assistant."""
    found, at = [], 0
    for message in messages:
        size = 10 if message["role"] == "assistant" else 4
        if message["role"] == "assistant":
            found.append((at, at + size))
        at += size
    return found


def test_each_loop_has_its_decision_at_its_last_token():
    messages = [ASK, draft(0, 0.5), AGAIN, draft(1, 0.9), AGAIN, draft(2, 0.91)]
    position, halt, source = decisions(messages, spans(messages), HaltConfig(max_loops=9))
    assert position.tolist() == [13, 27, 41]
    assert halt.tolist() == [0.0, 0.0, 1.0]
    assert source.tolist() == [3, 3, 4]


def test_several_refinements_and_plain_turns_stand_side_by_side():
    messages = [
        ASK,
        draft(None),
        ASK,
        draft(0, 0.9, caws_tier=1),
        ASK,
        draft(0, 0.2),
        draft(1, max_loops=2),
        ASK,
        draft(None),
    ]
    position, halt, _ = decisions(messages, spans(messages), HaltConfig(max_loops=9))
    assert position.tolist() == [27, 41, 51]
    assert halt.tolist() == [1.0, 0.0, 1.0]


def test_limits_not_named_come_from_the_configuration():
    messages = [ASK, draft(0), draft(1), draft(2)]
    at = spans(messages)
    assert np.isnan(decisions(messages, at, HaltConfig(max_loops=3)).halt).tolist() == [True, True, False]
    assert np.isnan(decisions(messages, at, HaltConfig(max_loops=3), default_tier=2).halt).tolist() == [True, False, False]
    assert decisions(messages, at, HaltConfig(max_loops=3, curriculum_stage=1)).halt.tolist() == [0.0, 1.0, 1.0]
    messages[1]["curriculum_stage"] = 0
    assert decisions(messages, at, HaltConfig(max_loops=3, curriculum_stage=1)).halt.tolist() == [0.0, 0.0, 1.0]


def test_loops_that_were_cut_off_still_count_as_history():
    messages = [ASK, draft(0, 0.9), AGAIN, draft(1, 0.9), AGAIN, draft(2, 0.9)]
    whole = decisions(messages, spans(messages), HaltConfig(max_loops=9))
    for lost in (1, 2):
        cut = decisions(messages, spans(messages)[lost:], HaltConfig(max_loops=9))
        assert all(np.array_equal(a, b[lost:]) for a, b in zip(cut, whole, strict=True))


def test_a_conversation_without_loops_has_no_decision():
    position, halt, source = decisions([ASK, draft(None, 0.5)], [(4, 14)], HaltConfig())
    assert len(position) == len(halt) == len(source) == 0
    assert judge_score(draft(None, 0.5), "") == 0.5


BAD = [
    ([draft(1)], r"messages\[1\]\.loop is 1, expected 0"),
    ([draft(0), draft(2)], r"messages\[2\]\.loop is 2, expected 1"),
    ([draft(0), draft(1), draft(1)], r"messages\[3\]\.loop is 1, expected 2"),
    ([{**draft(0), "loop": "0"}], r"loop is '0', expected a whole number"),
    ([{**draft(0), "loop": True}], "loop is True"),
    ([{**AGAIN, "loop": 0}], "on a user message"),
    ([draft(0, 1.5)], r"judge_score is 1\.5, expected a number from 0 to 1"),
    ([draft(0, float("nan"))], "judge_score is nan"),
    ([{**draft(0), "judge_score": "good"}], "judge_score is 'good'"),
    ([draft(0, caws_tier=4)], "caws_tier is 4, expected a whole number from 1 to 3"),
    ([draft(0, max_loops=0)], "max_loops is 0, expected a whole number from 1"),
    ([draft(0, curriculum_stage=3)], "curriculum_stage is 3"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD)
def test_malformed_loops_are_refused_with_the_reason(messages, reason):
    with pytest.raises(RowError, match=reason):
        read_refinements([ASK, *messages])


def test_a_row_with_malformed_loops_never_becomes_a_prompt():
    row = {"messages": [ASK, draft(0), draft(2)]}
    with pytest.raises(RowError, match="expected 1"):
        tokenize_row(AutoTokenizer.from_pretrained(TOKENIZER), row, uid=1, key="k", completions="recorded", max_tokens=999)


def test_the_keys_travel_with_the_conversation_and_the_decision_is_the_end_of_turn_token():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    row = {"messages": json.dumps([ASK, draft(0, 0.3), AGAIN, draft(1, 0.9)])}
    prompt = tokenize_row(tokenizer, row, uid=1, key="k", completions="recorded", max_tokens=999).prompt
    assert prompt.recorded_ids is not None
    assert prompt.response_mask is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], prompt.response_mask, [0]])))
    turns = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    found = decisions(json.loads(prompt.messages_json), turns, HaltConfig(max_loops=2))
    assert tokenizer.convert_ids_to_tokens(prompt.recorded_ids[found.position]) == [tokenizer.eos_token] * 2
    assert found.halt.tolist() == [0.0, 1.0]


anything = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 4), st.floats(), st.text(max_size=2), st.lists(st.integers(), max_size=1)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["loop", "judge_score", "max_loops", "caws_tier"]), anything), max_size=4))
def test_whatever_the_keys_hold_there_are_targets_or_a_reason(keys):
    messages = [ASK, *({"role": "assistant", "content": "x", **extra} for extra in keys)]
    try:
        conversation = read_conversation({"messages": messages}, "recorded")
        found = decisions(conversation.messages, spans(conversation.messages), HaltConfig())
    except RowError:
        return
    assert len(found.position) == len(found.halt) == sum("loop" in message for message in conversation.messages)
