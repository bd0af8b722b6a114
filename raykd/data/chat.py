"""A row of the user's data to token ids: checked, rendered once, tokenised once.

In:  a row with `messages` (and `tools`), or `prompt` (and `completion`), and the student's and teacher's tokenizer.
Out: a `Prompt`; `render` also says which characters of the conversation the assistant wrote.

The assistant wrote its turns' text, calls and end-of-turn token. The header that names its role, the line break after the
end-of-turn token, tool results, user and system text it did not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError

from raykd.data.answer_generation import answer_turns, as_messages, up_to_last_answer
from raykd.data.conversation import Conversation, RowError, json_text, read_conversation
from raykd.data.extractors import token_mask
from raykd.data.refinement import read_refinements, row_tier
from raykd.types import Prompt, Span

Completions = Literal["teacher", "recorded"]
Overlong = Literal["reject", "truncate_left"]


TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What a chat template, code that comes with a model, may raise about a conversation that it was not written for."""


class Rendered(NamedTuple):
    """A whole conversation as the one string that is tokenised."""

    text: str
    assistant_spans: list[Span]  # characters that the assistant wrote, one span per turn


class TokenizedRow(NamedTuple):
    """A prompt, and what the context length cut off it (0 unless `overlong` is truncate_left)."""

    prompt: Prompt
    truncated_tokens: int
    truncated_response_tokens: int  # of those, tokens that would have been supervised


def tokenize_row(
    tokenizer: Any,
    row: Mapping[str, Any],
    *,
    uid: int,
    key: str,
    completions: Completions,
    max_tokens: int,
    overlong: Overlong = "reject",
    held_out: bool = False,
    answers_only: bool = False,
) -> TokenizedRow:
    """One row of the user's data as a `Prompt`.

    teacher: everything up to the last message that is not the assistant's; a trailing assistant turn is dropped, for the
    teacher writes its own. recorded: everything up to the end of the last assistant turn, every assistant turn supervised;
    a row without one takes its `gold_calls` as the turn.

    `max_tokens` bounds the prompt (teacher) or prompt and recorded part together (recorded). Longer rows are refused, or
    lose their beginning: only whole assistant turns stay supervised, and what is lost is counted. With `answers_only` the
    answers to tool results are all that is asked for, or supervised (answer_generation.py). Raises RowError.
    """
    conversation = read_conversation(as_messages(row), completions)
    if answers_only:
        conversation = up_to_last_answer(conversation, completions)
    read_refinements(conversation.messages)  # a row whose loops make no sense is refused here
    messages_json, tools_json = json_text(conversation.messages, "messages"), json_text(conversation.tools, "tools")
    if completions == "teacher":
        text = _prompt_text(tokenizer, conversation)
        ids, _ = _tokenize(tokenizer, text)
        mask = None
        limit_reason = f"the prompt has {len(ids)} tokens"
    else:
        text, spans = _recorded_text(tokenizer, conversation)
        if answers_only:
            spans = [spans[turn] for turn in answer_turns(conversation.messages)]
        ids, offsets = _tokenize(tokenizer, text[: spans[-1].end])
        mask = token_mask(offsets, spans)
        if not mask.any():
            raise RowError("the assistant turns are empty: no token to supervise")
        limit_reason = f"the recorded conversation has {len(ids)} tokens"
    if len(ids) > max_tokens and overlong == "reject":
        raise RowError(
            f"{limit_reason}, expected at most {max_tokens}; raise the context or set data.on_long_prompt=truncate_left"
        )
    cut = max(0, len(ids) - max_tokens)
    lost = 0
    if mask is None:
        prompt_ids, recorded_ids, response_mask = ids[cut:], None, None
    else:
        first = _first_whole_turn(mask, cut)
        lost = int(mask[:first].sum())
        prompt_ids, recorded_ids, response_mask = ids[cut:first], ids[first:], mask[first:]
    if not len(prompt_ids):
        raise RowError("the prompt is empty: no token precedes the first one to supervise")
    prompt = Prompt(
        uid=uid,
        key=key,
        messages_json=messages_json,
        tools_json=tools_json,
        prompt_ids=prompt_ids,
        recorded_ids=recorded_ids,
        response_mask=response_mask,
        held_out=held_out,
        caws_tier=row_tier(row),
    )
    return TokenizedRow(prompt, cut, lost)


def _first_whole_turn(mask: np.ndarray, cut: int) -> int:
    """Where the first assistant turn begins that lies behind `cut` as a whole, with a token before it."""
    starts = np.flatnonzero(mask & ~np.concatenate([[False], mask[:-1]]))
    starts = starts[starts > cut] if cut else starts[starts >= cut]
    if not len(starts):
        raise RowError(
            f"the last assistant turn alone is longer than the context: {len(mask) - cut} tokens fit, "
            f"{len(mask)} found; raise the context length"
        )
    return int(starts[0])


def _tokenize(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and character offsets [T, 2] of a rendered string (which brings its own special tokens)."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets; expected a fast tokenizer (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int32)
    return ids, np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)


def _prompt_text(tokenizer: Any, conversation: Conversation) -> str:
    if conversation.raw is not None and not tokenizer.chat_template:
        return conversation.raw.prompt
    return render_prompt(tokenizer, conversation.messages, conversation.tools)


