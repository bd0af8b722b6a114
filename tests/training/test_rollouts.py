"""Rollouts: the rows they make, how long they serve, and that thirty steps of policy gradient raise a reward."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from raykd.config import Config
from raykd.data.collate import collate_kd_batch
from raykd.data.examples import examples_to_table
from raykd.data.text_scores import Judged
from raykd.losses.context import LossContext
from raykd.losses.head import head_logprobs
from raykd.losses.scored import policy_gradient_loss
from raykd.sample_config import RolloutConfig
from raykd.student.generation import Generated, generate
from raykd.student.model import load_student
from raykd.training.feed import Feed
from raykd.training.loop import fit
from raykd.training.rollouts import KeptRollouts, RolloutRows, rollout_examples
from raykd.training.sampling import rollouts_of, score_in_ray
from raykd.training.trainer import Trainer, make_trainer
from raykd.types import EXAMPLE_SCHEMA, Example, Mark, Source
from tests.training.tiny_run import VOCAB, make_config, make_feed, make_pairs, make_rows, save_student, weights

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


def answer(*ids: int) -> Generated:
    """A response whose tokens had the log-probability of a tenth of their id below 0."""
    return Generated(np.array(ids, np.int32), -np.array(ids, np.float32) / 10, ended=ids[-1] == EOS)


def incomplete(rewards: list[float]) -> Judged:
    return Judged(np.array(rewards), np.full(len(rewards), math.nan), np.zeros(len(rewards), dtype=bool))


TWO_TURNS = example(7, [10, 11, 20, 21, EOS, 12, 22], [0, 0, R, R, R, 0, R])
WITH_SLOTS = example(8, [10, 20, 30, 21], [0, R, int(Mark.LATENT), R])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    save_student(path := tmp_path_factory.mktemp("student"))
    return AutoTokenizer.from_pretrained(path), make_config(path)


def test_rows_carry_prompt_response_advantage_and_the_teachers_length(words):
    tokenizer, _ = words
    asked: list[list[int]] = []
    scored: list[tuple[list[str], list[str], list[int]]] = []

    def sample(prompts: list[np.ndarray]) -> list[Generated]:
        asked.extend(prompt.tolist() for prompt in prompts)
        return [answer(40, EOS), answer(41, 42, 43, 44, 45, 46), answer(EOS), answer(50)]

    def score(texts: list[str], teacher_texts: list[str], tiers: list[int]) -> Judged:
        scored.append((texts, teacher_texts, tiers))
        return Judged(np.array([1.0, 0.5, 0.0, 2.0]), np.array([0.5, 0.25, 0.0, 1.0]), np.array([False, False, True, False]))

    config = RolloutConfig(samples=2, length=0.25)
    rows, rewards, lengths = rollout_examples(
        [replace(TWO_TURNS, caws_tier=3), WITH_SLOTS], tokenizer, config, sample=sample, score=score, eos_ids={EOS}
    )
    assert asked == [[10, 11], [10, 11], [10], [10]]
    texts = ["w40", "w41 w42 w43 w44 w45 w46", "", "w50"]
    assert scored == [(texts, ["w20 w21", "w20 w21", "w20 w30 w21", "w20 w30 w21"], [3, 3, 0, 0])]
    # The second response is twice as long as the teacher's three tokens.
    np.testing.assert_allclose(rewards, [[1.0, 0.5 - 0.25], [0.0, 2.0]])
    assert [row.advantage for row in rows] == [0.75, -0.75, -2.0, 2.0]
    assert lengths.tolist() == [[2, 6], [1, 1]]
    first = rows[0]
    assert (first.uid, first.source, first.target_length) == (7, Source.STUDENT, 3.0)
    assert [row.quality for row in rows] == [0.5, 0.25, 0.0, 1.0], "what self_evaluation is to say of them"
    assert math.isnan(rows[2].target_length), "a complete response may be as long as it likes"
    assert first.input_ids.tolist() == [10, 11, 40, EOS]
    assert first.marks.tolist() == [0, 0, R, R]
    batch = collate_kd_batch(rows, pad_id=0)
    assert batch.caws_tier.tolist() == [3, 3, 0, 0]
    assert batch.response_advantage.tolist() == [0.75] * 2 + [-0.75] * 6 + [-2.0, 2.0]
    ids = [40, EOS, 41, 42, 43, 44, 45, 46, EOS, 50]
    np.testing.assert_allclose(batch.response_old_logprob, -np.array(ids) / 10, rtol=1e-6)
    assert not batch.has_teacher.any()


def test_latent_slots_of_an_answer_are_inputs_and_no_choice_of_the_students(words):
    tokenizer, _ = words
    thought = Generated(np.array([40, 50, 50, 41, EOS], np.int32), np.array([-1, np.nan, np.nan, -2, -3], np.float32), True)
    made = rollout_examples(
        [TWO_TURNS], tokenizer, RolloutConfig(samples=2), sample=lambda prompts: [thought, answer(42, EOS)],
        score=lambda texts, teachers, tiers: incomplete([1.0, 0.0]), eos_ids={EOS},
    )  # fmt: skip
    latent = int(Mark.LATENT)
    assert made.examples[0].marks.tolist() == [0, 0, R, latent, latent, R, R]
    batch = collate_kd_batch(made.examples, pad_id=0)
    assert batch.response_ids.tolist() == [40, 41, EOS, 42, EOS]
    assert batch.response_old_logprob[:3].tolist() == [-1, -2, -3]


def test_a_score_that_is_no_number_is_refused(words):
    tokenizer, _ = words
    with pytest.raises(ValueError, match="reward of a response is nan"):
        rollout_examples(
            [WITH_SLOTS],
            tokenizer,
            RolloutConfig(samples=2),
            sample=lambda prompts: [answer(5) for _ in prompts],
            score=lambda texts, teacher_texts, tiers: incomplete([1.0, math.nan]),
            eos_ids={EOS},
        )


def test_thirty_steps_of_policy_gradient_raise_the_reward(words):
    """The reward counts one word: a policy that ignores rewards writes it one time in 64."""
    tokenizer, config = words
    student = load_student(config.student, seed=0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    prompts = [example(uid, [uid, 5, 9], [0, 0, R]) for uid in range(10, 18)]

    def score(texts: list[str], teacher_texts: list[str], tiers: list[int]) -> Judged:
        return incomplete([text.split().count("w33") / 4 for text in texts])

    means = []
    for step in range(30):

        def sample(prompt_ids: list[np.ndarray], step: int = step) -> list[Generated]:
            return generate(student, prompt_ids, max_tokens=4, temperature=1.0, seed=step, eos_ids=[EOS])

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


def test_answers_serve_for_as_many_steps_as_every_says_and_a_restart_samples_at_once():
    sampled: list[int] = []

    def sample(table: pa.Table, step: int) -> RolloutRows:
        sampled.append(step)
        return RolloutRows([collate_kd_batch([WITH_SLOTS], 0)], {"rollouts": 4.0, "reward": 2.5})

    kept = KeptRollouts(3, sample)
    table = EXAMPLE_SCHEMA.empty_table()
    rows = [kept.rows(table, step) for step in range(5)]
    assert sampled == [0, 3]
    assert [made.batches is rows[0].batches for made in rows] == [True, True, True, False, False]
    assert rows[3].numbers == rows[0].numbers == {"rollouts": 4.0, "reward": 2.5}
    assert rows[1].numbers == rows[2].numbers == rows[4].numbers == {"rollouts": 0.0, "reward": 0.0}
    again = KeptRollouts(3, sample)
    _ = [again.rows(table, step) for step in range(5, 8)]
    assert sampled == [0, 3, 5, 6]


def answering(trainer: Trainer, feed: Feed) -> KeptRollouts:
    """The student's own answers to three prompts of a step; a word earns its number."""
    options = trainer.config.rollouts

    def sample(table: pa.Table, step: int) -> RolloutRows:
        prompts = [example(int(uid), [int(uid) % VOCAB, 5, 9], [0, 0, R]) for uid in table["uid"].to_numpy()[:3]]
        made = rollout_examples(
            prompts,
            trainer.student.tokenizer,
            options,
            sample=partial(
                generate, trainer.student, max_tokens=options.max_tokens, temperature=1.0, seed=step, eos_ids=[EOS]
            ),
            score=lambda texts, teacher_texts, tiers: incomplete(
                [sum(int(word[1:]) for word in text.split()) / 99 for text in texts]
            ),
            eos_ids={EOS},
        )
        numbers = {"rollouts": made.rewards.size, "reward": made.rewards.sum(), "rollout_tokens": made.lengths.sum()}
        return RolloutRows(feed.batches(examples_to_table(made.examples)), {k: float(v) for k, v in numbers.items()})

    return KeptRollouts(options.every, sample)


