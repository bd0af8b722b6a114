"""Where a text calls tools through code and where it calls them directly; which samples should use code.

In:  an assistant turn's text and its tool calls; counts and tool results of whole samples.
Out: spans in code points for the marks CODE_MODE and DIRECT_TOOL; eligibility per sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from raykd.data.extractors import ToolCall, extract_tool_calls
from raykd.sample_config import CodeModeConfig
from raykd.types import Span

_FENCE = re.compile(r"^[ \t]*+(```+|~~~+)[ \t]*+(\w*)[^\n]*+(?:\n|\Z)", re.MULTILINE)
_LANGUAGES = frozenset(("", "ts", "typescript", "tsx", "js", "javascript", "jsx", "py", "python"))
# A call through the tools' programming interface: a member of `tools` or `api`, `callTool(...)`, or an awaited function.
_API_CALL = re.compile(r"\b(?:tools|api)\.\w++\s*+\(|\bcall_?tool\s*+\(|\bawait\s++[A-Za-z_$][\w$.]*+\(", re.IGNORECASE)
_STATEMENT = re.compile(
    r"^[ \t]*+(?:(?:const|let|var)\s++[^=\n]{1,200}=\s*+|return\s++|\w++\s*+=\s*+)?await\s++[A-Za-z_$][\w$.]*+\([^\n]*+",
    re.MULTILINE,
)


class ToolUse(NamedTuple):
    """How a text calls tools."""

    code: list[Span]  # `code_mode_spans`
    direct: list[Span]  # `direct_tool_spans`
    num_calls: int  # direct ones and those in code


def tool_use(text: str) -> ToolUse:
    """The tool calls of an assistant turn, through code and direct."""
    calls, code = extract_tool_calls(text), code_mode_spans(text)
    return ToolUse(code, direct_tool_spans(calls, code), len(calls) + num_code_calls(text, code))


def fenced_blocks(text: str) -> list[tuple[str, Span, Span]]:
    """Every fenced block as (language in lower case, its inside, the whole with its fences).

    A block ends at a bare fence of the same characters, at least as long; one that is never closed ends with the text.
    """
    blocks = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[2] and fence[1].startswith(opened[1]):
            inside = Span(opened.end(), fence.start())
            blocks.append((opened[2].lower(), inside, Span(opened.start(), fence.end())))
            opened = None
    if opened is not None:
        blocks.append((opened[2].lower(), Span(opened.end(), len(text)), Span(opened.start(), len(text))))
    return blocks


def code_mode_spans(text: str) -> list[Span]:
    """Code that calls tools through their programming interface: sorted, disjoint.

    A fenced block of TypeScript, JavaScript or Python (or of no named language) with such a call in it, without its fences;
    outside of blocks, lines that are a statement with `await f(...)`. English with "import" or "await" in it is no code.
    """
    spans, position = [], 0
    for language, inside, whole in fenced_blocks(text):
        spans += _statements(text, position, whole.start)
        if language in _LANGUAGES and _API_CALL.search(text, *inside):
            spans.append(inside)
        position = whole.end
    return spans + _statements(text, position, len(text))


def num_code_calls(text: str, spans: Sequence[Span]) -> int:
    """Calls of tools within code; `spans` of `code_mode_spans`."""
    return sum(len(_API_CALL.findall(text, *span)) for span in spans)


def _statements(text: str, start: int, end: int) -> list[Span]:
    return [Span(*match.span()) for match in _STATEMENT.finditer(text, start, end)]


def direct_tool_spans(calls: Sequence[ToolCall], spans: Sequence[Span]) -> list[Span]:
    """Spans of the calls (of `extract_tool_calls`) outside code that calls tools; `spans` of `code_mode_spans`."""
    code = np.array(spans, dtype=np.int64).reshape(-1, 2)
    starts = np.array([call.call_span.start for call in calls], dtype=np.int64)
    block = np.searchsorted(code[:, 0], starts, side="right") - 1
    in_code = (block >= 0) & (starts < np.append(code[:, 1], 0)[block])
    return [call.call_span for call, inside in zip(calls, in_code.tolist(), strict=True) if not inside]


def code_mode_eligible(
    num_calls: np.ndarray, largest_result: np.ndarray, has_personal_data: np.ndarray, config: CodeModeConfig
) -> np.ndarray:
    """Which samples should call tools through code, bool [R]: any one of the three rules is enough.

    Args:
        num_calls: int [R] tool calls of the sample.
        largest_result: int [R] characters of its largest tool result; 0 without one.
        has_personal_data: bool [R] whether a tool result holds personal data (`personal_data`).
    """
    many = np.asarray(num_calls) >= config.min_tools
    large = np.asarray(largest_result) >= config.min_intermediate_chars
    return many | large | np.asarray(has_personal_data, dtype=bool)


def personal_data(tool_results: Iterable[str], patterns: Sequence[str]) -> bool:
    """Does a tool result match one of the regular expressions?"""
    compiled = [re.compile(pattern) for pattern in patterns]
    return any(pattern.search(result) for result in tool_results for pattern in compiled)
