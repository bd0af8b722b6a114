"""Answers to tool results: which turns of a conversation they are, and rows that hold just one of them.

In:  a row of the user's data, or its conversation. Out: the conversation up to its last answer; which turns are answers.

An answer (text or code) is an assistant turn without calls, directly behind a tool result. Rows may be whole conversations
(`messages`, `tools`) or one answer each:

    {"input": {"system": "...", "tools": [...], "history": [...], "tool_result": ...}, "target": "..."}

`history` are messages up to the call or, when it ends with a user message, without one; `tool_result` is text or any JSON.
All but `history` may be left out. The model's own chat template writes them, like any conversation: only the target is
supervised, and with it the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from raykd.data.conversation import Conversation, RowError, from_json_text, json_text

_INPUT_KEYS = {"system", "tools", "history", "tool_result"}


class NotSelected(RowError):
    """A usable row that has nothing of what the stage is about."""


def as_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of `input` and `target` as one of `messages` and `tools`; any other row as it is. Raises RowError."""
    if row.get("input") is None or row.get("messages") is not None:
        return row
    given = from_json_text(row["input"], "input")
    if not isinstance(given, Mapping) or (unknown := sorted(given.keys() - _INPUT_KEYS)):
        found = f"the keys {unknown}" if isinstance(given, Mapping) else type(given).__name__
        raise RowError(f"`input` has {found}, expected an object of {sorted(_INPUT_KEYS)}")
    history = from_json_text(given.get("history"), "input.history")
    if not isinstance(history, list) or not history:
        raise RowError(f"input.history is {type(history).__name__}, expected a non-empty list of messages")
    if not isinstance(row.get("target"), str) or not row["target"]:
        raise RowError(f"`target` is {type(row.get('target')).__name__}, expected the text of the answer")
    system = [{"role": "system", "content": given["system"]}] if given.get("system") else []
    result = given.get("tool_result")
    text = result if isinstance(result, str) else json_text(result, "input.tool_result")
    results = [] if result is None else [{"role": "tool", "content": text}]
    target = {"role": "assistant", "content": row["target"]}
    others = {key: value for key, value in row.items() if key not in ("input", "target")}
    return {**others, "messages": [*system, *history, *results, target], "tools": given.get("tools")}


def answer_turns(messages: list[dict[str, Any]]) -> list[int]:
    """Which of the assistant turns, counted from 0, are answers to tool results."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [turn for turn, index in enumerate(turns) if index and _is_answer(messages[index - 1], messages[index])]


def _is_answer(before: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    return before["role"] == "tool" and not message.get("tool_calls")


def up_to_last_answer(conversation: Conversation, completions: str) -> Conversation:
    """The conversation through its last answer (recorded), or through the last tool result, for the teacher to answer.

    Raises NotSelected where there is none.
    """
    messages = conversation.messages
    if completions == "teacher":
        ends = [index for index, message in enumerate(messages) if message["role"] == "tool"]
    else:
        pairs = enumerate(pairwise(messages), 1)
        ends = [
            index for index, (before, message) in pairs if message["role"] == "assistant" and _is_answer(before, message)
        ]
    if not ends:
        raise NotSelected("no answer to a tool result: stage=answer is about nothing else (not counted as rejected)")
    return replace(conversation, messages=messages[: ends[-1] + 1])