def _recorded_text(tokenizer: Any, conversation: Conversation) -> Rendered:
    if conversation.raw is not None and not tokenizer.chat_template:
        prompt, completion = conversation.raw
        text = prompt + completion + (tokenizer.eos_token or "")
        return Rendered(text, [Span(len(prompt), len(text))])
    return render(tokenizer, conversation.messages, conversation.tools)


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    """The conversation as the text after which the assistant is to write."""
    return _apply(tokenizer, messages, tools, add_generation_prompt=True)


def render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Rendered:
    """The whole conversation and the characters that the assistant wrote, each turn with its end-of-turn token.

    Boundaries come from the template's own `{% generation %}` marks; without them from the turn's header and end-of-turn
    token where each is found exactly once per turn around that turn's content (which also serves templates that rewrite
    earlier turns, as Qwen3 does with thinking); else from rendering every prefix of the conversation, where each must begin
    the whole. Raises RowError where none of these establishes them.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if _marks_generation(tokenizer, tools):
        text, spans = _apply_with_marks(tokenizer, messages, tools)
        markers = turn_markers(tokenizer)
        spans = [_with_end_of_turn(text, span, markers.end) for span in spans]
        if len(spans) == len(turns):
            return Rendered(text, spans)
        raise RowError(f"the chat template marks {len(spans)} assistant turns of {len(turns)} as generated; mark each once")
    text = _apply(tokenizer, messages, tools)
    spans = _spans_by_markers(text, [messages[i] for i in turns], turn_markers(tokenizer))
    return Rendered(text, spans or _spans_by_prefixes(tokenizer, messages, tools, text, turns))


def _apply(tokenizer: Any, messages: list, tools: list, *, add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise RowError("messages need a chat template and the tokenizer has none; give rows with `prompt`, or set one")
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the chat template refuses the conversation: {error}") from error


def _marks_generation(tokenizer: Any, tools: list) -> bool:
    template = tokenizer.get_chat_template(tools=tools or None) if tokenizer.chat_template else ""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _apply_with_marks(tokenizer: Any, messages: list, tools: list) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template  # as in vocabulary.py

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools or None,
            chat_template=tokenizer.get_chat_template(tools=tools or None),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the chat template refuses the conversation: {error}") from error
    return texts[0], [Span(int(start), int(end)) for start, end in spans[0]]


def _with_end_of_turn(text: str, span: Span, end_of_turn: str) -> Span:
    """The span up to its end-of-turn token: stretched by one that follows, cut behind one that white space follows."""
    if end_of_turn and text.startswith(end_of_turn, span.end):
        return Span(span.start, span.end + len(end_of_turn))
    written = text[span.start : span.end].rstrip()
    if end_of_turn and written.endswith(end_of_turn):
        return Span(span.start, span.start + len(written))
    return span


class TurnMarkers(NamedTuple):
    """What a chat template puts around an assistant turn; "" where it puts nothing."""

    header: str  # "<|im_start|>assistant\n"
    end: str  # "<|im_end|>": the special token that ends the turn


@lru_cache(maxsize=8)
def turn_markers(tokenizer: Any) -> TurnMarkers:
    """Find the markers by rendering a probe conversation."""
    user, answer = "raykdUserProbe", "raykdAnswerProbe"
    question = [{"role": "user", "content": user}]
    asked = _apply(tokenizer, question, [])
    prompt = _apply(tokenizer, question, [], add_generation_prompt=True)
    whole = _apply(tokenizer, [*question, {"role": "assistant", "content": answer}, *question], [])
    if whole.count(answer) != 1 or whole.count(user) != 2:
        return TurnMarkers("", "")
    before, after = whole.split(answer)
    opening = prompt[len(asked) :] if prompt.startswith(asked) else ""
    # The generation prompt may hold more than the header (an opening <think>): its longest part found before the answer.
    header = next((opening[:n] for n in range(len(opening), 0, -1) if before.endswith(opening[:n])), "")
    specials = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
    special = re.match("|".join(map(re.escape, specials)), after.lstrip()) if specials else None
    return TurnMarkers(header if header.strip() else "", special[0] if special else "")


def _spans_by_markers(text: str, turns: list[dict[str, Any]], markers: TurnMarkers) -> list[Span]:
    """One span per turn between header and end-of-turn token; [] where the count or a turn's content does not fit."""
    if not (markers.header and markers.end) or text.count(markers.header) != len(turns):
        return []
    spans, position = [], 0
    for turn in turns:
        start = text.index(markers.header, position) + len(markers.header)
        end = text.find(markers.end, start)
        if end < 0 or not _holds(text[start:end], turn):
            return []
        position = end + len(markers.end)
        spans.append(Span(start, position))
    return spans


def _holds(text: str, turn: dict[str, Any]) -> bool:
    """Does a rendered turn hold the message's content (behind its thinking) and the names of its calls?"""
    content = turn["content"].split("</think>")[-1].strip()
    return content in text and all(call["function"]["name"] in text for call in turn.get("tool_calls", ()))


def _spans_by_prefixes(tokenizer: Any, messages: list, tools: list, text: str, turns: list[int]) -> list[Span]:
    spans = []
    end_of_turn = turn_markers(tokenizer).end
    for index in turns:
        before = _apply(tokenizer, messages[:index], tools, add_generation_prompt=True)
        through = _apply(tokenizer, messages[: index + 1], tools)
        if not text.startswith(before) or not text.startswith(through) or len(through) < len(before):
            raise RowError(
                f"cannot tell where assistant turn {index} stands: the chat template rewrites earlier turns; "
                "put {% generation %} marks around the assistant's part of the template"
            )
        spans.append(_with_end_of_turn(text, Span(len(before), len(through)), end_of_turn))
    return spans
