"""The demo world's conversations: six kinds, two sides, gold fields that fit."""

import json
from collections import Counter

import pytest

from raykd.demo.corpus import KINDS, generate, generate_conversations, main
from raykd.demo.registry import call_tool


def _user_texts(rows) -> set[str]:
    return {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}


def test_train_and_held_out_share_no_request_whatever_their_seeds():
    train = _user_texts(generate(2000, 0, "train")) | _user_texts(generate_conversations(1000, 1, "train"))
    held_out = _user_texts(generate(1000, 0, "held_out")) | _user_texts(generate(1000, 1, "held_out"))
    assert len(train) > 1000
    assert len(held_out) > 500
    assert not train & held_out


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first = list(generate(50, 3, "train"))
    assert first == list(generate(50, 3, "train"))
    assert _user_texts(first) != _user_texts(generate(50, 4, "train"))
    assert len({row["id"] for row in first}) == 50


def test_every_kind_occurs_about_as_often_as_said():
    counts = Counter(row["kind"] for row in generate(2000, 0, "held_out"))
    assert {kind: count / 2000 for kind, count in counts.items()} == pytest.approx(KINDS, abs=0.04)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_gold_fields_fit_the_kind(split):
    for row in generate(600, 5, split):
        kind, offered = row["kind"], {tool["function"]["name"] for tool in row["tools"]}
        assert 2 <= len(offered) == len(row["tools"]) <= 4
        assert [call["name"] in offered for call in row["gold_calls"]] == [True] * (
            {"one_call": 1, "two_calls": 2}.get(kind, 0)
        )
        assert bool(row["gold_answer"]) == (not row["gold_calls"])
        assert bool(row["gold_values"]) == (kind in ("tool_result", "tool_error"))
        assert row["messages"][-1]["role"] == ("tool" if row["gold_values"] else "user")
        for value in row["gold_values"]:
            assert str(value) in row["gold_answer"]
        results = [json.loads(message["content"]) for message in row["messages"] if message["role"] == "tool"]
        assert [value for result in results for value in result.values()] == row["gold_values"]
        assert any("error" in result for result in results) == (kind == "tool_error")


def test_tool_messages_hold_what_the_called_tools_return():
    for row in generate_conversations(200, 6, "train"):
        pending = []
        for message in row["messages"]:
            if message["role"] == "assistant":
                pending = [call["function"] for call in message.get("tool_calls", [])]
            elif message["role"] == "tool":
                call = pending.pop(0)
                assert message["content"] == call_tool(call["name"], json.loads(call["arguments"]))
        assert row["messages"][-1]["role"] == "assistant"
        assert not pending


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="'test', expected 'train' or 'held_out'"):
        next(generate(1, 0, "test"))


def test_the_command_writes_both_files(tmp_path):
    main(["--out", str(tmp_path / "data"), "--train", "30", "--held-out", "10", "--seed", "2"])
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert rows == list(generate(30, 2, "train"))
    assert len((tmp_path / "data" / "held_out.jsonl").read_text().splitlines()) == 10
