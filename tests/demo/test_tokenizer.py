"""The demo world's tokenizer and chat template."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykd.demo.corpus import generate, generate_conversations
from raykd.demo.tokenizer import MARKER_TOKENS, SPECIAL_TOKENS, train_tokenizer

# Anything UTF-8 can hold: all characters but lone surrogates.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT | st.lists(st.sampled_from(['": {"type": "string"', " a", "é", "7", *MARKER_TOKENS])).map("".join))
def test_any_text_comes_back_unchanged(demo_tokenizer, text):
    ids = demo_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert demo_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_name_or_number_has_the_same_tokens_wherever_it_stands(demo_tokenizer):
    def pieces(text: str) -> list[str]:
        return demo_tokenizer.convert_ids_to_tokens(demo_tokenizer(text)["input_ids"])

    for value in ("Zürich", "São Paulo", "東京", "42", "19:30", "LX318"):
        inside = pieces(value)
        for text in (f"to {value} now", f'{{"x": "{value}"}}', f"{value}.", f"say {value}, please"):
            tokens = pieces(text)
            assert any(tokens[i : i + len(inside)] == inside for i in range(len(tokens))), (value, tokens)
    assert len(pieces("2027")) == 4


def test_the_vocabulary_is_round_and_holds_the_added_tokens_as_single_tokens(demo_tokenizer):
    assert len(demo_tokenizer) % 64 == 0
    for token in SPECIAL_TOKENS + MARKER_TOKENS:
        assert len(demo_tokenizer(token)["input_ids"]) == 1
    assert demo_tokenizer.eos_token == "<|im_end|>"
    assert demo_tokenizer.pad_token == "<|endoftext|>"
    call = demo_tokenizer("<tool_call>x</tool_call><|im_end|>")["input_ids"]
    assert demo_tokenizer.decode(call, skip_special_tokens=True) == "<tool_call>x</tool_call>"


def test_the_assistant_mask_covers_exactly_the_assistant_turns_with_their_end(demo_tokenizer):
    for row in generate_conversations(60, 11, "train"):
        encoded = demo_tokenizer.apply_chat_template(
            row["messages"], tools=row["tools"], return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
        turns = []
        for message in row["messages"]:
            if message["role"] == "assistant":
                calls = [call["function"] for call in message.get("tool_calls", [])]
                texts = [
                    f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {call["arguments"]}}}\n</tool_call>'
                    for call in calls
                ]
                turns.append((message["content"] or "") + "\n".join(texts) + "<|im_end|>")
        assert demo_tokenizer.decode(marked) == "".join(turns)


def test_a_prompt_is_the_beginning_of_its_whole_conversation(demo_tokenizer):
    for row in generate_conversations(20, 12, "train"):
        whole = demo_tokenizer.apply_chat_template(row["messages"], tools=row["tools"], return_dict=False)
        prompt = demo_tokenizer.apply_chat_template(
            row["messages"][:-1], tools=row["tools"], add_generation_prompt=True, return_dict=False
        )
        assert whole[: len(prompt)] == prompt


def test_arguments_may_be_an_object_or_a_json_string_and_tools_bare_or_wrapped(demo_tokenizer):
    row = next(row for row in generate_conversations(50, 13, "train") if len(row["messages"]) > 3)
    as_objects = json.loads(json.dumps(row))
    for message in as_objects["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        if message["role"] == "assistant" and message["content"] is None:
            del message["content"]
    as_objects["tools"] = [tool["function"] for tool in row["tools"]]
    texts = {demo_tokenizer.apply_chat_template(r["messages"], tools=r["tools"], tokenize=False) for r in (row, as_objects)}
    assert len(texts) == 1


def test_a_system_message_stands_before_the_tools_and_also_without_them(demo_tokenizer):
    row = next(generate(1, 14, "train"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with_tools = demo_tokenizer.apply_chat_template(messages, tools=row["tools"], tokenize=False)
    assert with_tools.startswith("<|im_start|>system\nBe brief.\n<tools>\n{")
    alone = demo_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert alone == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_are_short(demo_tokenizer):
    rows = generate(200, 15, "held_out")
    lengths = [
        len(
            demo_tokenizer.apply_chat_template(
                r["messages"], tools=r["tools"], add_generation_prompt=True, return_dict=False
            )
        )
        for r in rows
    ]
    assert sum(lengths) / len(lengths) <= 250
    assert max(lengths) <= 400


def test_learning_the_same_rows_gives_the_same_tokenizer_and_too_few_are_refused():
    rows = list(generate_conversations(200, 0, "train"))
    first, second = (train_tokenizer(rows, 640) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    with pytest.raises(ValueError, match="expected 9999: use a smaller vocab_size"):
        train_tokenizer(rows[:10], 9999)
