"""What each loss needs of the data, to be told where a loss that is on has had nothing to look at.

In:  the losses of a run, and which of their terms had tokens. Out: a warning for each loss that had none.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from raykd.loss_config import LossConfig

logger = logging.getLogger(__name__)

NEEDS = {
    "kd": "responses with teacher scores",
    "self_kd": "responses",
    "ce_teacher": "responses that the teacher wrote",
    "ce_truth": "recorded responses (data.completions=recorded, or offline rows of source gold)",
    "tool_name": "responses with tool calls",
    "tool_choice": "calls of a tool of several that are offered in `tools`",
    "json_argument": "tool calls with arguments",
    "json_grammar": "calls of offered tools with a JSON Schema of their parameters, which the arguments keep",
    "integration_copy": "responses that reuse values of tool results before them",
    "copy_mass": "responses that copy values of tool results, character by character",
    "number_contradiction": "responses that reuse one of several numbers of tool results",
    "intermediate_layer": "hidden states of the teacher (teacher.hidden_layers, or teacher_hidden_states of offline rows)",
    "self_evaluation": "scored responses (judge_score on messages, teacher_quality_score of offline rows), or rollouts",
    "halt": "refinements (loop and judge_score on messages, or loop_index of offline rows) with known targets",
    "halt_ponder": "refinements (loop on messages, or loop_index of offline rows)",
    "caws_compliance": "responses",
    "claim_extraction": "responses with checkable claims",
    "code_mode_preference": "samples where code mode pays (code_mode) with code that calls tools or direct calls, or pairs "
    "(rejected_text of offline rows)",
    "length_aware": "responses that end with the end-of-turn token, or rollouts",
    "early_tool_call": "responses of the teacher or recorded ones",
    "policy_gradient": "answers of the student (rollouts.prompts_per_step above 0, with prompts that have a response)",
}


def tell_idle(losses: LossConfig, supervised: Collection[str], num_steps: int, *, at_end: bool) -> None:
    """Say of each loss of which no term is among the `supervised` ones, which had a token, in the first or in all steps."""
    idle = losses.weights.keys() - {term.partition("/")[0] for term in supervised}
    for name in losses.weights:
        if name in idle and at_end:
            logger.warning(
                "loss.%s=%g has had no token in all %d steps, changed nothing: it needs %s; give such data, or set it to 0",
                name, losses.weights[name], num_steps, NEEDS[name],
            )  # fmt: skip
        elif name in idle:
            logger.warning("loss.%s has had no token in the first %d steps: it needs %s", name, num_steps, NEEDS[name])
