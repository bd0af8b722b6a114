"""What a completion is worth: scores per prompt as (sum, count), summed up with bootstrap intervals. Pure functions.

In:  the text a model wrote for a held-out prompt, and what the data says it should be (`Gold`).
Out: `score_completion`: per metric (sum, count) of one prompt; `estimate`: the metric over many prompts, with its interval.

A metric is sum over prompts / count over prompts. Which prompts it covers is decided by the data, never by what the model
did, and a model that abstains scores 0: its counts stay, its sums are 0. Without the gold that a metric needs it is absent.

    on all prompts
        call_decision          called a tool exactly where one was needed
    on prompts without a gold call (lower is better)
        over_calls             called a tool
        hallucinated_calls     calls per prompt
    on prompts with gold calls
        missed_calls           called no tool (lower is better)
        json_validity          called, and every call parses as a name and an argument object
        schema_validity        as json_validity, of an offered tool, and valid against its schema
        tool_name              names in common / the larger number of names
        call_count             as many calls as needed
        exact_call             the same calls, names and arguments, in any order
        argument_f1            2 * pairs in common / (pairs written + pairs needed)
        early_calls            the first valid call was complete within EARLY_TOKENS tokens
        first_call_tokens      tokens until it was; infinitely many without one. Its estimate is the median
    on prompts with gold values
        integration_precision  values stated that the gold answer states / values stated
        integration_recall     gold values stated / gold values

Values are compared by type: "3" is not 3 and true is not 1; 3 and 3.0 are one number, as in JSON Schema.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator

from raykd.data.detokenize import TokenText
from raykd.data.extractors import ToolCall, extract_tool_calls, find_integration_spans

Score = dict[str, tuple[float, float]]
"""(sum, count) by metric, of one prompt."""

CALL_MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
"""What begins a call and nothing else: a text with one tried to call, though what follows may not be readable as one."""


EARLY_TOKENS = 25
"""Tokens within which a first call should be complete."""


@dataclass(frozen=True)
class Gold:
    """What the data says about the right answer to a prompt. None: the data does not say."""

    calls: Sequence[Mapping[str, Any]] | None = None  # {"name", "arguments"}; empty: no call is right
    values: Sequence[Any] | None = None  # values of the tool results that the answer should state


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % bootstrap interval, over so many prompts."""

    value: float
    low: float
    high: float
    num_prompts: int


# --- one prompt -----------------------------------------------------------------------------------------------------------


def score_completion(
    text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], gold: Gold
) -> Score:
    """Scores of the metrics above for one completion.

    `messages` is the conversation before it, `tools` what was offered (both in the OpenAI form).

    >>> tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    >>> gold = Gold(calls=[{"name": "add", "arguments": {"a": 1, "b": 2}}])
    >>> score = score_completion('{"name": "add", "arguments": {"a": 1, "b": "2"}}', [], tools, gold)
    >>> score["tool_name"], score["exact_call"], score["argument_f1"]
    ((1.0, 1.0), (0.0, 1.0), (2.0, 4.0))
    """
    schemas = _schemas(tools)
    calls = _calls(text, schemas)
    score: Score = {}
    if gold.calls is not None:
        called = bool(calls) or any(marker in text for marker in CALL_MARKERS)
        score["call_decision"] = (float(called == bool(gold.calls)), 1.0)
        if gold.calls:
            score["missed_calls"] = (float(not called), 1.0)
            score |= _score_calls(calls, gold.calls, schemas)
        else:
            score["over_calls"] = (float(called), 1.0)
            score["hallucinated_calls"] = (float(max(len(calls), called)), 1.0)
    if gold.values:
        score |= _score_integration(_without_calls(text, calls), messages, gold.values)
    return score


