"""The tokens of an offline row: those that it brings, or those of its texts, and ids of pieces held against them.

In:  the fields of a row (`offline_fields.py`), the tokenizer. Out: `RowTokens`.

Prompt and response are tokenised as one string; the tokens that touch the response are its tokens. Rows that bring their
tokens are not tokenised. A recorded conversation is tokenised as data.completions=recorded does it for prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from raykd.data.chat import render, render_prompt, tokenize_row
from raykd.data.conversation import RowError, from_json_text, read_conversation
from raykd.data.detokenize import decode_tokens
from raykd.data.extractors import token_mask
from raykd.data.offline_fields import kind, optional_string, read_ids, read_mask, read_text
from raykd.types import Span
from teacher_serving.identity import vocabulary_size


class RowTokens(NamedTuple):
    """The tokens of a row of R output tokens."""

    prompt_ids: np.ndarray  # int32 [P]
    output_ids: np.ndarray  # int32 [R]
    offsets: np.ndarray  # int64 [R, 2] characters of `text`
    text: str  # the response as the row has it
    finish_reason: str
    response_mask: np.ndarray | None  # bool [R]; None: all


def read_tokens(fields: Mapping[str, Any], tokenizer: Any, num_ids: int) -> RowTokens:
    """The row's own tokens where it brings them, else those of its texts. Raises RowError."""
    if "output_ids" in fields:
        return _given_tokens(fields, tokenizer, num_ids)
    return _recorded_tokens(fields, tokenizer) if is_recorded(fields) else _tokenize(fields, tokenizer)


def prompt_text(fields: Mapping[str, Any], tokenizer: Any) -> str:
    """The row's prompt as text, of a recorded conversation all before the first assistant turn. Raises RowError."""
    if "output_ids" in fields:
        prompt_ids = read_ids(fields.get("prompt_ids"), "prompt_ids", vocabulary_size(tokenizer))
        return decode_tokens(tokenizer, prompt_ids).text
    if not is_recorded(fields):
        return _prompt(fields, tokenizer)
    conversation = read_conversation(read_recorded(fields), "recorded")
    text, turns = render(tokenizer, conversation.messages, conversation.tools)
    return text[: turns[0].start]


def is_recorded(fields: Mapping[str, Any]) -> bool:
    """Whether the row is a whole conversation, whose assistant turns are the response; else it ends before the response."""
    is_messages_only = "messages" in fields and not fields.keys() & {"prompt", "teacher_text", "output_ids"}
    return "response_mask" in fields or is_messages_only


def read_recorded(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Messages and tools of a recorded conversation without tokens, as a row of prompts has them. Raises RowError."""
    if "response_mask" in fields:
        raise RowError("`response_mask` without `output_ids`: expected the tokens that it speaks of")
    row = {"messages": fields["messages"], "tools": fields.get("tools")}
    conversation = read_conversation(row, "recorded")
    num_messages = len(from_json_text(fields["messages"], "messages"))
    if len(conversation.messages) < num_messages:
        raise RowError(
            f"row has no `teacher_text`, and the last assistant turn is messages[{len(conversation.messages) - 1}] of "
            f"{num_messages}; expected `teacher_text`, or messages that end with an assistant turn"
        )
    if "rejected_text" in fields:
        raise RowError("`rejected_text` beside a recorded conversation: expected `teacher_text`, which it is held against")
    return row


def compare_pieces(fields: Mapping[str, Any], tokens: RowTokens, tokenizer: Any, num_ids: int) -> None:
    """Fields that hold ids of pieces tokenised on their own: they must be whole, and spell text of the response.

    What is supervised is found in the text, for a piece has other tokens on its own than within it.
    """
    for name, mask in (("tool_name_ids", "tool_name_mask"), ("gold_json_text_ids", "mask_valid_json_tokens")):
        if name not in fields:
            if mask in fields:
                raise RowError(f"`{mask}` without `{name}`")
            continue
        ids = read_ids(fields[name], name, num_ids)
        if mask in fields:
            ids = ids[read_mask(fields[mask], mask, len(ids))]
        piece = tokenizer.decode(ids.tolist()).strip(' "\n')
        letters = iter(tokens.text)
        if not all(letter in letters for letter in piece if not letter.isspace()):  # several pieces may stand end to end
            raise RowError(f"`{name}` spells {piece[:40]!r}, which is not in the response: ids of another tokenizer or row")
    if "tool_result_fields" in fields:
        read_ids(fields["tool_result_fields"], "tool_result_fields", num_ids)


def _given_tokens(fields: Mapping[str, Any], tokenizer: Any, num_ids: int) -> RowTokens:
    prompt_ids = read_ids(fields.get("prompt_ids"), "prompt_ids", num_ids)
    output_ids = read_ids(fields["output_ids"], "output_ids", num_ids)
    text, offsets = decode_tokens(tokenizer, output_ids)
    given = fields.get("teacher_text", text)
    if given != text:
        raise RowError(
            f"`output_ids` spell {text[:40]!r}, `teacher_text` is {kind(given)}: other text, or ids of another tokenizer"
        )
    mask = fields.get("response_mask")
    return RowTokens(
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        offsets=offsets,
        text=text,
        finish_reason=optional_string(fields, "finish_reason"),
        response_mask=None if mask is None else read_mask(mask, "response_mask", len(output_ids)),
    )


def _tokenize(fields: Mapping[str, Any], tokenizer: Any) -> RowTokens:
    response, prompt = read_text(fields.get("teacher_text"), "teacher_text"), _prompt(fields, tokenizer)
    finish_reason = optional_string(fields, "finish_reason") or "stop"
    end = tokenizer.eos_token or ""
    text = prompt + response
    if finish_reason != "length" and not response.endswith(end):
        text += end
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    is_response = token_mask(offsets, [Span(len(prompt), len(text))])
    first = int(np.argmax(is_response)) if is_response.any() else len(ids)
    return RowTokens(
        prompt_ids=ids[:first],
        output_ids=ids[first:],
        offsets=np.maximum(offsets[first:] - len(prompt), 0),
        text=response,
        finish_reason=finish_reason,
        response_mask=None,
    )


def _prompt(fields: Mapping[str, Any], tokenizer: Any) -> str:
    if "prompt" in fields:
        return read_text(fields["prompt"], "prompt")
    conversation = read_conversation({"messages": fields.get("messages"), "tools": fields.get("tools")}, "teacher")
    return render_prompt(tokenizer, conversation.messages, conversation.tools)


def _recorded_tokens(fields: Mapping[str, Any], tokenizer: Any) -> RowTokens:
    row = read_recorded(fields)
    prompt = tokenize_row(tokenizer, row, uid=0, key="", completions="recorded", max_tokens=sys.maxsize).prompt
    assert prompt.recorded_ids is not None, "a recorded conversation without a recorded part"
    text, offsets = decode_tokens(tokenizer, prompt.recorded_ids)
    finish_reason = optional_string(fields, "finish_reason") or "given"
    return RowTokens(prompt.prompt_ids, prompt.recorded_ids, offsets, text, finish_reason, prompt.response_mask)
