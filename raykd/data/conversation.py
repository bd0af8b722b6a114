"""A row of the user's data as a checked conversation.

In:  a mapping as it comes from JSONL, Parquet or a Hugging Face dataset; `messages` and `tools` may be JSON text.
Out: a `Conversation` in the OpenAI form, or a `RowError` whose text is the reason that stands in rejected.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(ValueError):
    """One row cannot be used; the message says why, for the user to read."""


class RawText(NamedTuple):
    """A `prompt` row as it stands, for a tokenizer without a chat template."""

    prompt: str
    completion: str  # "" where the row has none


@dataclass(frozen=True)
class Conversation:
    """Messages (content always a string, call arguments an object where they parse) and offered tools."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    raw: RawText | None = None


def validate_row(row: Mapping[str, Any], completions: str) -> str | None:
    """Why a row cannot be used, or None."""
    try:
        read_conversation(row, completions)
    except RowError as error:
        return str(error)
    return None


def read_conversation(row: Mapping[str, Any], completions: str) -> Conversation:
    """The conversation that a row asks for: up to the last message not the assistant's (`teacher`), or up to its last
    assistant turn (`recorded`). Raises RowError."""
    tools = _read_tools(row.get("tools"))
    raw = None
    if row.get("messages") is not None:
        messages = _read_messages(row["messages"])
    elif row.get("prompt") is not None:
        raw = RawText(_text(row["prompt"], "prompt"), _text(row.get("completion") or "", "completion"))
        messages: list[dict[str, Any]] = [{"role": "user", "content": raw.prompt}]
        if raw.completion:
            messages.append({"role": "assistant", "content": raw.completion})
    else:
        raise RowError(f"row has neither `messages` nor `prompt`; found {sorted(row)}")
    if completions == "teacher":
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise RowError("messages hold assistant turns only: nothing for the teacher to answer")
    else:
        if not any(message["role"] == "assistant" for message in messages) and row.get("gold_calls"):
            messages.append({"role": "assistant", "content": "", "tool_calls": read_calls(row["gold_calls"], "gold_calls")})
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise RowError("no assistant turn: data.completions=recorded needs one (or `gold_calls`)")
    return Conversation(messages, tools, raw)


def _read_messages(value: Any) -> list[dict[str, Any]]:
    value = from_json_text(value, "messages")
    if not isinstance(value, list) or not value:
        raise RowError(f"`messages` is {_kind(value)}, expected a non-empty list of messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {_kind(message)}, expected an object with role and content")
    if message.get("role") not in ROLES:
        raise RowError(f"{where}.role is {message.get('role')!r}, expected one of {', '.join(ROLES)}")
    clean = {key: value for key, value in message.items() if value is not None}
    calls = clean.pop("tool_calls", None)
    if calls and message["role"] != "assistant":
        raise RowError(f"{where}.tool_calls is on a {message['role']} message, expected only on assistant ones")
    if "content" not in clean and not calls:
        raise RowError(f"{where}.content is missing" + (" and so is tool_calls" if message["role"] == "assistant" else ""))
    clean["content"] = _text(clean.get("content", ""), f"{where}.content")
    if calls:
        clean["tool_calls"] = read_calls(calls, f"{where}.tool_calls")
    return clean


def _text(value: Any, where: str) -> str:
    """A string, or a list of text parts (OpenAI's content parts)."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RowError(f"{where} is {_kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds an unpaired surrogate at character {error.start}, expected valid Unicode") from error
    return value


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls in the OpenAI form, from that form or from bare {"name", "arguments"}."""
    value = from_json_text(value, where)
    if not isinstance(value, list):
        raise RowError(f"{where} is {_kind(value)}, expected a list of calls")
    calls = []
    for index, call in enumerate(value):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise RowError(
                f"{where}[{index}] has no name, expected {{function: {{name, arguments}}}} or {{name, arguments}}"
            )
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _object_or_text(arguments)
        elif not isinstance(arguments, Mapping):
            raise RowError(f"{where}[{index}].arguments is {_kind(arguments)}, expected an object or its JSON text")
        outer = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**outer, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return calls


def _object_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _read_tools(value: Any) -> list[dict[str, Any]]:
    value = from_json_text(value if value is not None else [], "tools")
    if not isinstance(value, list):
        raise RowError(f"`tools` is {_kind(value)}, expected a list of tools")
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"tools[{index}] has no name, expected {{type: function, function: {{name, parameters}}}}")
        problem = _schema_problem(json_text(function.get("parameters", {}), f"tools[{index}].parameters"))
        if problem:
            raise RowError(f"tools[{index}] ({function['name']}): parameters are no JSON Schema: {problem}")
        tools.append({"type": "function", "function": dict(function)})
    return tools


@lru_cache(maxsize=4096)
def _schema_problem(schema_json: str) -> str | None:
    schema = json.loads(schema_json)
    if not isinstance(schema, dict):
        return f"found {_kind(schema)}, expected an object"
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"{error.message} at {error.json_path}"
    except RecursionError:
        return "nested too deeply"
    return None


def from_json_text(value: Any, where: str) -> Any:
    """The value of a column that may hold JSON text: parsed, or the value itself where it is no string. Raises RowError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is a string but no JSON: {error}") from error


def json_text(value: Any, where: str) -> str:
    """The value as JSON text of valid Unicode. Raises RowError where it is no JSON (a date, say, out of a Parquet file)."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds an unpaired surrogate, expected valid Unicode") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{where} cannot be written as JSON: {error}") from error
    return text


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