def score_first_call(written: TokenText, tools: Sequence[Mapping[str, Any]]) -> Score:
    """How soon a completion to a prompt with gold calls made its first valid call: one that fits an offered tool."""
    schemas = _schemas(tools)
    first = next((call for call in _calls(written.text, schemas) if _is_valid(call, schemas)), None)
    tokens = math.inf
    if first is not None:
        tokens = float(np.argmax(written.offsets[:, 1] >= first.call_span.end) + 1)
    return {"early_calls": (float(tokens <= EARLY_TOKENS), 1.0), "first_call_tokens": (tokens, 1.0)}


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameter schemas of the offered tools by name."""
    functions = (tool.get("function", tool) for tool in tools)
    return {function["name"]: function.get("parameters", {}) for function in functions}


def _calls(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    return extract_tool_calls(text, frozenset(schemas)) if schemas else extract_tool_calls(text)


def _is_valid(call: ToolCall, schemas: Mapping[str, Any]) -> bool:
    parses = call.arguments is not None and _is_json(call)
    return parses and call.name in schemas and _fits(call.arguments, schemas[call.name])


def _score_calls(calls: Sequence[ToolCall], gold: Sequence[Mapping[str, Any]], schemas: Mapping[str, Any]) -> Score:
    parsed = [call for call in calls if call.arguments is not None and _is_json(call)]
    all_parse = bool(calls) and len(parsed) == len(calls)
    valid = bool(calls) and all(_is_valid(call, schemas) for call in calls)
    names, gold_names = Counter(call.name for call in calls), Counter(call["name"] for call in gold)
    written = Counter(_canonical([call.name, call.arguments]) for call in parsed)
    wanted = Counter(_canonical([call["name"], call["arguments"]]) for call in gold)
    return {
        "json_validity": (float(all_parse), 1.0),
        "schema_validity": (float(valid), 1.0),
        "tool_name": ((names & gold_names).total() / max(len(calls), len(gold)), 1.0),
        "call_count": (float(len(calls) == len(gold)), 1.0),
        "exact_call": (float(all_parse and written == wanted), 1.0),
        "argument_f1": _argument_pairs(parsed, gold),
    }


def _is_json(call: ToolCall) -> bool:
    """A call of an unknown tool is valid JSON all the same."""
    return call.error is None or call.error.startswith("unknown tool")


def _fits(arguments: Any, schema: Mapping[str, Any]) -> bool:
    return _validator(json.dumps(schema, sort_keys=True)).is_valid(arguments)


@lru_cache(maxsize=4096)
def _validator(schema_json: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema_json))


def _argument_pairs(calls: Sequence[ToolCall], gold: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(2 * pairs in common, pairs written + pairs needed). Each gold call is compared with the call of its name, not taken
    yet, that has most in common with it."""
    left = [(call.name, _pairs(call.arguments)) for call in calls]
    total, common = sum(pairs.total() for _, pairs in left), 0
    for call in gold:
        wanted = _pairs(call["arguments"])
        total += wanted.total()
        same_name = [entry for entry in left if entry[0] == call["name"]]
        if same_name:
            best = max(same_name, key=lambda entry: (entry[1] & wanted).total())
            common += (best[1] & wanted).total()
            left.remove(best)
    return 2.0 * common, float(total)


def _pairs(arguments: Any) -> Counter[str]:
    return Counter(_canonical([path, value]) for path, value in flatten(arguments))


