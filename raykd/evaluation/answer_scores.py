"""What the text rules of raykd.data say of a completion, as scores per prompt: CAWS, claims, code mode.

In:  the text a model wrote, the text that the teacher wrote for the same prompt, the prompt.
Out: (sum, count) of one prompt, as in `metrics.py`.

    on all prompts
        caws_compliance     keeps the rules of its tier, in (0, 1]
    on prompts that the teacher answered with a CAWS document
        caws_structure      how much of such a document's structure it has, in [0, 1]
    on prompts where the teacher's text makes claims
        claim_score         half for making as many, half for making none that is not in the teacher's text, in [0, 1]
    on prompts that offer code and are eligible for it
        code_mode_adoption  called its tools through code
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raykd.data.claims import claim_score
from raykd.data.code_mode import code_mode_eligible, personal_data, tool_use
from raykd.data.text_scores import caws_compliance, caws_structure_score
from raykd.evaluation.metrics import Score
from raykd.sample_config import CodeModeConfig

WITHOUT_SECTIONS = 0.6 + 1e-9
"""`caws_structure_score` of a text that has everything but the headings of a CAWS document, and its rounding: one with more
is such a document."""

# How a prompt shows the programming interface through whose calls raykd.data.code_mode knows code.
_INTERFACE = re.compile(
    r"\b(?:const|let|var|class|namespace|interface|import)\s+(?:tools|api)\b|\b(?:tools|api)\.\w|\bcall_?tool\b", re.I
)


def score_answer(text: str, teacher_text: str | None, *, prefers_code: bool, caws_tier: int) -> Score:
    """Scores of the metrics above for one completion.

    Args:
        teacher_text: None: the teacher wrote `text` itself, and is not held against itself.
        prefers_code, caws_tier: of the prompt.
    """
    score: Score = {"caws_compliance": (caws_compliance(text, caws_tier).score, 1.0)}
    if caws_structure_score(text if teacher_text is None else teacher_text) > WITHOUT_SECTIONS:
        score["caws_structure"] = (caws_structure_score(text), 1.0)
    if teacher_text is not None and not math.isnan(claims := claim_score(text, teacher_text).reward):
        score["claim_score"] = (claims, 1.0)
    if prefers_code:
        score["code_mode_adoption"] = (float(bool(tool_use(text).code)), 1.0)
    return score


def prefers_code(messages: Sequence[Mapping[str, Any]], num_calls: int, config: CodeModeConfig) -> bool:
    """Should the tools be called through code: do calls follow, does the prompt offer code, is it eligible by `config`?

    `num_calls`: calls that the right answer makes, as far as the data says. Without any there is nothing to prefer.
    """
    system = [message["content"] for message in messages if message["role"] in ("system", "developer")]
    if not num_calls or not any(_INTERFACE.search(content) for content in system):
        return False
    results = [message["content"] for message in messages if message["role"] == "tool"]
    largest, private = max(map(len, results), default=0), personal_data(results, config.pii_patterns)
    return bool(code_mode_eligible(np.array([num_calls]), np.array([largest]), np.array([private]), config)[0])
