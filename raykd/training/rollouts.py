"""Responses that the student samples while it trains, scored and made into rows of the step.

In:  examples of the step (their prompts and the teacher's responses), a function that samples, a function that scores.
Out: Examples with `source` STUDENT, an advantage for the policy gradient and the teacher's length for length_aware.

The rows come on top of the step's own: distillation on the teacher's text goes on and keeps the student near its teacher.
They have no teacher scores and are no target of any cross-entropy. With `rollouts.every` above 1 the same answers serve
several steps; their log-probabilities when sampled tell the policy gradient how far the student has moved since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from raykd.data.detokenize import decode_tokens
from raykd.data.text_scores import Judged
from raykd.losses.scored import leave_one_out_advantages
from raykd.sample_config import RolloutConfig
from raykd.student.generation import Generated
from raykd.types import Batch, Example, Mark, Source

Sample = Callable[[list[np.ndarray]], Sequence[Generated]]
"""One sampled response (the end-of-turn token included) to each prompt [P] of ids."""
Score = Callable[[list[str], list[str], list[int]], Judged]
"""Judges responses beside the teacher's response to the same prompt, both without end-of-turn token, by the CAWS tier that
the prompt's row names (0: none)."""


class Rollouts(NamedTuple):
    """P prompts with n responses each; examples in that order, prompt by prompt."""

    examples: list[Example]
    rewards: np.ndarray  # float64 [P, n]
    lengths: np.ndarray  # int64 [P, n] response tokens


class RolloutRows(NamedTuple):
    """What a rank trains on in a step beside its own rows, and what to log of it."""

    batches: list[Batch]
    numbers: dict[str, float]  # sums over answers that are new in this step; the same names in every step


class KeptRollouts:
    """Answers that are sampled once and trained on in `every` steps.

    They are in no checkpoint: the first step of a process samples, whatever its number, so that a restarted run is exactly
    repeatable but goes on with other answers than one that was never stopped.
    """

    def __init__(self, every: int, sample: Callable[[pa.Table, int], RolloutRows]):
        """`sample` answers prompts of a step's rows (EXAMPLE_SCHEMA), given the number of steps made."""
        self._every = every
        self._sample = sample
        self._kept: RolloutRows | None = None

    def rows(self, table: pa.Table, step: int) -> RolloutRows:
        """The answers for the step after `step` steps, whose own rows are `table`."""
        if self._kept is None or step % self._every == 0:
            self._kept = self._sample(table, step)
            return self._kept
        return self._kept._replace(numbers=dict.fromkeys(self._kept.numbers, 0.0))


def rollout_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    config: RolloutConfig,
    *,
    sample: Sample,
    score: Score,
    eos_ids: Collection[int],
) -> Rollouts:
    """`config.samples` responses of the student to the prompt of each example, up to its first response token.

    The advantage of a response is its reward less the mean of the others to the same prompt (leave-one-out). The reward is
    `score` less `config.length` times the excess over the teacher's length, as a share of it. A complete response may be as
    long as it likes: nothing is taken off its reward, and it has no target length.

    Raises ValueError where a score is not finite.
    """
    n = config.samples
    prompts = [_first_turn(example) for example in examples]
    prompt_ids = [ids for ids, _ in prompts for _ in range(n)]
    responses = sample(prompt_ids)
    assert len(responses) == len(prompt_ids), f"{len(responses)} responses to {len(prompt_ids)} prompts"
    assert all(len(response.ids) for response in responses), "an empty response: not even its end was sampled"
    lengths = np.array([len(response.ids) for response in responses], dtype=np.int64)
    teacher_lengths = np.array([len(ids) for _, ids in prompts for _ in range(n)], dtype=np.int64)
    teacher_texts = [_text(tokenizer, ids, eos_ids) for _, ids in prompts]
    texts = [_text(tokenizer, response.ids, eos_ids) for response in responses]
    tiers = [example.caws_tier for example in examples for _ in range(n)]
    rewards, quality, complete = score(texts, [text for text in teacher_texts for _ in range(n)], tiers)
    if not np.isfinite(rewards).all():
        worst = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise ValueError(
            f"the reward of a response is {rewards[worst]}, expected a finite number; the response: {texts[worst]!r}"
        )
    excess = np.maximum(lengths / np.maximum(teacher_lengths, 1) - 1.0, 0.0)
    rewards = rewards - config.length * np.where(complete, 0.0, excess)
    rewards = rewards.reshape(len(examples), n)
    advantages = leave_one_out_advantages(torch.from_numpy(rewards)).flatten().tolist()
    targets = np.where(complete, np.nan, teacher_lengths).tolist()
    rows = [
        replace(
            _example(examples[index // n], prompt_ids[index], response),
            advantage=advantages[index],
            target_length=targets[index],
            quality=float(quality[index]),
        )
        for index, response in enumerate(responses)
    ]
    return Rollouts(rows, rewards, lengths.reshape(len(examples), n))


def _first_turn(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the prompt, and of the first assistant turn behind it (latent slots included)."""
    response = (example.marks & (Mark.RESPONSE | Mark.LATENT)) != 0
    start = int(response.argmax())
    assert response.any(), f"example {example.uid} has no response"
    after = np.flatnonzero(~response[start:])
    end = start + int(after[0]) if len(after) else len(response)
    return example.input_ids[:start], example.input_ids[start:end]


def _text(tokenizer: Any, ids: np.ndarray, eos_ids: Collection[int]) -> str:
    ended = len(ids) > 0 and int(ids[-1]) in eos_ids
    return decode_tokens(tokenizer, ids[:-1] if ended else ids).text


def _example(prompted: Example, prompt: np.ndarray, response: Generated) -> Example:
    chosen = ~np.isnan(response.logprobs)  # the others are latent slots
    num_response = int(chosen.sum())
    marks = np.zeros(len(prompt) + len(response.ids), dtype=np.uint16)
    marks[len(prompt) :] = np.where(chosen, Mark.RESPONSE, Mark.LATENT)
    return Example(
        uid=prompted.uid,
        source=Source.STUDENT,
        input_ids=np.concatenate([prompt, response.ids]).astype(np.int32),
        marks=marks,
        topk_ids=np.empty((num_response, 0), np.int32),
        topk_logprobs=np.empty((num_response, 0), np.float16),
        log_tail=np.empty(0, np.float32),
        sampled_logprobs=response.logprobs[chosen],
        caws_tier=prompted.caws_tier,
    )
