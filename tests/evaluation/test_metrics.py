import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykd.data.detokenize import TokenText
from raykd.evaluation.metrics import (
    Estimate,
    Gold,
    compare,
    estimate,
    estimate_median,
    flatten,
    resample,
    score_completion,
    score_first_call,
)


def tool(name: str, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
TOOLS = [tool("add", a=INTEGER, b=INTEGER), tool("find", city=STRING)]
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
FIND = {"name": "find", "arguments": {"city": "Zürich"}}


def written(*calls: dict) -> str:
    return "".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>\n" for call in calls)


def values(text: str, *gold: dict) -> dict[str, float]:
    score = score_completion(text, [], TOOLS, Gold(calls=gold))
    return {name: total / count for name, (total, count) in score.items()}


PERFECT = {
    "call_decision": 1.0,
    "missed_calls": 0.0,
    "json_validity": 1.0,
    "schema_validity": 1.0,
    "tool_name": 1.0,
    "call_count": 1.0,
    "exact_call": 1.0,
    "argument_f1": 1.0,
}


def test_the_gold_calls_score_full_marks_in_any_order_of_calls_and_keys():
    swapped = {"name": "add", "arguments": {"b": 2, "a": 1}}
    assert values(written(ADD, FIND), FIND, swapped) == PERFECT


@pytest.mark.parametrize("text", ["", "I do not know.", "<|im_end|>"])
def test_a_model_that_abstains_scores_0_where_a_call_is_needed(text):
    assert values(text, ADD) == dict.fromkeys(PERFECT, 0.0) | {"missed_calls": 1.0}


def test_a_call_where_none_is_needed_is_an_over_call_and_each_counts_as_hallucinated():
    assert values(written(ADD, FIND)) == {"call_decision": 0.0, "over_calls": 1.0, "hallucinated_calls": 2.0}
    assert values("Hello.") == {"call_decision": 1.0, "over_calls": 0.0, "hallucinated_calls": 0.0}


def test_arguments_are_compared_by_type():
    text_number = {"name": "add", "arguments": {"a": "1", "b": 2}}
    boolean = {"name": "add", "arguments": {"a": True, "b": 2}}
    assert values(written(text_number), ADD)["exact_call"] == values(written(boolean), ADD)["exact_call"] == 0.0
    assert values(written(text_number), ADD)["argument_f1"] == values(written(boolean), ADD)["argument_f1"] == 0.5
    assert values(written({"name": "add", "arguments": {"a": 1.0, "b": 2}}), ADD)["exact_call"] == 1.0


def test_a_wrong_value_costs_the_exact_match_and_one_pair_of_two():
    assert values(written({"name": "add", "arguments": {"a": 1, "b": 3}}), ADD) == PERFECT | {
        "exact_call": 0.0,
        "argument_f1": 0.5,  # 2 * 1 / (2 + 2)
    }


def test_a_missing_and_an_extra_call_cost_count_names_and_pairs():
    missing = values(written(ADD), ADD, FIND)
    assert (missing["call_count"], missing["tool_name"], missing["exact_call"]) == (0.0, 0.5, 0.0)
    assert missing["argument_f1"] == 2 * 2 / (2 + 3)
    extra = values(written(ADD, FIND), ADD)
    assert (extra["call_count"], extra["tool_name"], extra["exact_call"]) == (0.0, 0.5, 0.0)
    assert extra["argument_f1"] == 2 * 2 / (3 + 2)
    assert values(written(ADD, ADD), ADD)["exact_call"] == 0.0


def test_two_calls_of_one_tool_with_swapped_arguments_do_not_count_as_the_same_pairs():
    gold = [{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "add", "arguments": {"a": 3, "b": 4}}]
    swapped = [{"name": "add", "arguments": {"a": 1, "b": 4}}, {"name": "add", "arguments": {"a": 3, "b": 2}}]
    assert values(written(*swapped), *gold)["argument_f1"] == 0.5


def test_a_written_call_is_compared_with_one_needed_call_only():
    gold = [ADD, {"name": "add", "arguments": {"a": 1, "b": 5}}]
    assert values(written(ADD), *gold)["argument_f1"] == 2 * 2 / (2 + 4)


def test_a_broken_call_beside_the_right_ones_spoils_the_exact_match():
    score = values(written(ADD) + '<tool_call>\n{"name": "add", "argu', ADD)
    assert (score["exact_call"], score["json_validity"]) == (0.0, 0.0)


def test_a_truncated_call_is_no_valid_json_but_keeps_its_name():
    score = values('<tool_call>\n{"name": "add", "arguments": {"a": 1', ADD)
    assert (score["json_validity"], score["schema_validity"], score["exact_call"]) == (0.0, 0.0, 0.0)
    assert (score["call_decision"], score["tool_name"]) == (1.0, 1.0)


def test_an_unreadable_call_behind_its_marker_is_a_call_that_was_tried():
    garbage = '<tool_call>\n{"name": "": "": "'
    assert values(garbage) == {"call_decision": 0.0, "over_calls": 1.0, "hallucinated_calls": 1.0}
    score = values(garbage, ADD)
    assert (score["call_decision"], score["missed_calls"], score["json_validity"]) == (1.0, 0.0, 0.0)


def test_a_call_against_the_schema_or_of_a_tool_not_offered_is_valid_json_only():
    for wrong in ({"name": "add", "arguments": {"a": "1", "b": 2}}, {"name": "drop", "arguments": {}}):
        score = values(written(wrong), ADD)
        assert (score["json_validity"], score["schema_validity"]) == (1.0, 0.0)


def test_without_gold_a_metric_is_absent_and_no_number():
    assert score_completion(written(ADD), [], TOOLS, Gold()) == {}
    assert "integration_recall" not in score_completion("5", [], TOOLS, Gold(calls=[], values=[]))


RESULT = [
    {"role": "user", "content": "Two seats for 19:30, please."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "book", "arguments": {"guests": 2}}}]},
    {"role": "tool", "content": json.dumps({"booking": "A1145", "price": 1234.5, "hall": "Blue Room"})},
]


