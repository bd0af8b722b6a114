"""Rollouts: the rows they make, and that thirty steps of policy gradient raise a reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.loss_config import RolloutConfig
from raykd.losses.head import head_logprobs
from raykd.losses.scored import policy_gradient_loss
from raykd.student.generation import generate
from raykd.student.model import load_student
from raykd.training.distributed import score_in_ray
from raykd.training.rollouts import rollout_examples
from raykd.types import Example, Mark, Source
from tests.training.tiny_run import VOCAB, make_config, save_student

EOS = 1
R = int(Mark.RESPONSE)


def example(uid: int, ids: list[int], marks: list[int]) -> Example:
    num_response = sum(bool(mark & R) for mark in marks)
    return Example(
        uid=uid,
        source=Source.TEACHER,
        input_ids=np.array(ids, np.int32),
        marks=np.array(marks, np.uint16),
        topk_ids=np.empty((num_response, 0), np.int32),
        topk_logprobs=np.empty((num_response, 0), np.float16),
        log_tail=np.empty(0, np.float32),
    )


TWO_TURNS = example(7, [10, 11, 20, 21, EOS, 12, 22], [0, 0, R, R, R, 0, R])
WITH_SLOTS = example(8, [10, 20, 30, 21], [0, R, int(Mark.LATENT), R])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    save_student(path := tmp_path_factory.mktemp("student"))
    return AutoTokenizer.from_pretrained(path), make_config(path)


def test_rows_carry_prompt_response_advantage_and_the_teachers_length(words):
    tokenizer, _ = words
    asked: list[list[int]] = []
    scored: list[tuple[list[str], list[str]]] = []

    def sample(prompts: list[np.ndarray]) -> list[np.ndarray]:
        asked.extend(prompt.tolist() for prompt in prompts)
        return [np.array([40, EOS]), np.array([41, 42, 43, 44, 45, 46]), np.array([EOS]), np.array([50])]

    def score(texts: list[str], teacher_texts: list[str]) -> np.ndarray:
        scored.append((texts, teacher_texts))
        return np.array([1.0, 0.5, 0.0, 2.0])

    config = RolloutConfig(samples=2, length=0.25)
    rows, rewards, lengths = rollout_examples(
        [TWO_TURNS, WITH_SLOTS], tokenizer, config, sample=sample, score=score, eos_ids={EOS}
    )
    assert asked == [[10, 11], [10, 11], [10], [10]]
    assert scored == [(["w40", "w41 w42 w43 w44 w45 w46", "", "w50"], ["w20 w21", "w20 w21", "w20 w30 w21", "w20 w30 w21"])]
    # The second response is twice as long as the teacher's three tokens.
    np.testing.assert_allclose(rewards, [[1.0, 0.5 - 0.25], [0.0, 2.0]])
    assert [row.advantage for row in rows] == [0.75, -0.75, -2.0, 2.0]
    assert lengths.tolist() == [[2, 6], [1, 1]]
    first = rows[0]
    assert (first.uid, first.source, first.target_length) == (7, Source.STUDENT, 3.0)
    assert first.input_ids.tolist() == [10, 11, 40, EOS]
    assert first.marks.tolist() == [0, 0, R, R]
    batch = collate_kd_batch(rows, pad_id=0)
    assert batch.response_advantage.tolist() == [0.75] * 2 + [-0.75] * 6 + [-2.0, 2.0]
    assert not batch.has_teacher.any()


def test_a_score_that_is_no_number_is_refused(words):
    tokenizer, _ = words
    with pytest.raises(ValueError, match="reward of a response is nan"):
        rollout_examples(
            [WITH_SLOTS],
            tokenizer,
            RolloutConfig(samples=2),
            sample=lambda prompts: [np.array([5]) for _ in prompts],
            score=lambda texts, teacher_texts: np.array([1.0, math.nan]),
            eos_ids={EOS},
        )


def test_thirty_steps_of_policy_gradient_raise_the_reward(words):
    """The reward counts one word: a policy that ignores rewards writes it one time in 64."""
    tokenizer, config = words
    student = load_student(config.student, seed=0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    prompts = [example(uid, [uid, 5, 9], [0, 0, R]) for uid in range(10, 18)]

    def score(texts: list[str], teacher_texts: list[str]) -> np.ndarray:
        return np.array([text.split().count("w33") / 4 for text in texts])

    means = []
    for step in range(30):

        def sample(prompt_ids: list[np.ndarray], step: int = step) -> list[np.ndarray]:
            drawn = generate(student, prompt_ids, max_tokens=4, temperature=1.0, seed=step, eos_ids=[EOS])
            return [response.ids for response in drawn]

        rows, rewards, _ = rollout_examples(
            prompts, tokenizer, RolloutConfig(samples=8), sample=sample, score=score, eos_ids={EOS}
        )
        means.append(rewards.mean())
        batch = collate_kd_batch(rows, pad_id=0)
        hidden = student(batch.input_ids).hidden.flatten(0, 1)[batch.response_index - 1]
        ids = batch.response_ids[:, None]
        logprobs, _ = head_logprobs(hidden, student.head_weight, ids, torch.zeros_like(ids, dtype=torch.bool))
        policy_gradient_loss(logprobs[:, 0], batch.response_advantage).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert means[0] < 3 / VOCAB
    assert np.mean(means[-3:]) > 0.5


def test_scores_come_from_ray_tasks_in_order(words, ray_cluster):
    _, config = words
    rollouts = RolloutConfig(caws=1.0, claims=0.0)
    score = score_in_ray(Config.model_validate(config.model_dump() | {"rollouts": rollouts.model_dump()}))
    texts = ["Fine.", "", "<bot>Fine.", "Fine.", "But fine."]
    found = score(texts, [""] * 5)
    np.testing.assert_allclose(found, np.exp([0, -1.5, -1.0, 0, -0.15]))
    assert score([], []).shape == (0,)
