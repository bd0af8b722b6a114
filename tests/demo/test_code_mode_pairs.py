"""Code-mode pairs: two responses to a task, programs that run, marks that fall where they should."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raykd.data.chat import render
from raykd.data.examples import Wanted, decode_spans
from raykd.data.extractors import extract_tool_calls
from raykd.data.offline_rows import RowReader
from raykd.demo.code_mode import generate_pairs, main, program, run_program, typescript_api
from raykd.demo.corpus import SCENES, spoken_fields
from raykd.demo.registry import TOOLS, call_tool
from raykd.types import Mark, Source


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


def direct_calls(row):
    return [(call.name, call.arguments or {}) for call in extract_tool_calls(row["rejected_text"])]


def test_both_responses_to_a_task_do_the_same_and_the_program_says_what_the_calls_find(rows):
    for row in rows:
        calls = direct_calls(row)
        assert len(calls) >= 2
        told = [SCENES[name].answer.format(**json.loads(call_tool(name, a)) | spoken_fields(a)) for name, a in calls]
        assert row["answer"] == " ".join(told)
        assert row["teacher_text"].count("await tools.") == len(calls)
        assert all(f"await tools.{name}(" in row["teacher_text"] for name, _ in calls)
    assert len({row["id"] for row in rows}) == len(rows)


def test_samples_are_deterministic_and_sides_share_no_request(rows):
    assert rows == list(generate_pairs(40, seed=1, split="train"))
    assert rows != list(generate_pairs(40, seed=2, split="train"))
    held_out = {row["messages"][1]["content"] for row in generate_pairs(10, seed=1, split="held_out")}
    assert not held_out & {row["messages"][1]["content"] for row in rows}


def test_the_rejected_turn_is_what_the_template_writes_for_the_calls(rows, demo_tokenizer):
    for row in rows:
        calls = [{"type": "function", "function": {"name": name, "arguments": a}} for name, a in direct_calls(row)]
        turn = {"role": "assistant", "content": None, "tool_calls": calls}
        text, spans = render(demo_tokenizer, [*row["messages"], turn], row["tools"])
        assert text[slice(*spans[-1])] == row["rejected_text"] + "<|im_end|>"


def test_rows_become_pairs_with_code_and_direct_calls_marked(rows, demo_tokenizer):
    wanted = Wanted(losses=frozenset(["code_mode_preference"]))
    read = RowReader(demo_tokenizer, wanted=wanted).examples(rows)
    for row, halves in zip(rows, read, strict=True):
        assert not isinstance(halves, str), halves
        code, direct = (decode_spans(half, demo_tokenizer) for half in halves)
        assert [half.source for half in halves] == [Source.GOLD, Source.STUDENT]
        assert code[Mark.RESPONSE] == [row["teacher_text"] + "<|im_end|>"]
        assert "".join(code[Mark.CODE_MODE]).startswith("const first = await tools.")
        assert not code[Mark.DIRECT_TOOL]
        assert direct[Mark.RESPONSE] == [row["rejected_text"] + "<|im_end|>"]
        assert [json.loads(text)["name"] for text in direct[Mark.DIRECT_TOOL]] == [name for name, _ in direct_calls(row)]
        first = int(np.argmax((halves[0].marks & Mark.RESPONSE) != 0))
        assert halves[0].input_ids[:first].tolist() == halves[1].input_ids[:first].tolist(), "the prompt is the same"


def test_what_is_no_program_is_refused():
    code = program([{"name": "sum_numbers", "arguments": {"numbers": [1, 2]}}])
    assert code == 'const first = await tools.sum_numbers({"numbers": [1, 2]});\nreturn `The sum is ${first.sum}.`;'
    with pytest.raises(ValueError, match="expected `const"):
        run_program("await tools.sum_numbers(1);\nreturn `x`;")


def test_the_command_writes_the_rows(tmp_path, rows):
    main(["--out", str(tmp_path / "new" / "pairs.jsonl"), "--tasks", "3", "--seed", "1"])
    lines = (tmp_path / "new" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows[:3]