def train(config: Config, folder: Path, steps: int | None = None) -> tuple[Trainer, list[dict[str, float]]]:
    context = LossContext(rollout_clip=config.rollouts.clip if config.rollouts.every > 1 else None)
    trainer = make_trainer(config, folder, num_steps=6, teacher={}, context=context)
    left = make_rows(48)
    left = left.filter(pa.array(~np.isin(left["uid"].to_numpy(), trainer.consumed)))
    feed, logged = make_feed(trainer, [left]), []
    last = None if steps is None else trainer.progress.step + steps
    fit(
        trainer,
        feed,
        log=lambda step, metrics: logged.append(dict(metrics)),
        stop=lambda: trainer.progress.step == last,
        before_step=lambda step: None,
        rollouts=answering(trainer, feed),
    )
    return trainer, logged


ROLLOUTS = {"prompts_per_step": 3, "samples": 2, "max_tokens": 6}


def test_a_run_logs_what_its_answers_earn_and_is_repeatable_through_a_restart(student_path, tmp_path):
    config = make_config(student_path, loss={"policy_gradient": 1.0}, rollouts=ROLLOUTS | {"every": 3, "clip": 0.1})
    whole, logged = train(config, tmp_path / "whole")
    assert [metrics["count/policy_gradient"] > 0 for metrics in logged] == [True] * 6
    assert ["reward" in metrics for metrics in logged] == [True, False, False] * 2
    assert logged[0]["rollout_length"] * 6 == logged[0]["count/policy_gradient"] == logged[1]["count/policy_gradient"]
    assert "share/policy_gradient" in logged[0]
    ends = []
    for name in ("one", "other"):
        train(config, tmp_path / name, steps=2)
        rest, after = train(config, tmp_path / name)
        assert ["reward" in metrics for metrics in after] == [True, True, False, False]
        ends.append(weights(rest))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], value) for name, value in weights(whole).items())


