"""Legal ids: every valid instance is legal token by token, nothing else is, and only whole argument tokens have masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.data.detokenize import decode_tokens
from raykd.data.extractors import extract_tool_calls
from raykd.data.grammar import NO_MASKS, GrammarMasks, ToolGrammars, call_grammar, join_masks, offered_schemas
from raykd.demo.registry import openai_tools
from tests.data.test_examples import FAST, tokenizer_of

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer"},
        "limits": {"type": "array", "items": {"type": "number"}},
        "place": {"type": "object", "properties": {"street": {"type": "string"}, "ok": {"type": "boolean"}}},
    },
    "required": ["city"],
}
TEXT = st.text(st.sampled_from('aé東🙂 "\\{}:,1\n') | st.characters(codec="utf-8", exclude_characters="▁"), max_size=6)
OPTIONAL = {
    "unit": st.sampled_from(["celsius", "fahrenheit"]),
    "days": st.integers(),
    "limits": st.lists(st.integers() | st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), max_size=3),
    "place": st.fixed_dictionaries({}, optional={"street": TEXT, "ok": st.booleans()}),
}
ARGUMENTS = st.fixed_dictionaries({"city": TEXT}, optional=OPTIONAL).flatmap(
    lambda arguments: st.permutations(list(arguments.items())).map(dict)
)
_GRAMMARS = {}


def grammars_of(kind):
    if kind not in _GRAMMARS:
        _GRAMMARS[kind] = ToolGrammars(tokenizer_of(kind))
    return _GRAMMARS[kind]


def legal_ids(kind, text, schema=SCHEMA):
    """The tokens of a text with one call, and the legal ids along its arguments."""
    tokenizer, grammars = tokenizer_of(kind), grammars_of(kind)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    text, offsets = decode_tokens(tokenizer, ids)
    (call,) = extract_tool_calls(text)
    grammar = grammars.compiled(json.dumps(schema))
    assert grammar is not None
    legal, breaks = call_grammar(text, offsets, ids, call, grammar, grammars)
    return ids, offsets, call, legal, breaks


def bits(masks):
    return np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little").astype(bool)


@pytest.mark.parametrize("kind", FAST)
@settings(max_examples=40, deadline=None)
@given(arguments=ARGUMENTS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_every_valid_instance_in_any_order_is_legal_token_by_token(kind, arguments, ascii_only, indent):
    written = json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)
    text = f'Sure.\n<tool_call>\n{{"name": "w", "arguments": {written}}}\n</tool_call>'
    ids, offsets, call, found, breaks = legal_ids(kind, text)
    if tokenizer_of(kind).unk_token_id in ids:
        return
    assert not breaks
    start, end = call.arguments_span
    inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
    assert found.position.tolist() == inside
    legal = bits(found.masks)
    assert legal[np.arange(len(inside)), ids[inside]].all()
    assert (legal.sum(axis=1) < legal.shape[1]).all()


def spelled(kind, row):
    return {str(tokenizer_of(kind).decode([i])) for i in np.flatnonzero(row[: len(tokenizer_of(kind))])}


def test_names_types_and_enums_are_those_of_the_schema():
    ids, offsets, _, found, _ = legal_ids("byte level", 'w[ARGS]{"days": 3, "unit": "celsius", "city": "x y z"}')
    legal = bits(found.masks)
    text = decode_tokens(tokenizer_of("byte level"), ids).text

    def first_characters(written):
        """Of the alternatives to the token in which a word begins, as it would stand there."""
        at = text.index(written)
        (row,) = [i for i, p in enumerate(found.position) if offsets[p, 0] <= at < offsets[p, 1]]
        return {word.lstrip()[0] for word in spelled("byte level", legal[row]) if word.strip()}

    assert first_characters("days") == set("cudlp")
    assert first_characters("3") == set("-0123456789")
    assert first_characters("celsius") == {"c", "f"}
    special = tokenizer_of("byte level").convert_tokens_to_ids("<tool_call>")
    assert not legal[:, special].any()


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ('{"town": "x"}', "t"),  # not declared
        ('{"city": 3}', "3"),  # of another type
        ('{"city": "x", "unit": "kelvin"}', "k"),
        ("{}", "}"),  # a required property is missing
    ],
)
def test_a_token_that_breaks_the_schema_ends_the_masks(arguments, last):
    text = f'<tool_call>\n{{"name": "w", "arguments": {arguments} }}\n</tool_call>'
    ids, offsets, call, found, breaks = legal_ids("byte level", text)
    assert breaks
    text = decode_tokens(tokenizer_of("byte level"), ids).text
    broken = text.index(last, call.arguments_span.start)
    assert len(found.position) > 0 or last in "t}"
    assert all(offsets[p, 0] < broken for p in found.position)
    legal = bits(found.masks)
    assert legal[np.arange(len(found.position)), ids[found.position]].all()


def test_a_token_that_ends_the_arguments_and_more_is_legal_wherever_they_may_end(demo_tokenizer):
    grammars = ToolGrammars(demo_tokenizer)
    text = '<tool_call>\n{"name": "w", "arguments": {"city": "Paris"}}\n</tool_call>'
    ids = np.array(demo_tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    offsets = decode_tokens(demo_tokenizer, ids).offsets
    (call,) = extract_tool_calls(text)
    grammar = grammars.compiled(json.dumps(SCHEMA))
    assert grammar is not None
    found, _ = call_grammar(text, offsets, ids, call, grammar, grammars)
    (closing,) = demo_tokenizer('"}}\n', add_special_tokens=False)["input_ids"]
    assert closing in ids  # a boundary token: it has no mask of its own
    assert offsets[found.position, 1].max() <= call.arguments_span.end
    assert ids[found.position].tolist().count(closing) == 0
    legal = bits(found.masks)
    in_string = [i for i, p in enumerate(found.position) if text[offsets[p, 0]] in "Paris" and offsets[p, 0] > 45]
    assert in_string
    assert legal[in_string, closing].all()


def test_a_schema_that_cannot_be_expressed_has_no_grammar_and_each_is_compiled_once(demo_tokenizer):
    grammars = ToolGrammars(demo_tokenizer)
    assert grammars.compiled('{"type": "nonsense"}') is None
    assert grammars.compiled(json.dumps(SCHEMA)) is grammars.compiled(json.dumps(SCHEMA))


def test_a_tokenizer_without_known_bytes_is_refused():
    with pytest.raises(ValueError, match="loss.json_grammar needs the bytes"):
        ToolGrammars(tokenizer_of("word piece"))


def test_equal_masks_are_kept_once():
    masks = np.array([[1, 2], [3, 4], [1, 2]], dtype=np.int32)
    rows = np.arange(2, dtype=np.int32)
    parts = [GrammarMasks(rows + 4, rows, masks[:2]), NO_MASKS, GrammarMasks(rows[:1] + 9, rows[:1], masks[2:])]
    joined = join_masks(parts)
    assert joined.position.tolist() == [4, 5, 9]
    assert len(joined.masks) == 2
    assert (joined.masks[joined.row] == masks).all()
    assert join_masks([]).masks.shape == (0, 0)


def test_schemas_of_offered_tools_by_name():
    tools = [*openai_tools(["get_weather"]), {"name": "bare", "parameters": {}}]
    schemas = offered_schemas(json.dumps(tools))
    assert json.loads(schemas["get_weather"])["required"] == ["city"]
    assert schemas["bare"] == ""
