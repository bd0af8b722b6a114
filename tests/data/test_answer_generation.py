"""raykd/data/answer_generation.py: only answers to tool results are supervised, whatever form the rows have."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raykd.data.answer_generation import NotSelected, answer_turns, as_messages
from raykd.data.chat import Completions, tokenize_row
from raykd.data.conversation import RowError
from raykd.demo.answers import generate_answers
from raykd.demo.corpus import generate_conversations

CALL = {"id": "1", "type": "function", "function": {"name": "double", "arguments": '{"n": 2}'}}
ASKED = {"role": "user", "content": "double 2"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": '{"value": 4}'}
ANSWER = {"role": "assistant", "content": "It is 4."}
SMALL_TALK = {"role": "assistant", "content": "You are welcome."}
THANKS = {"role": "user", "content": "thanks"}


def supervised(tokenizer, row: dict, completions: Completions = "recorded") -> list[str]:
    """The texts of the runs of supervised tokens of a row in stage answer."""
    prompt = tokenize_row(tokenizer, row, uid=0, key="k", completions=completions, max_tokens=9999, answers_only=True).prompt
    if prompt.recorded_ids is None:
        return [tokenizer.decode(prompt.prompt_ids)]
    assert prompt.response_mask is not None
    cuts = np.flatnonzero(np.diff(prompt.response_mask.astype(int))) + 1
    parts = zip(np.split(prompt.recorded_ids, cuts), np.split(prompt.response_mask, cuts), strict=True)
    return [tokenizer.decode(ids) for ids, mask in parts if mask[0]]


def test_the_answer_and_its_end_are_supervised_and_neither_the_call_nor_small_talk(demo_tokenizer):
    row = {"messages": [ASKED, CALLED, RESULT, ANSWER, THANKS, SMALL_TALK]}
    assert supervised(demo_tokenizer, row) == ["It is 4.<|im_end|>"]


def test_every_answer_of_a_conversation_is_supervised(demo_tokenizer):
    again = [{"role": "user", "content": "and 3"}, CALLED, RESULT, {"role": "assistant", "content": "It is 6."}]
    row = {"messages": [ASKED, CALLED, RESULT, ANSWER, *again]}
    assert supervised(demo_tokenizer, row) == ["It is 4.<|im_end|>", "It is 6.<|im_end|>"]
    assert answer_turns(row["messages"]) == [1, 3]


def test_the_teacher_is_asked_behind_the_last_tool_result(demo_tokenizer):
    [prompt] = supervised(demo_tokenizer, {"messages": [ASKED, CALLED, RESULT, ANSWER, THANKS, SMALL_TALK]}, "teacher")
    assert prompt.endswith('{"value": 4}\n</tool_response><|im_end|>\n<|im_start|>assistant\n')


def test_a_row_of_input_and_target_is_the_conversation_it_stands_for(demo_tokenizer):
    tools = [{"type": "function", "function": {"name": "double", "parameters": {"type": "object", "properties": {}}}}]
    given = {"system": "Be short.", "tools": tools, "history": [ASKED, CALLED], "tool_result": {"value": 4}}
    whole = {"messages": [{"role": "system", "content": "Be short."}, ASKED, CALLED, RESULT, ANSWER], "tools": tools}
    for row in ({"input": given, "target": "It is 4."}, {"input": json.dumps(given), "target": "It is 4."}):
        assert supervised(demo_tokenizer, row) == ["It is 4.<|im_end|>"]
        first, second = (
            tokenize_row(
                demo_tokenizer, r, uid=0, key="k", completions="recorded", max_tokens=9999, answers_only=True
            ).prompt
            for r in (row, whole)
        )
        np.testing.assert_array_equal(first.prompt_ids, second.prompt_ids)


@pytest.mark.parametrize("completions", ["teacher", "recorded"])
def test_a_conversation_without_a_tool_result_is_not_selected(demo_tokenizer, completions):
    with pytest.raises(NotSelected, match="stage=answer"):
        supervised(demo_tokenizer, {"messages": [THANKS, SMALL_TALK]}, completions)
    with pytest.raises(NotSelected):
        supervised(demo_tokenizer, {"messages": [ASKED, CALLED]}, completions)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": {"history": [ASKED], "result": 1}, "target": "x"}, ["keys ['result']", "tool_result"]),
        ({"input": [1], "target": "x"}, ["list", "expected an object"]),
        ({"input": {"history": []}, "target": "x"}, ["input.history", "non-empty list"]),
        ({"input": {"history": [ASKED]}, "target": ""}, ["`target`", "text of the answer"]),
        ({"input": "{broken", "target": "x"}, ["input is a string but no JSON"]),
    ],
)
def test_a_row_that_is_none_says_why(row, words):
    with pytest.raises(RowError) as caught:
        as_messages(row)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_demo_has_answers_in_this_form_that_no_held_out_prompt_shares(demo_tokenizer):
    rows = list(generate_answers(20, 1, "train"))
    assert [supervised(demo_tokenizer, row) for row in rows] == [[f"{row['target']}<|im_end|>"] for row in rows]


def test_whole_demo_conversations_are_cut_to_their_answers(demo_tokenizer):
    for row in generate_conversations(20, 3, "train"):
        answers = [
            m["content"] for before, m in zip(row["messages"], row["messages"][1:], strict=False)
            if before["role"] == "tool" and m["role"] == "assistant" and not m.get("tool_calls")
        ]  # fmt: skip
        if answers:
            assert supervised(demo_tokenizer, row) == [f"{answer}<|im_end|>" for answer in answers]