def test_answers_that_serve_once_are_trained_on_as_if_nothing_were_kept(student_path, tmp_path):
    """With fresh answers PPO's ratio is 1: one step has the gradient of REINFORCE, up to the rounding of the two passes."""
    losses = {"kd": 0.0, "ce_teacher": 0.0, "tool_name": 0.0, "policy_gradient": 1.0}
    ends = []
    for every in (1, 2):
        config = make_config(student_path, loss=losses, rollouts=ROLLOUTS | {"every": every}, train={"learning_rate": 1e-4})
        trainer, _ = train(config, tmp_path / str(every), steps=1)
        ends.append(weights(trainer))
    assert max((ends[0][name] - ends[1][name]).abs().max() for name in ends[0]) < 2e-6


@pytest.mark.ray
def test_a_ranks_answers_depend_on_seed_and_step_and_pairs_are_asked_once(student_path, tmp_path, ray_cluster):
    config = make_config(student_path, loss={"policy_gradient": 1.0}, rollouts=ROLLOUTS | {"every": 2})
    made = []
    for _ in range(2):
        trainer = make_trainer(config, tmp_path, num_steps=6, teacher={})
        feed = make_feed(trainer, [])
        kept = rollouts_of(trainer, feed, [EOS])
        made.append([kept.rows(make_pairs(3), step) for step in (0, 2)])
    for one, other in zip(*made, strict=True):
        assert one.numbers == other.numbers
        assert one.numbers["rollouts"] == 3 * 2
        assert sorted(uid for batch in one.batches for uid in batch.uid.tolist()) == [0, 0, 1, 1, 2, 2]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one.batches, other.batches, strict=True))
        assert not any(batch.response_old_logprob.isnan().any() for batch in one.batches)
    assert [b.input_ids.tolist() for b in made[0][0].batches] != [b.input_ids.tolist() for b in made[0][1].batches]
    nothing = rollouts_of(trainer, feed, [EOS]).rows(make_pairs(3).slice(0, 0), 0)
    assert nothing.batches == []
    assert nothing.numbers == {"rollouts": 0.0, "reward": 0.0, "rollout_tokens": 0.0}


@pytest.mark.ray
def test_scores_come_from_ray_tasks_in_order_by_the_tier_of_the_sample_or_of_the_run(words, ray_cluster):
    _, config = words
    config = config.model_copy(update={"rollouts": RolloutConfig(caws=1.0, claims=0.0)})
    score = score_in_ray(config.model_copy(update={"loss": config.loss.model_copy(update={"caws_tier": 1})}))
    texts = ["Fine.", "", "<bot>Fine.", "<bot>a<eot> fine.", "<bot>a<eot> fine.", "But fine."]
    found = score(texts, [""] * 6, [0, 0, 0, 0, 2, 0])
    np.testing.assert_allclose(found.reward, np.exp([0, -1.5, -1.5, -0.5, 0, -0.15]))
    assert found.complete.tolist() == [False] * 6
    assert [part.shape for part in score([], [], [])] == [(0,)] * 3