def integration(text: str, gold: list) -> tuple[tuple[float, float], tuple[float, float]]:
    score = score_completion(text, RESULT, TOOLS, Gold(calls=[], values=gold))
    return score["integration_precision"], score["integration_recall"]


def test_integration_counts_gold_values_stated_and_values_stated():
    assert integration("Booking A1145 costs 1,234.50.", ["A1145", 1234.5]) == ((2, 2), (2, 2))
    assert integration("Booking A1145 is done.", ["A1145", 1234.5]) == ((1, 1), (1, 2))
    assert integration("Booking A1145 in the Blue Room.", ["A1145"]) == ((1, 2), (1, 1))


def test_a_value_that_nothing_before_the_answer_holds_costs_precision():
    assert integration("Booking A1145 costs 99.", ["A1145"]) == ((1, 2), (1, 1))
    assert integration("Booking A1145 for 2 at 7:30 pm.", ["A1145"]) == ((1, 1), (1, 1))


def test_an_answer_without_values_and_a_call_instead_of_an_answer_are_misses():
    assert integration("Done.", ["A1145"]) == ((0, 0), (0, 1))
    assert integration(written({"name": "find", "arguments": {"city": "A1145"}}), ["A1145"])[1] == (0, 1)


def test_a_value_too_short_to_be_found_as_reused_is_looked_for_word_for_word():
    assert integration("It is true.", [True])[1] == (1, 1)
    assert integration("It is untrue.", [True])[1] == (0, 1)


def test_precision_of_a_model_that_states_nothing_is_0_not_undefined():
    scores = [score_completion("", RESULT, TOOLS, Gold(calls=[], values=["A1145"]))] * 3
    assert estimate(scores, "integration_precision", resample(3, 20, seed=0)) == Estimate(0.0, 0.0, 0.0, 3)


def first_call(text: str, characters_per_token: int = 4) -> tuple[float, float]:
    """(early_calls, first_call_tokens) of a text whose tokens are so many characters each."""
    starts = np.arange(0, len(text), characters_per_token)
    offsets = np.stack([starts, np.minimum(starts + characters_per_token, len(text))], axis=1)
    score = score_first_call(TokenText(text, offsets), TOOLS)
    assert {count for _, count in score.values()} == {1.0}
    return score["early_calls"][0], score["first_call_tokens"][0]


