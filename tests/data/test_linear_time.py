"""Reading takes time in step with the text, whatever the text: counted calls, CPU time against itself, and 10 MB at once."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from raykd.data.claims import claim_spans
from raykd.data.code_mode import code_mode_spans
from raykd.data.curriculum import find_steps
from raykd.data.detokenize import decode_tokens
from raykd.data.extractors import argument_spans, extract_tool_calls, token_mask
from raykd.data.id_sets import CopyIndex, Turn, id_sets
from raykd.data.integration import ResultIndex
from raykd.data.process_targets import find_turn_spans, mark_turn
from raykd.data.value_readings import find_readings
from raykd.types import SetKind, Span

CALL_OPENERS = ["<tool_call>", "<tool_call>\n", '<tool_call>{"name":', "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]
CALL_OPENERS += ["[ARGS]{", "x[ARGS]{", "a[CALL_ID]b[ARGS]", "[CALL_ID]a", "<function=", "<function=f>", "<function=f>{"]
CALL_OPENERS += ['{"name":"f","arguments":{', '{"name":"f","arguments":"', '{"name":"f","arguments":{}}', "</tool_call>"]
CALL_OPENERS += ['{"name":"f","arguments":"{\\"', '{"tool_calls":[', '{"function":', '{"function":{"name":"f"']
CALL_OPENERS += ['{"arguments":{"a":']
JSON_PIECES = ["{", '{"', '[{"a":', "[", "[[]", "[]", "{}", '{"a":{}', '{"a\\"', '["a b ', '{"a":[1,', '["\\"', '["abc\n']
JSON_PIECES += ['["\\u12', '["\\ud83d', '{"a":t', '{"a":-', "[1.", '{"a" :', "[ ", '{"a":1,"a":', '{"🙂":', "}", "]"]
JSON_PIECES += ['"', '\\"']
PROSE = [" ", "\n", "1", "9 ", "1 234 ", "1,", "1.2.", "-", "5%", "2024-", "May 1 ", "1 of ", "6:30 ", "a", "A_", "_a "]
PROSE += ["a@b.", "http://a/", "`", "“", "a: ", "step 1: a\n", "1. a\n", ".", "?\n", ", and ", "Dr. ", "```", "~~~"]
PROSE += ["```json\n", "await f", "const a", "a =", "api.a", "<bot>", "<bot><eot>", "a'", "I ", "is 7 ", "²", "٣. "]
# What comes before or behind a flood may be what makes each of its pieces be tried anew.
FRAMES = [("", ""), ('["', '"x'), ("1", ". x"), ("May", "x"), ('http://"', " x"), ("a", "x"), ("", "/<eot>x")]


def flood(unit: str, length: int, frame: tuple[str, str] = ("", "")) -> str:
    return frame[0] + unit * (length // len(unit)) + frame[1]


def read_calls(text: str) -> None:
    for call in extract_tool_calls(text):
        argument_spans(text, call)


def num_events(function: Callable[[str], Any], text: str) -> int:
    """Function calls and returns, of Python and of C, while `function` reads the text."""
    count = 0

    def profile(_frame: object, _event: str, _argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        function(text)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("unit", CALL_OPENERS + JSON_PIECES)
def test_twice_the_text_is_twice_the_work(unit):
    # Long enough for several of the deepest trees that are read (json_tree.MAX_DEPTH).
    small, large = (num_events(read_calls, flood(unit, length)) for length in (12_000, 24_000))
    assert large <= 2.5 * small


def timed(function: Callable[[str], Any], text: str) -> tuple[float, Any]:
    """CPU seconds, without pauses of the garbage collector, and what came out."""
    gc.disable()
    try:
        start = time.process_time()
        result = function(text)
        return time.process_time() - start, result
    finally:
        gc.enable()


RESULT = ResultIndex(
    [json.dumps({"city": "New York", "n": 1234.5, "day": "2024-05-15", "id": "credit_card_4421", "a": "a b"})]
)
READERS = {
    "calls": read_calls,
    "reuse": RESULT.find,
    "a tool result": lambda text: ResultIndex([text]),
    "claims": claim_spans,
    "code": code_mode_spans,
    "steps": find_steps,
    "numbers": find_readings,
}


@pytest.mark.parametrize("reader", READERS)
def test_no_regular_expression_looks_at_a_flood_again_and_again(reader):
    """What happens inside one match cannot be counted: 20 times the text may take 4 times its share of CPU time, not 20."""
    function = READERS[reader]
    function("warm up")

    def growth(unit: str, frame: tuple[str, str]) -> float:
        small, large = (timed(function, flood(unit, length, frame))[0] for length in (300, 6_000))
        return large / max(small, 2e-5)

    for unit in CALL_OPENERS + JSON_PIECES + PROSE:
        for frame in FRAMES if unit in PROSE else FRAMES[:1]:
            assert any(growth(unit, frame) <= 80 for _ in range(3)), (unit, frame)


@pytest.mark.slow
def test_ten_megabytes_of_everything_hide_no_call_and_cost_eight_times_an_eighth():
    def text_of(length: int) -> str:
        units = CALL_OPENERS + JSON_PIECES + PROSE
        return "\n".join(flood(unit, length // len(units)) for unit in units)

    call = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "New York", "k": [1, "é🙂"]}}\n</tool_call>'
    seconds = []
    for length in (1_250_000, 10_000_000):
        text = text_of(length) + call
        taken, spans = timed(lambda text: find_turn_spans(text, [RESULT], ["get_weather"]), text)
        seconds.append(taken)
        assert text[slice(*spans.tool_name[-1])] == "get_weather"
        assert [text[slice(*span)] for span in spans.argument_value[-3:]] == ["New York", "1", "é🙂"]
        assert spans.integration[-1] == spans.argument_value[-3]
        starts = np.arange(0, len(text), 3)
        offsets = np.stack([starts, np.minimum(starts + 3, len(text))], axis=1)
        mask = token_mask(offsets, spans.tool_name)
        covered = np.zeros(len(text) + 3, dtype=bool)
        for start, end in spans.tool_name:
            covered[start:end] = True
        assert (mask == covered[: 3 * len(starts)].reshape(-1, 3).any(axis=1)).all()
    assert seconds[1] <= 4 * 8 * seconds[0]


def test_numbers_of_thousands_of_digits_are_read_as_text():
    """Python refuses to make integers of them."""
    digits = "1" * 5_000
    assert find_steps(f"{digits}. x\nstep {digits}: y") == []
    text = f'{{"name": "f", "arguments": {{"n": {digits}}}}}'
    (call,) = extract_tool_calls(text)
    assert call.error is None
    assert text[slice(*argument_spans(text, call).value[0])] == digits
    assert ResultIndex([f'{{"n": {digits}}}', digits]).find(f"It is {digits}, or {digits}.0") == []
    mark_turn(text, np.array([[0, len(text)]]), [ResultIndex([text])])


def test_a_number_is_told_from_a_bounded_number_of_others(demo_tokenizer):
    def work(count: int) -> int:
        numbers = [str(1000 + index) for index in range(count)]
        ids = np.array(demo_tokenizer(" ".join(numbers), add_special_tokens=False)["input_ids"], np.int32)
        turn = Turn(*decode_tokens(demo_tokenizer, ids), ids, demo_tokenizer)
        results = [CopyIndex(f"[{', '.join(numbers)}]", demo_tokenizer)]
        reused = [Span(0, len(turn.text))]
        return num_events(lambda _: id_sets(turn, [SetKind.CONTRADICTION], reused=reused, results=results), "")

    assert work(800) <= 5 * work(200)
