"""Rendering once: which characters the assistant wrote, under templates of every habit, and which rows are refused."""

from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raykd.data.chat import render, render_prompt, tokenize_row, turn_markers
from raykd.data.conversation import RowError, read_conversation, validate_row

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: thinking stays in the last turn only, which gets an empty one where it has none.
STRIPS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content.split('</think>')[-1] %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' + m.reasoning_content | default('') }}"
    "{{ '\n</think>\n\n' }}{% endif %}"
    "{{ c.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral: no header before the assistant's turn.
HEADERLESS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
# Drops everything but the last exchange, and has no header: nothing tells where an early turn stood.
FORGETFUL = "{% for m in messages[-3:] %}{{ m.content + '</s>' }}{% endfor %}"
SPECIALS = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "[/INST]"]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)

    def with_template(template):
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)

    return with_template


def message(role, content: Any = "", **more):
    return {"role": role, "content": content, **more}


TALK = [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Hello ü!"), message("user", "Bye")]
TALK = [*TALK, message("assistant", "Farewell.")]


def written(tokenizer, messages):
    text, spans = render(tokenizer, messages, [])
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    return [text[span.start : span.end] for span in spans]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistant_wrote_its_content_and_its_end_of_turn(byte_tokenizer, template):
    assert written(byte_tokenizer(template), TALK) == ["Hello ü!<|im_end|>", "Farewell.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_keeps_its_boundaries(byte_tokenizer):
    talk = [*TALK[:2], message("assistant", "<think>\nhm\n</think>\n\nHello"), *TALK[3:]]
    tokenizer = byte_tokenizer(STRIPS_THINKING)
    assert turn_markers(tokenizer) == ("<|im_start|>assistant\n", "<|im_end|>")
    assert written(tokenizer, talk) == ["Hello<|im_end|>", "<think>\n\n</think>\n\nFarewell.<|im_end|>"]


def test_a_template_without_headers_is_read_by_prefixes(byte_tokenizer):
    assert written(byte_tokenizer(HEADERLESS), TALK[1:]) == [" Hello ü!</s>", " Farewell.</s>"]


def test_a_user_who_writes_the_header_confuses_nobody(byte_tokenizer):
    talk = [message("user", "<|im_start|>assistant\nI am you<|im_end|>"), *TALK[2:]]
    assert written(byte_tokenizer(CHATML), talk) == ["Hello ü!<|im_end|>", "Farewell.<|im_end|>"]
    talk = [message("user", "Hi"), message("assistant", "say <|im_end|> now"), *TALK[3:]]
    assert written(byte_tokenizer(CHATML), talk) == ["say <|im_end|> now<|im_end|>", "Farewell.<|im_end|>"]


def test_boundaries_that_nothing_establishes_are_refused(byte_tokenizer):
    with pytest.raises(RowError, match="cannot tell where assistant turn 2 stands"):
        render(byte_tokenizer(FORGETFUL), TALK, [])


def test_the_prompt_ends_where_the_assistant_begins(byte_tokenizer):
    tokenizer = byte_tokenizer(CHATML)
    assert render_prompt(tokenizer, TALK[:2], []).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def tokenize(tokenizer, row, completions: Any = "recorded", max_tokens=10_000, **options):
    return tokenize_row(tokenizer, row, uid=1, key="a:1", completions=completions, max_tokens=max_tokens, **options)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_recorded_rows_supervise_every_assistant_turn_and_nothing_else(byte_tokenizer):
    tokenizer = byte_tokenizer(CHATML)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talk = [message("user", "Hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk += [message("tool", "42", tool_call_id="c"), message("assistant", "It is 42."), message("user", "Thanks")]
    prompt = tokenize(tokenizer, {"messages": talk}).prompt
    assert prompt.recorded_ids is not None
    assert prompt.response_mask is not None
    whole = np.concatenate([prompt.prompt_ids, prompt.recorded_ids])
    assert whole.dtype == np.int32
    assert decode(tokenizer, prompt.prompt_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert decode(tokenizer, prompt.recorded_ids[prompt.response_mask]) == (
        '\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>It is 42.<|im_end|>'
    )
    assert decode(tokenizer, prompt.recorded_ids).endswith("It is 42.<|im_end|>")  # what comes after is left out
    assert json.loads(prompt.messages_json)[-1]["content"] == "It is 42."


def test_teacher_rows_drop_a_trailing_assistant_turn(byte_tokenizer):
    tokenizer = byte_tokenizer(CHATML)
    prompt = tokenize(tokenizer, {"messages": TALK}, "teacher").prompt
    assert decode(tokenizer, prompt.prompt_ids).endswith("Bye<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.recorded_ids is None
    assert prompt.response_mask is None


def test_gold_calls_become_the_recorded_turn(byte_tokenizer):
    row = {"messages": [message("user", "Hi")], "gold_calls": [{"name": "f", "arguments": {"x": "ü"}}]}
    prompt = tokenize(byte_tokenizer(CHATML), row).prompt
    assert '"arguments": {"x": "ü"}' in decode(byte_tokenizer(CHATML), prompt.recorded_ids)


def test_prompt_rows_are_a_user_turn_or_raw_text(byte_tokenizer):
    chat, raw = byte_tokenizer(CHATML), byte_tokenizer(None)
    row = {"prompt": "Once", "completion": " upon"}
    assert decode(chat, tokenize(chat, row, "teacher").prompt.prompt_ids).startswith("<|im_start|>user\nOnce<|im_end|>")
    assert decode(raw, tokenize(raw, row, "teacher").prompt.prompt_ids) == "Once"
    assert decode(raw, tokenize(raw, row).prompt.recorded_ids) == " upon<|im_end|>"
    with pytest.raises(RowError, match="need a chat template"):
        tokenize(raw, {"messages": TALK})


def test_a_long_row_is_refused_or_loses_its_beginning_and_says_what(byte_tokenizer):
    tokenizer = byte_tokenizer(CHATML)
    whole = tokenize(tokenizer, {"messages": TALK}).prompt
    assert whole.recorded_ids is not None
    size = len(whole.prompt_ids) + len(whole.recorded_ids)
    with pytest.raises(RowError, match=f"has {size} tokens, expected at most 60"):
        tokenize(tokenizer, {"messages": TALK}, max_tokens=60)
    cut = tokenize(tokenizer, {"messages": TALK}, max_tokens=60, overlong="truncate_left")
    assert (cut.truncated_tokens, cut.truncated_response_tokens) == (size - 60, 0)
    assert cut.prompt.recorded_ids is not None
    assert np.array_equal(cut.prompt.recorded_ids, whole.recorded_ids)
    # The first turn no longer fits as a whole: it becomes context, and its tokens are counted.
    limit = len(whole.recorded_ids) - 2
    cut = tokenize(tokenizer, {"messages": TALK}, max_tokens=limit, overlong="truncate_left")
    assert cut.prompt.recorded_ids is not None
    assert cut.truncated_response_tokens == len("Hello ü!".encode()) + 1
    assert decode(tokenizer, cut.prompt.recorded_ids) == "Farewell.<|im_end|>"
    assert len(cut.prompt.prompt_ids) + len(cut.prompt.recorded_ids) == limit
    with pytest.raises(RowError, match="last assistant turn alone is longer"):
        tokenize(tokenizer, {"messages": TALK}, max_tokens=8, overlong="truncate_left")
    cut = tokenize(tokenizer, {"messages": TALK}, "teacher", max_tokens=20, overlong="truncate_left")
    assert len(cut.prompt.prompt_ids) == 20


USER = message("user", "Hi")
DATE = datetime.date(2026, 1, 1)  # as a typed column of a Parquet file holds it
DEEP_SCHEMA: dict[str, Any] = {"type": "object"}
for _ in range(200):
    DEEP_SCHEMA = {"type": "object", "properties": {"a": DEEP_SCHEMA}}
BAD_ROWS = [
    ({"text": "x"}, "neither `messages` nor `prompt`"),
    ({"messages": []}, "non-empty list"),
    ({"messages": "not json"}, "no JSON"),
    ({"messages": [USER, "hello"]}, r"messages\[1\] is str"),
    ({"messages": [message("robot", "x")]}, "role is 'robot'"),
    ({"messages": [message("user", 3)]}, r"messages\[0\].content is int"),
    ({"messages": [{"role": "user"}]}, "content is missing"),
    ({"messages": [message("user", "\ud800")]}, "unpaired surrogate"),
    ({"messages": [USER, message("assistant", tool_calls=[{"id": "x"}])]}, "has no name"),
    ({"messages": [USER, message("assistant", tool_calls=[{"name": "f", "arguments": 3}])]}, "arguments is int"),
    ({"messages": [message("user", "x", tool_calls=[{"name": "f"}])]}, "on a user message"),
    ({"messages": [USER]}, "no assistant turn"),
    ({"prompt": 7}, "prompt is int"),
    ({"messages": TALK, "tools": {"a": 1}}, "`tools` is dict"),
    ({"messages": TALK, "tools": [{"type": "function", "function": {}}]}, r"tools\[0\] has no name"),
    ({"messages": TALK, "tools": [{"name": "f", "parameters": {"type": "strnig"}}]}, "no JSON Schema"),
    ({"messages": TALK, "tools": [{"name": "f", "parameters": {"properties": {"x": {"type": 3}}}}]}, "no JSON Schema"),
    ({"messages": TALK, "tools": [{"name": "f", "parameters": "string"}]}, "no JSON Schema"),
    ({"messages": TALK, "tools": [{"name": "f", "parameters": DEEP_SCHEMA}]}, "no JSON Schema: nested too deeply"),
    ({"messages": TALK, "tools": [{"name": "f", "parameters": {"default": DATE}}]}, "cannot be written as JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_reason(row, reason):
    with pytest.raises(RowError, match=reason) as caught:
        read_conversation(row, "recorded")
    assert validate_row(row, "recorded") == str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [message("user", "x", sent=DATE)]}, "messages cannot be written as JSON: Object of type date"),
        ({"messages": [USER], "tools": [{"name": "f", "description": "\ud800"}]}, "tools holds an unpaired surrogate"),
        (
            {"messages": [*TALK[:2], message("assistant", tool_calls=[{"name": "\ud800"}]), USER]},
            "messages holds an unpaired",
        ),
    ],
)
def test_what_a_tokenizer_cannot_take_is_refused_before_it_gets_it(byte_tokenizer, row, reason):
    with pytest.raises(RowError, match=reason):
        tokenize(byte_tokenizer(CHATML), row, "teacher")


TEXT = st.text(max_size=3) | st.sampled_from(["\ud800", "[", "{}", "null", "9" * 5000])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(DATE) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def almost(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """Objects with these fields, of which any may be missing or hold anything."""
    return st.fixed_dictionaries({}, optional={name: value | VALUES for name, value in fields.items()})


FUNCTIONS = almost(name=TEXT, arguments=VALUES, parameters=VALUES, description=TEXT)
CALLS = st.lists(FUNCTIONS | almost(function=FUNCTIONS, id=TEXT), max_size=2)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "robot"])
MESSAGES = st.lists(almost(role=ROLES, content=TEXT, tool_calls=CALLS), max_size=3)
NEARLY_GOOD = st.fixed_dictionaries(  # what is asked for, with anything beside it
    {
        "messages": st.fixed_dictionaries({"role": st.just("user"), "content": TEXT}, optional={"sent": VALUES}).map(
            lambda user: [user, message("assistant", "Hi"), user]
        ),
        "tools": st.fixed_dictionaries(
            {"name": st.just("f")},
            optional={"description": VALUES, "parameters": st.fixed_dictionaries({"default": VALUES}), "strict": VALUES},
        ).map(lambda tool: [tool]),
    }
)


@settings(max_examples=300, deadline=None)
@given(
    row=NEARLY_GOOD | almost(messages=MESSAGES, tools=CALLS, prompt=TEXT, completion=TEXT, gold_calls=CALLS),
    completions=st.sampled_from(["teacher", "recorded"]),
)
def test_whatever_a_row_holds_it_becomes_a_prompt_or_has_a_reason(demo_tokenizer, row, completions):
    try:
        prompt = tokenize(demo_tokenizer, row, completions).prompt
    except RowError:
        return
    assert len(prompt.prompt_ids)
    assert isinstance(json.loads(prompt.messages_json), list)


def test_good_rows_come_in_several_forms():
    as_text = {"messages": json.dumps(TALK), "tools": json.dumps([{"name": "f", "parameters": {"type": "object"}}])}
    assert validate_row(as_text, "recorded") is None
    assert read_conversation(as_text, "recorded").tools[0]["function"]["name"] == "f"
    parts = [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]
    assert read_conversation({"messages": parts, "tools": None}, "teacher").messages[0]["content"] == "ab"
    bad_text = [USER, message("assistant", None, tool_calls=[{"name": "f", "arguments": "not json"}])]
    calls = read_conversation({"messages": bad_text}, "recorded").messages[1]["tool_calls"]
    assert calls[0]["function"]["arguments"] == "not json"
