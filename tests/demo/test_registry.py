"""The demo world's tools: valid schemas, deterministic answers."""

import json

import pytest
from jsonschema import Draft202012Validator

from raykd.demo.corpus import generate
from raykd.demo.registry import TOOLS, call_tool, openai_tools

ROWS = list(generate(1500, 7, "train"))
GOLD_CALLS = [(row, call) for row in ROWS for call in row["gold_calls"]]


def _schema(row: dict, name: str) -> dict:
    return next(tool["function"]["parameters"] for tool in row["tools"] if tool["function"]["name"] == name)


def _types(schema: dict) -> set[str]:
    found = {schema["type"]} | ({"enum"} if "enum" in schema else set())
    for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        found |= _types(inner)
    return found


def test_every_schema_is_a_valid_json_schema_of_an_object():
    assert len(TOOLS) >= 10
    for tool in openai_tools():
        Draft202012Validator.check_schema(tool["function"]["parameters"])
        assert tool["type"] == "function"
        assert tool["function"]["parameters"]["type"] == "object"


def test_the_schemas_cover_every_kind_of_argument():
    schemas = [tool.parameters for tool in TOOLS]
    assert set.union(*map(_types, schemas)) == {"object", "string", "integer", "number", "boolean", "array", "enum"}
    assert any("object" in _types(inner) for schema in schemas for inner in schema["properties"].values())
    assert any(len(schema["required"]) < len(schema["properties"]) for schema in schemas)


def test_every_gold_call_validates_against_the_schema_it_was_offered():
    assert len(GOLD_CALLS) > 500
    for row, call in GOLD_CALLS:
        Draft202012Validator(_schema(row, call["name"])).validate(call["arguments"])


def test_gold_calls_use_every_tool_every_property_and_unicode_and_fractions():
    used = {(call["name"], name) for _, call in GOLD_CALLS for name in call["arguments"]}
    assert used == {(tool.name, name) for tool in TOOLS for name in tool.parameters["properties"]}
    texts = json.dumps([call for _, call in GOLD_CALLS], ensure_ascii=False)
    assert not texts.isascii()
    assert any(isinstance(value, float) for _, call in GOLD_CALLS for value in call["arguments"].values())


def test_arguments_come_in_the_order_of_the_schema():
    for row, call in GOLD_CALLS:
        order = list(_schema(row, call["name"])["properties"])
        assert list(call["arguments"]) == [name for name in order if name in call["arguments"]]


def test_a_tool_gives_the_same_answer_every_time_and_another_for_other_arguments():
    answers = {json.dumps(call): call_tool(call["name"], call["arguments"]) for _, call in GOLD_CALLS}
    again = {json.dumps(call): call_tool(call["name"], call["arguments"]) for _, call in GOLD_CALLS}
    assert answers == again
    assert len(set(answers.values())) > len(answers) / 3
    # A fixed point in time: these bytes may not change between machines or versions.
    assert call_tool("get_weather", {"city": "東京"}) == '{"temperature": 20, "condition": "cloudy"}'


def test_some_calls_fail_and_an_unknown_tool_is_an_error_of_the_call():
    failed = ["error" in json.loads(call_tool(call["name"], call["arguments"])) for _, call in GOLD_CALLS]
    assert 0.03 < sum(failed) / len(failed) < 0.3
    assert json.loads(call_tool("fly_to_moon", {})) == {"error": "no tool named fly_to_moon"}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_tool_takes_little_of_the_prompt(tool, demo_tokenizer):
    text = json.dumps(openai_tools([tool.name])[0]["function"])
    assert len(demo_tokenizer(text)["input_ids"]) <= 60