def test_the_first_valid_call_counts_when_its_last_brace_is_written():
    text = json.dumps(ADD)
    assert len(text) == 46
    assert first_call(text) == (1.0, 12.0)
    assert first_call(text + "x" * 400) == (1.0, 12.0)
    assert first_call("y" * 200 + text) == (0.0, 62.0)
    invalid = written({"name": "add", "arguments": {"a": "1", "b": 2}}, {"name": "other", "arguments": {}})
    assert first_call(invalid + written(ADD))[1] > len(invalid) / 4


@pytest.mark.parametrize(
    "text", ["", "No.", '{"name": "add", "arguments": {"a": 1', written({"name": "add", "arguments": {}})]
)
def test_a_text_without_a_valid_call_took_infinitely_long(text):
    assert first_call(text) == (0.0, np.inf)


def test_the_median_counts_those_that_never_came_and_its_interval_may_be_infinite():
    scores = [{"first_call_tokens": (tokens, 1.0)} for tokens in (10.0, 20.0, 30.0, np.inf)] + [{}]
    weights = np.array([[1, 1, 1, 1, 1], [4, 0, 0, 0, 1], [0, 0, 0, 2, 3], [0, 0, 0, 0, 5]])
    assert estimate_median(scores, "first_call_tokens", weights) == Estimate(20.0, 10.0, np.inf, 4)
    assert estimate_median(scores[3:], "first_call_tokens", resample(2, 10, seed=0)) == Estimate(np.inf, np.inf, np.inf, 1)
    assert estimate_median([{}, {}], "first_call_tokens", resample(2, 10, seed=0)) is None


def scores_of(*outcomes: float) -> list[dict]:
    return [{"exact_call": (outcome, 1.0)} for outcome in outcomes]


def test_the_estimate_is_the_share_and_its_interval_that_of_a_binomial():
    scores = scores_of(*[1.0] * 80, *[0.0] * 20)
    result = estimate(scores, "exact_call", resample(100, 4000, seed=0))
    assert result is not None
    assert result.value == 0.8
    assert result.low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.011)
    assert result.high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.011)


def test_prompts_without_the_metric_are_not_counted():
    scores = [*scores_of(1.0, 0.0), {}, {"over_calls": (1.0, 1.0)}]
    result = estimate(scores, "exact_call", resample(4, 10, seed=0))
    assert result is not None
    assert (result.value, result.num_prompts) == (0.5, 2)
    assert estimate(scores, "tool_name", resample(4, 10, seed=0)) is None


def test_the_bootstrap_depends_on_the_seed_alone():
    scores = scores_of(1.0, 0.0, 1.0, 1.0)
    first = estimate(scores, "exact_call", resample(4, 50, seed=3))
    assert first == estimate(scores, "exact_call", resample(4, 50, seed=3))
    assert not np.array_equal(resample(4, 50, seed=3), resample(4, 50, seed=4))


def test_the_ratio_is_paired_so_equal_models_have_no_spread():
    scores = scores_of(1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0)
    weights = resample(8, 200, seed=0)
    assert compare(scores, scores, "exact_call", weights) == Estimate(1.0, 1.0, 1.0, 8)
    half = compare(scores_of(1, 0, 0, 1, 0, 0, 0, 1), scores, "exact_call", weights)
    assert half is not None
    assert half.value == 0.5
    assert half.low < 0.5 < half.high


def test_there_is_no_ratio_to_a_teacher_that_scores_0():
    assert compare(scores_of(1.0, 1.0), scores_of(0.0, 0.0), "exact_call", resample(2, 10, seed=0)) is None
    assert compare([{}], scores_of(1.0), "exact_call", resample(1, 10, seed=0)) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=3))
def test_any_arguments_match_themselves(arguments):
    call = {"name": "f", "arguments": arguments}
    score = score_completion(written(call), [], [], Gold(calls=[call]))
    assert score["exact_call"] == (1.0, 1.0)
    pairs = len(list(flatten(arguments)))
    assert score["argument_f1"] == (2 * pairs, 2 * pairs)


@given(st.text())
def test_any_text_can_be_scored(text):
    score = score_completion(text, RESULT, TOOLS, Gold(calls=[ADD], values=["A1145", 1234.5]))
    assert all(0 <= total <= max(count, total) for total, count in score.values())
