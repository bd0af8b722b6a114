"""Spans of code that calls tools, of direct calls, and who is eligible."""

from __future__ import annotations

import time

import numpy as np
import pytest

from raykd.data.code_mode import code_mode_eligible, code_mode_spans, direct_tool_spans, fenced_blocks, personal_data
from raykd.data.extractors import extract_tool_calls
from raykd.sample_config import CodeModeConfig

CODE = 'const weather = await tools.get_weather({ city: "Oslo" });\nreturn weather.temperature;\n'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def code(text: str) -> list[str]:
    return [text[start:end] for start, end in code_mode_spans(text)]


@pytest.mark.parametrize("language", ["ts", "typescript", "TypeScript", "js", ""])
def test_a_block_that_calls_tools_is_code_without_its_fences(language):
    text = f"I look it up.\n```{language}\n{CODE}```\nDone."
    assert code(text) == [CODE]


@pytest.mark.parametrize(
    "text",
    [
        "I import goods from Norway and await your answer (soon).",
        "await confirmation (soon) and const is a word, from is another.",
        '```ts\nconst greeting = "hello";\n```',
        f"```json\n{CODE}```",
        CALL,
        "",
    ],
)
def test_english_other_languages_and_code_without_tools_are_no_code_mode(text):
    assert code(text) == []


def test_a_bare_statement_is_code_and_its_neighbours_are_not():
    text = "First:\n  const x = await tools.sum({ numbers: [1, 2] });\nThen I tell you."
    assert code(text) == ["  const x = await tools.sum({ numbers: [1, 2] });"]
    assert code("await api.run()\nreturn await f(1)\nx = await g()") == [
        "await api.run()",
        "return await f(1)",
        "x = await g()",
    ]


def test_an_open_block_reaches_the_end_and_fences_inside_longer_ones_do_not_close_it():
    assert code(f"```ts\n{CODE}") == [CODE]
    longer = "````md\n```ts\nx\n```\n````\n"
    assert [(language, longer[slice(*inside)]) for language, inside, _ in fenced_blocks(longer)] == [
        ("md", "```ts\nx\n```\n")
    ]
    assert len(fenced_blocks("```\na\n```\n```\nb\n```")) == 2


def test_direct_calls_are_those_outside_the_code():
    inside = f"```ts\nconst shown = '{CALL}';\n{CODE}```\n".replace("\n{", "{").replace("}\n<", "}<")
    text = f"{CALL}\n{inside}{CALL}"
    calls = extract_tool_calls(text)
    assert len(calls) == 3
    assert direct_tool_spans(calls, code_mode_spans(text)) == [calls[0].call_span, calls[2].call_span]
    assert direct_tool_spans(extract_tool_calls(CALL), []) == [extract_tool_calls(CALL)[0].call_span]
    assert direct_tool_spans([], []) == []


def test_one_rule_is_enough_to_be_eligible():
    config = CodeModeConfig(min_tools=2, min_intermediate_chars=100)
    calls, sizes, private = np.array([2, 1, 1, 1, 0]), np.array([0, 100, 99, 10, 0]), np.array([0, 0, 0, 1, 0])
    # The fourth has small results and personal data: the first implementation found it not eligible.
    assert code_mode_eligible(calls, sizes, private, config).tolist() == [True, True, False, True, False]


def test_personal_data_is_found_by_the_default_patterns():
    patterns = CodeModeConfig().pii_patterns
    assert personal_data(["nothing", '{"mail": "ana.b+c@example.co.uk"}'], patterns)
    assert personal_data(["SSN 123-45-6789."], patterns)
    assert not personal_data(["2027-05-12 and @ana, 1123-45-67890"], patterns)
    assert not personal_data([], patterns)


@pytest.mark.parametrize(
    "piece", ["```", "```\n", "await ", "const ", "const x = ", "a", "a@", "tools.", "`", " \n", "tools.a ("]
)
def test_time_is_linear_in_adversarial_text(piece):
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    code_mode_spans(text)
    personal_data([text], CodeModeConfig().pii_patterns)
    assert time.process_time() - started < 5.0  # quadratic time would be hours