def flatten(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Leaves of nested JSON with their paths; an empty object or array below the top is a leaf.

    >>> list(flatten({"a": 1, "b": {"c": [True, "x"]}, "d": []}))
    [(('a',), 1), (('b', 'c', 0), True), (('b', 'c', 1), 'x'), (('d',), [])]
    """
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if path and not (isinstance(value, Mapping | list) and value):
        yield path, value
    for key, inner in items:
        yield from flatten(inner, (*path, key))


def _canonical(value: Any) -> str:
    """JSON text that is equal exactly for values that are equal by type; keys in any order."""
    return json.dumps(_with_plain_numbers(value), sort_keys=True, ensure_ascii=False)


def _with_plain_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_plain_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_plain_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# A value that a text can invent: a word with a digit in it, such as 17, 3.5, 2027-01-23, 18:30 or A1145.
_DIGIT_WORD = re.compile(r"[^\W_]*\d(?:[\w.,:/-]*\w)?")


def _score_integration(answer: str, messages: Sequence[Mapping[str, Any]], gold_values: Sequence[Any]) -> Score:
    """Stated are: the values of tool results found in the answer, and words with a digit that nothing before it holds."""
    before = [json.dumps(message, ensure_ascii=False) for message in messages]
    texts = [message["content"] for message in messages if message.get("content")]
    results = [message["content"] for message in messages if message["role"] == "tool" and message.get("content")]
    used = find_integration_spans(answer, results)
    gold_spans = find_integration_spans(answer, [_as_json(list(gold_values))])
    known = find_integration_spans(answer, texts)
    invented = sum(
        not _overlaps(word.span(), known) and not any(word[0] in text for text in before)
        for word in _DIGIT_WORD.finditer(answer)
    )
    right = sum(_overlaps(span, gold_spans) for span in used)
    stated = sum(_is_stated(value, answer) for value in gold_values)
    return {
        "integration_precision": (float(right), float(len(used) + invented)),
        "integration_recall": (float(stated), float(len(gold_values))),
    }


def _overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _is_stated(value: Any, answer: str) -> bool:
    """Found as a reused value, or, where it is too short or common to be taken for one, word for word."""
    if find_integration_spans(answer, [_as_json([value])]):
        return True
    literal = value if isinstance(value, str) else _as_json(value)
    return re.search(rf"(?<!\w){re.escape(literal)}(?!\w)", answer, re.IGNORECASE) is not None


def _without_calls(text: str, calls: Sequence[ToolCall]) -> str:
    for call in reversed(calls):
        text = text[: call.call_span.start] + " " + text[call.call_span.end :]
    return text


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- many prompts ---------------------------------------------------------------------------------------------------------


def resample(num_prompts: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """How often each prompt is in each resample, int64 [S, N]. The same for every model and metric: intervals are paired."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_bootstrap)


def estimate(scores: Sequence[Score], metric: str, weights: np.ndarray) -> Estimate | None:
    """A metric over all prompts that have it, with its interval under the resamples `weights` [S, N]; None without any."""
    covered = sum(metric in score for score in scores)
    if not covered:
        return None
    value, resampled = _ratios(scores, metric, weights)
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high), covered)


def estimate_median(scores: Sequence[Score], metric: str, weights: np.ndarray) -> Estimate | None:
    """As `estimate`, of a metric that may be infinite: the median, of two in the middle the lower one."""
    values = np.array([score[metric][0] for score in scores if metric in score])
    if not len(values):
        return None
    order = np.argsort(values, kind="stable")
    covered = np.flatnonzero([metric in score for score in scores])
    times = np.concatenate([np.ones((1, len(scores)), np.int64), weights])[:, covered[order]].cumsum(axis=1)
    medians = values[order][(2 * times >= times[:, -1:]).argmax(axis=1)][times[:, -1] > 0]
    low, high = np.quantile(medians[1:], (0.025, 0.975), method="inverted_cdf") if len(medians) > 1 else medians[[0, 0]]
    return Estimate(float(medians[0]), float(low), float(high), len(values))


def compare(student: Sequence[Score], teacher: Sequence[Score], metric: str, weights: np.ndarray) -> Estimate | None:
    """Ratio student / teacher of a metric, paired by prompt.

    None where one of them lacks the metric, and where the teacher's value is 0, be it in more than 5 % of the resamples.
    """
    if not any(metric in score for score in student) or not any(metric in score for score in teacher):
        return None
    value, resampled = _ratios(student, metric, weights)
    teacher_value, teacher_resampled = _ratios(teacher, metric, weights)
    if teacher_value == 0 or np.mean(teacher_resampled == 0) > 0.05:
        return None
    ratios = np.divide(resampled, teacher_resampled, out=np.full_like(resampled, np.nan), where=teacher_resampled > 0)
    low, high = np.nanquantile(ratios, (0.025, 0.975))
    return Estimate(value / teacher_value, float(low), float(high), sum(metric in score for score in student))


def _ratios(scores: Sequence[Score], metric: str, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """sum / count over the prompts, and for every resample [S].

    Nothing counted is 0, for the model abstained; a resample without a prompt that has the metric is NaN.
    """
    pairs = np.array([score.get(metric, (0.0, 0.0)) for score in scores], dtype=np.float64)
    assert weights.shape[1] == len(scores), f"{weights.shape[1]} prompts were resampled, {len(scores)} scored"
    totals = np.concatenate([pairs.sum(axis=0, keepdims=True), weights @ pairs])
    ratios = np.divide(totals[:, 0], totals[:, 1], out=np.zeros(len(totals)), where=totals[:, 1] > 0)
    covered = weights @ np.array([metric in score for score in scores], dtype=np.int64)
    return float(ratios[0]), np.where(covered > 0, ratios[1:], np.nan)
