"""Tool calls in text: every envelope, every known way to get it wrong, and time linear in the text."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data import extractors
from raykd.data.extractors import argument_spans, extract_tool_calls, token_mask
from raykd.types import Span


def under(text, span):
    return text[span.start : span.end]


def names(text, tools=None):
    return [call.name for call in extract_tool_calls(text, tools)]


JSON_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(JSON_TEXT, JSON_VALUES, max_size=4)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
PLAIN_NAMES = st.from_regex(r"[a-zA-Z_][\w.\-]{0,10}", fullmatch=True)


def call_json(name, arguments, key="arguments", **style):
    return json.dumps({"name": name, key: arguments}, **style)


def openai_call(name, arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


ENVELOPES = {
    "hermes": lambda n, a: f"Let me see.\n<tool_call>\n{call_json(n, a)}\n</tool_call><|im_end|>",
    "bare object": lambda n, a: call_json(n, a, ensure_ascii=False),
    "bare object in prose": lambda n, a: f'The tool "{n}" {{fits}}. {call_json(n, a)} Done.',
    "array": lambda n, a: f"[{call_json(n, a)}]",
    "fenced": lambda n, a: f"```json\n{call_json(n, a, indent=2)}\n```",
    "llama parameters": lambda n, a: call_json(n, a, "parameters"),
    "llama python tag": lambda n, a: f"<|python_tag|>{call_json(n, a, 'parameters')}<|eom_id|>",
    "mistral list": lambda n, a: f"[TOOL_CALLS] [{call_json(n, a)}]</s>",
    "openai message": lambda n, a: json.dumps({"role": "assistant", "content": None, "tool_calls": [openai_call(n, a)]}),
    "openai call": lambda n, a: json.dumps(openai_call(n, a), indent=1),
    "function call": lambda n, a: json.dumps({"function_call": {"name": n, "arguments": a}}),
    "arguments first": lambda n, a: json.dumps({"arguments": a, "name": n}),
}
NAMED_ENVELOPES = {
    "mistral args": lambda n, a: f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}</s>",
    "mistral call id": lambda n, a: f"[TOOL_CALLS]{n}[CALL_ID]a1b2c3d4e[ARGS] {json.dumps(a)}",
    "llama function tag": lambda n, a: f"<function={n}>{json.dumps(a)}</function>",
}


def check_round_trip(text, name, arguments):
    (call,) = extract_tool_calls(text)
    assert (call.name, call.arguments, call.truncated, call.error) == (name, arguments, False, None)
    written = under(text, call.name_span)
    assert name in (written, json.loads(f'"{written}"') if "\\" in written else written)
    value = json.loads(under(text, call.arguments_span))
    assert (json.loads(value) if isinstance(value, str) else value) == arguments
    for part in (call.name_span, call.arguments_span):
        assert call.call_span.start <= part.start <= part.end <= call.call_span.end


@settings(max_examples=25, deadline=None)
@given(name=NAMES, arguments=ARGUMENTS)
@pytest.mark.parametrize("envelope", ENVELOPES)
def test_any_call_survives_every_envelope(envelope, name, arguments):
    if '"' in name or "\\" in name or "{" in name:
        name = "tool" + str(len(name))  # the prose variant quotes the name as it is
    check_round_trip(ENVELOPES[envelope](name, arguments), name, arguments)


@settings(max_examples=20, deadline=None)
@given(name=PLAIN_NAMES, arguments=ARGUMENTS)
@pytest.mark.parametrize("envelope", NAMED_ENVELOPES)
def test_any_call_survives_envelopes_that_put_the_name_first(envelope, name, arguments):
    check_round_trip(NAMED_ENVELOPES[envelope](name, arguments), name, arguments)


@settings(max_examples=100, deadline=None)
@given(value=JSON_VALUES)
def test_json_without_the_shape_of_a_call_is_no_call(value):
    assert extract_tool_calls(f"Here: {json.dumps(value)} and {json.dumps([value, {'name': 'Bob', 'age': value}])}") == []


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from('{}[]":,\\ab1 \n') | st.characters(codec="utf-8"), max_size=60), arguments=ARGUMENTS)
def test_a_marked_call_is_found_behind_any_debris(text, arguments):
    call = f"\n<tool_call>\n{call_json('tool_x', arguments)}\n</tool_call>"  # the line break ends a stray string
    assert [c.arguments for c in extract_tool_calls(text + call) if c.name == "tool_x"] == [arguments]


# objectives.md 4.3, row by row
def test_three_levels_of_braces_inside_prose():
    text = 'I call {"name": "f", "arguments": {"a": {"b": 1}}} now.'
    (call,) = extract_tool_calls(text)
    assert call.arguments == {"a": {"b": 1}}
    assert under(text, call.arguments_span) == '{"a": {"b": 1}}'


def test_four_levels_of_braces_as_the_whole_text():
    text = '{"name": "f", "arguments": {"a": {"b": {"c": 1}}}}'
    (call,) = extract_tool_calls(text)
    assert under(text, call.arguments_span) == '{"a": {"b": {"c": 1}}}'


def test_a_brace_inside_a_string_argument():
    text = r'{"name": "grep", "arguments": {"regex": "a{2}[}\"]", "code": "if (x) { y(); "}}'
    (call,) = extract_tool_calls(text)
    assert call.arguments == {"regex": 'a{2}[}"]', "code": "if (x) { y(); "}


def test_two_calls_keep_their_own_spans():
    for text in (
        '[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"x": 2}}]',
        '{"name": "a", "arguments": {"x": 1}}\n{"name": "b", "arguments": {"x": 2}}',
        '<|python_tag|>{"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {"x": 2}}',
    ):
        calls = extract_tool_calls(text)
        assert [under(text, call.name_span) for call in calls] == ["a", "b"]
        assert [under(text, call.arguments_span) for call in calls] == ['{"x": 1}', '{"x": 2}']


def test_the_name_span_is_the_call_and_not_its_mention_in_prose():
    text = 'The tool "search" fits. {"name": "search", "arguments": {}}'
    (call,) = extract_tool_calls(text)
    assert call.name_span == Span(text.rindex("search"), text.rindex("search") + 6)


def test_arbitrary_json_with_a_name_is_no_call():
    assert names('{"name":"Bob","age":3}') == []
    assert names('{"name": "Bob", "arguments": "none"}') == []
    assert names('{"result": {"name": "f", "arguments": {}}}') == []
    assert names('[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object"}}}]') == []
    assert names('{"name":"f","parameters":{"type":"object","properties":{"x":{"type":"string"}}}}') == []


def test_openai_arguments_are_parsed_and_classified_through_their_escapes():
    arguments = {"city": 'Köln "x"', "n": 3}
    text = json.dumps({"tool_calls": [openai_call("w", arguments)]})
    (call,) = extract_tool_calls(text)
    assert call.arguments == arguments
    parts = argument_spans(text, call)
    assert [under(text, span) for span in parts.key] == ["city", "n"]
    assert [under(text, span) for span in parts.value] == [r"K\\u00f6ln \\\"x\\\"", "3"]
    assert {under(text, span) for span in parts.structure} == {'"', "{", r"\"", ":", ",", "}"}


def test_a_name_key_inside_the_arguments_is_not_the_name():
    text = '{"arguments": {"name": "f"}, "name": "f"}'
    (call,) = extract_tool_calls(text)
    assert call.name_span.start == text.rindex("f")


def test_an_escaped_name_has_the_span_of_its_escapes():
    text = r'{"name": "caf\u00e9", "arguments": {}}'
    (call,) = extract_tool_calls(text)
    assert call.name == "café"
    assert under(text, call.name_span) == r"caf\u00e9"


@pytest.mark.parametrize("cut", range(12, 72))
def test_a_call_cut_off_anywhere_is_reported_as_truncated(cut):
    text = '<tool_call>\n{"name": "get_w", "arguments": {"a": [1, true], "b": "x\\u00e9"}}'[:cut]
    calls = extract_tool_calls(text)
    if cut <= text.index("\n") + 1:
        assert calls == []
        return
    (call,) = calls
    assert call.truncated
    assert call.arguments is None
    assert call.error is None
    assert "get_w".startswith(under(text, call.name_span))
    assert call.call_span.end == len(text)
    parts = argument_spans(text, call)
    marked = [*parts.structure, *parts.key, *parts.value]
    assert all(call.arguments_span.start <= s.start < s.end <= len(text) for s in marked)


@pytest.mark.parametrize("number", ["-", "-1.", "1.5e", "1E+"])
def test_a_call_cut_off_inside_a_number_is_truncated_and_not_broken(number):
    text = f'<tool_call>{{"name": "f", "arguments": {{"x": {number}'
    (call,) = extract_tool_calls(text)
    assert (call.truncated, call.error) == (True, None)
    assert "".join(under(text, span) for span in argument_spans(text, call).value) == number


def test_a_bare_call_is_reported_as_truncated_once_its_arguments_have_begun():
    assert extract_tool_calls('{"name": "Bob", "argu') == []
    (whole, cut) = extract_tool_calls('[{"name":"a","arguments":{"x":1}},{"name":"b","arguments":{"q": "z')
    assert (whole.truncated, cut.truncated, cut.name) == (False, True, "b")


def test_what_is_wrong_with_a_call_is_said():
    def error(text, tools=None):
        (call,) = extract_tool_calls(text, tools)
        return str(call.error)

    assert error('{"name": "f", "arguments": {"x": 1, "x": 2}}') == "duplicate key 'x'"
    assert "invalid JSON" in error('<tool_call>{\'name\': \'f\'}</tool_call>{"name":"f","arguments":{x:1}}')
    assert error('<tool_call>{"name": "f"}</tool_call>') == "no arguments"
    assert error('<tool_call>{"name": "f", "arguments": {}} so\n</tool_call>') == "text after the call"
    assert error('<tool_call>{"name": "f", "arguments": "x"}</tool_call>') == "arguments are no JSON object"
    assert error('<tool_call>{"name": "f", "arguments": {}}</tool_call>', ["g"]) == "unknown tool 'f'"


def test_tool_names_decide_about_bare_objects_only():
    bare, marked = '{"name": "f", "arguments": {}}', '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert names(bare, ["f"]) == ["f"]
    assert names(bare, ["g"]) == []
    assert names(marked, ["g"]) == ["f"]


def test_a_stray_quote_hides_no_call():
    assert names('{"a, then <tool_call>{"name":"z","arguments":{}}</tool_call>') == ["z"]
    assert names('He said ["yes": {"name":"z","arguments":{}}') == ["z"]


def test_classes_cover_everything_but_white_space():
    text = '{"name": "f", "arguments": {"k\\"1": [1.5e3, "v, {x}", null, true, ""], "ü": {"z": -2}}}'
    (call,) = extract_tool_calls(text)
    parts = argument_spans(text, call)
    assert [under(text, span) for span in parts.key] == ['k\\"1', "ü", "z"]
    assert [under(text, span) for span in parts.value] == ["1.5e3", "v, {x}", "null", "true", "-2"]
    spans = sorted([*parts.structure, *parts.key, *parts.value])
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    covered = "".join(under(text, span) for span in spans)
    assert covered.replace(" ", "") == under(text, call.arguments_span).replace(" ", "")


ADVERSARIAL = [
    "{",
    '{"',
    '[{"a":',
    "[",
    '{"a\\"',
    '["a b ',
    '{"a":[1,',
    '<tool_call>{"name":',
    "x[ARGS]{",
    '["\\"',
    '["abc\n',
]


@pytest.mark.parametrize("unit", ADVERSARIAL)
def test_no_text_is_read_more_than_a_few_times_over(unit, monkeypatch):
    read = 0

    def counting(text, start, parse=extractors.parse):
        nonlocal read
        root, position = parse(text, start)
        read += root.end - start
        return root, position

    monkeypatch.setattr(extractors, "parse", counting)
    text = unit * (60_000 // len(unit))
    extract_tool_calls(text)
    assert read <= 3 * len(text)


def test_nesting_beyond_any_recursion_limit_is_survived():
    deep = "[" * 20_000 + "]" * 20_000
    (call, ok) = extract_tool_calls(f'{{"name": "f", "arguments": {{"x": {deep}}}}} {call_json("g", {})}')
    assert "invalid JSON" in str(call.error)
    assert ok.name == "g"
    shallow = "[" * 900 + "]" * 900
    (call,) = extract_tool_calls(f'{{"name": "f", "arguments": {{"x": {shallow}}}}}')
    assert call.error is None
    assert call.arguments is not None
    assert len(argument_spans(f'{{"name": "f", "arguments": {{"x": {shallow}}}}}', call).structure) == 1800 + 5


@settings(max_examples=200, deadline=None)
@given(
    widths=st.lists(st.integers(0, 4), max_size=20),
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=6),
)
def test_token_mask_is_overlap_with_any_span(widths, spans):
    ends = np.cumsum(widths)
    offsets = np.stack([ends - widths, ends], axis=1) if widths else np.empty((0, 2), int)
    spans = [Span(start, start + length) for start, length in spans]
    expected = [
        any(s < span.end and e > span.start for span in spans if span.start < span.end) and s < e for s, e in offsets
    ]
    mask = token_mask(offsets, spans)
    assert mask.dtype == bool
    assert mask.tolist() == expected
