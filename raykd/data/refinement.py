"""Refinement loops in the user's conversations: where the halt head is read, and what it should say there.

In:  messages, some assistant ones with keys beside `content`:

         loop             0, 1, 2, ...: the message is that loop of a refinement; 0 begins one. Other messages may stand
                          between the loops, such as the user's wish for a better answer
         judge_score      quality of the message in [0, 1]; may be missing
         max_loops        loops the refinement may have       } on any loop of it, where they differ
         caws_tier        1, 2 or 3                           } from the configuration
         curriculum_stage 0, 1 or 2

Out: decision points (the last token of each loop, its end-of-turn token) and their halting probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from raykd.data.conversation import RowError
from raykd.data.halt_targets import halt_targets
from raykd.sample_config import HaltConfig
from raykd.types import CAWS_TIERS


@dataclass
class Refinement:
    """The loops of one refinement."""

    turns: list[int] = field(default_factory=list)  # which assistant message of the conversation each loop is
    scores: list[float] = field(default_factory=list)  # of each loop; NaN: not judged
    max_loops: int | None = None
    caws_tier: int | None = None
    curriculum_stage: int | None = None


class Decisions(NamedTuple):
    """Decision points of a sequence, in order."""

    position: np.ndarray  # int64 [D] the last token of each loop, on the axis of the given turns
    halt: np.ndarray  # float32 [D] probability of halting there; NaN: unknown
    source: np.ndarray  # int8 [D] HaltSource


_LIMITS = {"max_loops": (1, math.inf), "caws_tier": (min(CAWS_TIERS), max(CAWS_TIERS)), "curriculum_stage": (0, 2)}


def read_refinements(messages: Sequence[Mapping[str, Any]]) -> list[Refinement]:
    """The refinements of a conversation. Raises RowError for numbers that are none, and for loops out of order."""
    found: list[Refinement] = []
    turn = -1
    for index, message in enumerate(messages):
        turn += message["role"] == "assistant"
        if "loop" not in message:
            continue
        where = f"messages[{index}]"
        if message["role"] != "assistant":
            raise RowError(f"{where}.loop is on a {message['role']} message, expected only on assistant ones")
        loop = _whole(message["loop"], f"{where}.loop", 0, math.inf)
        expected = len(found[-1].turns) if found else 0
        if loop not in (0, expected):
            raise RowError(f"{where}.loop is {loop}, expected {expected} (the next) or 0 (the first of another refinement)")
        if loop == 0:
            found.append(Refinement())
        found[-1].turns.append(turn)
        found[-1].scores.append(judge_score(message, where))
        for name, (least, most) in _LIMITS.items():
            if name in message:
                setattr(found[-1], name, _whole(message[name], f"{where}.{name}", least, most))
    return found


def row_tier(row: Mapping[str, Any]) -> int:
    """CAWS tier that a row of the user's data names, at its top or in its `metadata`; 0: none. Raises RowError."""
    metadata = row.get("metadata")
    values = [place.get("caws_tier") for place in (row, metadata) if isinstance(place, Mapping)]
    named = [value for value in values if value is not None]
    return _whole(named[0], "caws_tier", *_LIMITS["caws_tier"]) if named else 0


def refinement_tier(messages: Sequence[Mapping[str, Any]]) -> int:
    """CAWS tier of a conversation: that of its last refinement that names one; 0: none does. Raises RowError."""
    named = [refinement.caws_tier for refinement in read_refinements(messages) if refinement.caws_tier is not None]
    return named[-1] if named else 0


def judge_score(message: Mapping[str, Any], where: str) -> float:
    """Quality of a message in [0, 1]; NaN where it has none. Raises RowError."""
    value = message.get("judge_score")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RowError(f"{where}.judge_score is {value!r}, expected a number from 0 to 1")
    return float(value)


def _whole(value: Any, where: str, least: float, most: float) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        above = "" if math.isinf(most) else f" to {most:g}"
        raise RowError(f"{where} is {value!r}, expected a whole number from {least:g}{above}")
    return value


def decisions(
    messages: Sequence[Mapping[str, Any]], turns: Sequence[tuple[int, int]], config: HaltConfig, *, default_tier: int = 0
) -> Decisions:
    """Where the halt head is read in a recorded conversation, and the probabilities of halting there.

    Args:
        messages: the whole recorded conversation.
        turns: [start, end) tokens of the assistant's turns that are left of it, of which the last is the last assistant
            message: a conversation may have been cut from the left. Loops that are lost still count as history.
        default_tier: CAWS tier of refinements that name none (`loss.caws_tier`); 0: no limit but max_loops.
    """
    refinements = read_refinements(messages)
    if not refinements:
        return Decisions(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int8))
    num_loops = np.array([len(refinement.turns) for refinement in refinements])
    present = np.arange(num_loops.max()) < num_loops[:, None]  # [B, K]
    scores = np.full(present.shape, np.nan)
    scores[present] = np.concatenate([refinement.scores for refinement in refinements])
    no_stage = -1 if config.curriculum_stage is None else config.curriculum_stage
    targets = halt_targets(
        scores,
        num_loops,
        np.array([_or(refinement.caws_tier, default_tier) for refinement in refinements]),
        np.array([_or(refinement.max_loops, config.max_loops) for refinement in refinements]),
        config,
        stage=np.array([_or(refinement.curriculum_stage, no_stage) for refinement in refinements]),
    )
    lost = sum(message["role"] == "assistant" for message in messages) - len(turns)
    turn = np.concatenate([refinement.turns for refinement in refinements]) - lost
    ends = np.array([end for _, end in turns], dtype=np.int64)
    kept = turn >= 0
    return Decisions(ends[turn[kept]] - 1, targets.halt[present][kept], targets.source[present][kept])


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
