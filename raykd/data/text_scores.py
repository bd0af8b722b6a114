"""Scores of whole texts: metrics, and rewards of the policy gradient; no gradient of their own.

In:  what a student really wrote, and the teacher's text for the same prompt.
Out: numbers in [0, 1]; NaN where a score does not apply. Plain functions, so that any CPU worker can call them.

All word rules work on whole words, all code rules on code: "attribute" holds no "but", "I am from Paris" is no import.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raykd.data.claims import claim_score, latent_spans
from raykd.data.code_mode import code_mode_spans, fenced_blocks
from raykd.data.extractors import ToolCall, extract_tool_calls
from raykd.data.json_tree import parse
from raykd.types import CAWS_TIERS

_STEP = re.compile(r"^[ \t]*+Step \d{1,4}:", re.MULTILINE | re.IGNORECASE)
_WAVERING = re.compile(r"\b(however|but|contrary|despite|although)\b", re.IGNORECASE)
_CONCLUSION = re.compile(r"\b(?:answer|conclusion|result|therefore)\b", re.IGNORECASE)
_LONG_REASONING, _MAX_STEPS = 2, 5  # steps
_CODE_LANGUAGES = frozenset(("ts", "typescript", "tsx", "js", "javascript", "jsx", "py", "python"))
_HEADING = re.compile(r"^[ \t]*+#{1,6}[ \t]++([^\n]++)|^\*\*([^\n*]{1,200})\*\*:?[ \t]*+$", re.MULTILINE)
_LIST_ITEM = re.compile(r"^[ \t]*+(?:[-*+]|\d{1,4}[.)])[ \t]++\S", re.MULTILINE)
_SECTIONS = ("working spec", "invariants", "acceptance")
_FULL_WORDS = 100


@dataclass(frozen=True)
class CawsCompliance:
    """Penalties of a response by kind, each >= 0; 0 is compliance."""

    budget: float  # 1 when sentinels do not match, 0.5 per latent span and loop beyond the tier's, 0.2 per step beyond five
    quality: float  # 1 when empty, 0.1 per kind of wavering word, 0.2 for steps that come to no conclusion
    feature: float  # 0.5 for code that calls no tool, 0.3 for more than two latent spans in a short text

    @property
    def score(self) -> float:
        """exp(-(1.0 budget + 1.5 quality + 0.8 feature)) in (0, 1]: more of a penalty always costs something."""
        return math.exp(-(1.0 * self.budget + 1.5 * self.quality + 0.8 * self.feature))


def caws_compliance(text: str, tier: int = 2, num_loops: int = 1) -> CawsCompliance:
    """How a response keeps the CAWS rules of its tier (weights of the rules: the first implementation's)."""
    max_spans, max_loops = CAWS_TIERS[tier]
    latent = latent_spans(text)
    steps = len(_STEP.findall(text))
    excess = max(0, len(latent.spans) - max_spans) + max(0, num_loops - max_loops)
    budget = 1.0 * (latent.num_unmatched > 0) + 0.5 * excess + 0.2 * max(0, steps - _MAX_STEPS)
    wavering = len({word.casefold() for word in _WAVERING.findall(text)})
    unfinished = steps >= _LONG_REASONING and not _CONCLUSION.search(text)
    quality = 1.0 * (not text.strip()) + 0.1 * wavering + 0.2 * unfinished
    has_code = any(language in _CODE_LANGUAGES for language, *_ in fenced_blocks(text))
    feature = 0.5 * (has_code and not code_mode_spans(text)) + 0.3 * (len(text) < 200 and len(latent.spans) > 2)
    return CawsCompliance(budget, quality, feature)


def caws_structure_score(text: str) -> float:
    """How much of a CAWS document's structure a text has, in [0, 1]; a complete one has 1.

    0.4 for the headings working spec, invariants and acceptance, 0.2 for a fenced block, 0.2 for a JSON object (half of
    it), a list and any heading (a quarter each), 0.2 for its length up to 100 words.
    """
    headings = [(heading[0] or heading[1]).casefold() for heading in _HEADING.findall(text)]
    sections = sum(any(re.search(rf"\b{name}\b", heading) for heading in headings) for name in _SECTIONS)
    shape = 0.5 * _has_object(text) + 0.25 * bool(_LIST_ITEM.search(text)) + 0.25 * bool(headings)
    length = min(1.0, len(text.split()) / _FULL_WORDS)
    return 0.4 * sections / len(_SECTIONS) + 0.2 * bool(fenced_blocks(text)) + 0.2 * shape + 0.2 * length


def _has_object(text: str) -> bool:
    """Is there a JSON object with a member in the text?"""
    position = text.find("{")
    while position >= 0:
        node, read_to = parse(text, position)
        if node.closed and node.members:
            return True
        position = text.find("{", max(read_to, position + 1))
    return False


class Judged(NamedTuple):
    """R responses beside the teacher's to the same prompts."""

    reward: np.ndarray  # float64 [R]
    quality: np.ndarray  # float64 [R], the weighted mean of the same scores in [0, 1]; NaN where none has a weight
    complete: np.ndarray  # bool [R], see `holds_calls`


def holds_calls(text: str, teacher_text: str) -> bool:
    """Whether a response makes every call that the teacher makes, with at least the argument names that the teacher gives.

    False where the teacher makes none: what such a text must hold is not known.
    """
    needed = [_call_of(call) for call in extract_tool_calls(teacher_text) if not call.truncated]
    made = [_call_of(call) for call in extract_tool_calls(text) if not call.truncated]
    for name, keys in needed:
        found = next((place for place, (other, given) in enumerate(made) if other == name and keys <= given), None)
        if found is None:
            return False
        del made[found]
    return bool(needed)


def _call_of(call: ToolCall) -> tuple[str, set[str]]:
    return call.name, set(call.arguments) if isinstance(call.arguments, dict) else set()


def judge(texts: Sequence[str], teacher_texts: Sequence[str], tiers: Sequence[int], *, caws: float, claims: float) -> Judged:
    """The reward caws * compliance + claims * claim reward of each response, and whether it is complete.

    `tiers`: CAWS tier that each response is to keep. Where the teacher made no claims the second part is 0, for all
    responses to the prompt alike, and the quality is the compliance alone.
    """
    reward, most = np.zeros(len(texts)), np.full(len(texts), caws)
    if caws:
        reward += [caws * caws_compliance(*pair).score for pair in zip(texts, tiers, strict=True)]
    if claims:
        scores = np.array([claim_score(*pair).reward for pair in zip(texts, teacher_texts, strict=True)])
        reward += claims * np.nan_to_num(scores, nan=0.0)
        most += claims * ~np.isnan(scores)
    quality = np.divide(reward, most, out=np.full(len(texts), np.nan), where=most > 0)
    complete = [holds_calls(*pair) for pair in zip(texts, teacher_texts, strict=True)]
    return Judged(reward, quality, np.array(complete, dtype=bool))
