"""Code-mode samples: both forms of a task, programs that run, marks that fall where they should."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raykd.data.chat import render
from raykd.data.code_mode import code_mode_eligible, code_mode_spans, direct_tool_spans
from raykd.data.conversation import read_conversation
from raykd.data.extractors import extract_tool_calls
from raykd.demo.code_mode import generate_pairs, main, program, run_program, typescript_api
from raykd.demo.registry import TOOLS
from raykd.loss_config import CodeModeConfig


@pytest.fixture(scope="module")
def rows():
    return list(generate_pairs(40, seed=1, split="train"))


def test_the_api_declares_every_argument():
    assert typescript_api(["get_weather", "order_item"]) == (
        "declare const tools: {\n"
        "  // Weather of a city\n"
        '  get_weather(args: { city: string; unit?: "celsius" | "fahrenheit" }): Promise<any>;\n'
        "  // Order from the shop\n"
        "  order_item(args: { item: string; quantity: number; address: { street: string; city: string } }): Promise<any>;\n"
        "};"
    )
    assert typescript_api([tool.name for tool in TOOLS]).count("Promise<any>") == len(TOOLS)


def test_both_forms_of_a_task_answer_alike_and_the_program_says_so(rows):
    for code, direct in zip(rows[::2], rows[1::2], strict=True):
        assert (code["form"], direct["form"]) == ("code", "direct")
        assert code["pair"] == -direct["pair"] > 0
        assert code["messages"][:2] == direct["messages"][:2], "the prompt is the same"
        assert code["messages"][-1] == direct["messages"][-1]
        body = code["messages"][2]["content"].removeprefix("```ts\n").removesuffix("\n```")
        assert run_program(body) == code["messages"][-1]["content"]
        calls = direct["messages"][2]["tool_calls"]
        assert len(calls) >= 2
        assert [call["function"]["name"] in body for call in calls] == [True] * len(calls)
    assert len({row["pair"] for row in rows}) == len(rows)


def test_samples_are_deterministic_and_sides_share_no_request(rows):
    assert rows == list(generate_pairs(40, seed=1, split="train"))
    assert rows != list(generate_pairs(40, seed=2, split="train"))
    held_out = {row["messages"][1]["content"] for row in generate_pairs(10, seed=1, split="held_out")}
    assert not held_out & {row["messages"][1]["content"] for row in rows}


def test_rows_are_valid_and_marked_as_code_or_direct_calls(rows, demo_tokenizer):
    num_calls = []
    for row in rows:
        conversation = read_conversation(row, "recorded")
        text, spans = render(demo_tokenizer, conversation.messages, conversation.tools)
        turn = text[slice(*spans[0])]
        calls = extract_tool_calls(turn)
        code = [turn[slice(*span)] for span in code_mode_spans(turn)]
        num_calls.append(len(row["messages"][2].get("tool_calls", ())) or code[0].count("await tools."))
        if row["form"] == "code":
            assert turn == f"```ts\n{code[0]}```<|im_end|>"
            assert not calls
        else:
            assert not code
            assert direct_tool_spans(turn, calls) == [call.call_span for call in calls]
            assert len(calls) == len(row["messages"][2]["tool_calls"])
    nothing = np.zeros(len(rows))
    assert code_mode_eligible(np.array(num_calls), nothing, nothing, CodeModeConfig()).all()


def test_what_is_no_program_is_refused():
    code = program([{"name": "sum_numbers", "arguments": {"numbers": [1, 2]}}])
    assert code == 'const first = await tools.sum_numbers({"numbers": [1, 2]});\nreturn `The sum is ${first.sum}.`;'
    with pytest.raises(ValueError, match="expected `const"):
        run_program("await tools.sum_numbers(1);\nreturn `x`;")


def test_the_command_writes_the_rows(tmp_path, rows):
    main(["--out", str(tmp_path / "new" / "pairs.jsonl"), "--tasks", "3", "--seed", "1"])
    lines = (tmp_path / "new" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows[:6]
