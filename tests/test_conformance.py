"""What every implementation of this idea must pass: fifteen checks, each in short on the real code.

3, 11, 12 and 14 are in test_conformance_inputs.py.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from raykd.config import StudentConfig
from raykd.data.collate import collate_kd_batch
from raykd.data.examples import build_examples
from raykd.evaluate import main as evaluate
from raykd.loss_config import LOSSES, LossConfig
from raykd.losses.combine import combine, loss_counts
from raykd.losses.combined import IGNORE, combined_kd_loss
from raykd.losses.context import Head
from raykd.losses.kd import dense_kd_loss, sparse_kd_loss
from raykd.losses.scored import leave_one_out_advantages, policy_gradient_loss
from raykd.student.generation import generate
from raykd.student.latent import fill_slots, next_embeddings
from raykd.student.model import Student, load_student
from raykd.student.tokenizer import migrate
from raykd.training.checkpoint import STUDENT, CheckpointError, latest_checkpoint
from raykd.training.trainer import make_trainer
from raykd.types import Batch
from teacher_serving.config import SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from tests.conftest import DEMO_TEACHER
from tests.data.test_examples import table
from tests.losses import test_all_losses as every_loss
from tests.losses.test_loss_properties import BARE, directional_derivatives
from tests.student.test_model import SMALL, save_tokenizer
from tests.training.tiny_run import VOCAB, make_config, make_feed, make_rows, run, run_on_two_ranks, save_student, weights


@pytest.fixture(scope="module")
def student_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    save_student(path)
    return path


@pytest.fixture(scope="module")
def demo_student() -> Student:
    return load_student(StudentConfig(model=str(DEMO_TEACHER)), seed=0).eval()


def losses_of(logged: list[tuple[int, dict[str, float]]]) -> list[float]:
    return [metrics["loss/total"] for _, metrics in logged if "loss/total" in metrics]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


# --- 1 causality ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_conformance_01_causality_a_token_changes_no_logits_before_it_bit_for_bit(demo_student):
    ids = torch.randint(0, demo_student.num_valid_ids, (1, 12), generator=torch.Generator().manual_seed(0))
    before = demo_student(ids).hidden @ demo_student.head_weight.T
    for position in range(12):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % demo_student.num_valid_ids
        after = demo_student(changed).hidden @ demo_student.head_weight.T
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def test_conformance_01_causality_training_on_random_tokens_cannot_beat_ln_v(student_path, tmp_path):
    ce_alone = {"kd": 0.0, "tool_name": 0.0, "ce_teacher": 1.0}
    config = make_config(student_path, loss=ce_alone, train={"learning_rate": 3e-3})
    _, logged = run(config, tmp_path, [make_rows(8, seed=seed, lengths=(4, 40)) for seed in range(60)], num_steps=60)
    assert np.mean(losses_of(logged)[-20:]) > math.log(VOCAB) - 0.02


# --- 2 prefill = decode ---------------------------------------------------------------------------------------------------

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def rope_student(kind: str, folder: Path) -> Student:
    torch.manual_seed(0)
    rope = {"rope_theta": 10_000.0, **ROPES[kind]}
    LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=rope, max_position_embeddings=64)).save_pretrained(folder)
    save_tokenizer(folder)
    return load_student(StudentConfig(model=str(folder)), seed=0).eval()


@pytest.mark.parametrize("kind", ROPES)
def test_conformance_02_prefill_and_cached_decoding_agree_for_every_rope(kind, tmp_path):
    """At all lengths up to the model's positions, which is what a run may use (training/preflight.py)."""
    student = rope_student(kind, tmp_path)
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (1, 7, 24)]
    written = generate(student, prompts, max_tokens=40, temperature=1.5, seed=0, eos_ids=[])
    for prompt, row in zip(prompts, written, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, row.ids]).astype(np.int64))[None]
        with torch.no_grad():
            logprobs = (student(ids).hidden @ student.head_weight.T)[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert len(row.ids) == 40
        np.testing.assert_allclose(row.logprobs, expected.numpy(), atol=2e-4)


@torch.no_grad()
def test_conformance_02_latent_slots_filled_at_once_and_one_by_one_with_a_cache_agree(tmp_path):
    model = rope_student("default", tmp_path).model
    ids = torch.tensor([[5, 6, 7, 9, 9, 9, 8, 4]])
    is_slot = ids == 9
    together = model.base_model(inputs_embeds=fill_slots(model, ids, is_slot, loops=3), use_cache=False).last_hidden_state
    cache, last, states = DynamicCache(), torch.zeros(1, SMALL["hidden_size"]), []
    for column in range(ids.shape[1]):
        embeddings = next_embeddings(model, ids[:, column], is_slot[:, column], last)
        last = model.base_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        states.append(last)
    torch.testing.assert_close(torch.stack(states, dim=1), together, atol=1e-4, rtol=1e-4)


# --- 4 padding, 5 accumulation --------------------------------------------------------------------------------------------


def loss_and_gradients(student: Student, batches: list[Batch], losses: LossConfig) -> tuple[float, dict[str, Tensor]]:
    student.zero_grad()
    counted = [loss_counts(batch, losses) for batch in batches]
    counts = {name: torch.stack([count[name] for count in counted]).sum() for name in losses.weights}
    total = 0.0
    for batch in batches:
        head = Head(student.head_weight, student.head_bias, student.num_valid_ids)
        report = combine(batch, student(batch.input_ids), head, losses, counts)
        report.total.backward()
        total += report.total.item()
    return total, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_conformance_04_padding_and_batching_change_neither_loss_nor_gradients(student_path):
    student = load_student(StudentConfig(model=str(student_path)), seed=0)
    rows, losses = make_rows(6, lengths=(4, 30)), LossConfig(kd=1.0, ce_teacher=0.5, tool_name=0.3)
    whole = collate_kd_batch(rows, pad_id=0)
    loss, gradients = loss_and_gradients(student, [whole], losses)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    alone = [collate_kd_batch(rows.slice(row, 1), pad_id=0) for row in range(6)]
    filled = replace(whole, input_ids=whole.input_ids.masked_fill(~whole.attention_mask, 7))
    for batches in (alone, [collate_kd_batch(rows.take([5, 3, 1]), 0), collate_kd_batch(rows.take([0, 2, 4]), 0)], [filled]):
        other, others = loss_and_gradients(student, batches, losses)
        assert other == pytest.approx(loss, rel=1e-5)
        assert largest_difference(gradients, others) <= 1e-6


def test_conformance_05_accumulation_micro_batches_and_ranks_give_the_same_parameters_and_learning_rates(
    student_path, tmp_path
):
    train = {"learning_rate": 1e-4, "warmup_steps": 2}
    whole = make_config(student_path, train=train)
    pieces = make_config(student_path, train=train | {"max_tokens_per_micro_batch": 24})
    a, b = make_rows(4), make_rows(4, seed=1)
    one, logged = run(whole, tmp_path / "one", [pa.concat_tables([a, b])])
    many, many_logged = run(pieces, tmp_path / "many", [pa.concat_tables([a, b])])
    assert len(make_feed(many, [pa.concat_tables([a, b])]).next_step().batches) >= 4
    two, two_logged = run_on_two_ranks(pieces, tmp_path / "two", [[a], [b]])
    assert largest_difference(weights(one), weights(many)) <= 1e-6
    assert largest_difference(weights(one), two) <= 1e-6
    assert all(parameter.grad is None for parameter in many.student.parameters())
    rates = [[metrics["learning_rate"] for _, metrics in log] for log in (logged, many_logged, two_logged)]
    assert rates[0] == rates[1] == rates[2]


# --- 6 gradients, 7 empty masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_conformance_06_gradient_of_every_loss_exists_and_is_that_of_finite_differences(name):
    by_autograd, by_differences = directional_derivatives(every_loss.alone(name))
    assert abs(by_autograd) > 1e-5
    assert by_differences == pytest.approx(by_autograd, rel=1e-4)


def test_conformance_06_gradient_of_a_reward_is_reinforce_with_a_leave_one_out_baseline():
    advantage = leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.5]]))[0]
    logits = torch.zeros(3, 2, requires_grad=True)  # three samples of one token, each the first of two
    policy_gradient_loss(logits.log_softmax(dim=1)[:, 0], advantage).mean().backward()
    assert advantage.tolist() == [0.75, -0.75, 0.0]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 0], -advantage * (1 - 0.5) / 3)


def test_conformance_07_empty_masks_give_exactly_0_and_any_mixture_of_optional_fields_trains():
    full = every_loss.make_examples()
    for name in LOSSES:
        [report], gradients = every_loss.run([[BARE]], every_loss.alone(name))
        if name != "caws_compliance":  # its rules hold for all text
            assert report.total == 0
            assert all((gradient == 0).all() for gradient in gradients.values())
    for groups in ([[BARE], full], [[*full, BARE]], [full[:1], [BARE, *full[1:]]]):
        reports, gradients = every_loss.run(groups, every_loss.EVERYTHING)
        assert all(report.total.isfinite() for report in reports)
        assert all(gradient.isfinite().all() for gradient in gradients.values())


# --- 8 temperature, 9 vocabulary ------------------------------------------------------------------------------------------


def test_conformance_08_temperature_keeps_the_size_of_the_gradient_and_the_tail_bucket_bounds_the_kl():
    generator = torch.Generator().manual_seed(0)
    teacher, start = (torch.randn(8, 32, generator=generator) for _ in range(2))
    sizes = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        student = start.clone().requires_grad_()
        dense_kd_loss(student, teacher, torch.ones(8), temperature=temperature).mean().backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert max(sizes) < 2 * min(sizes)  # without temperature squared: 64 times
    p, q = teacher.log_softmax(1), start.log_softmax(1)
    full, order = dense_kd_loss(start, teacher, torch.ones(8)).sum, p.argsort(1, descending=True)

    def with_tail(k: int) -> float:
        q_tail, p_tail = (x.gather(1, order[:, k:]).logsumexp(1) for x in (q, p))
        inside = order[:, :k]
        return sparse_kd_loss(q.gather(1, inside), q_tail, p.gather(1, inside), p_tail, torch.ones(8)).sum.item()

    bounds = [with_tail(k) for k in (1, 4, 16, 31, 32)]
    assert all(one <= other + 1e-5 for one, other in zip(bounds, [*bounds[1:], full.item()], strict=True))
    assert bounds[-1] == pytest.approx(full.item(), rel=1e-5)


def test_conformance_09_vocabulary_ids_beyond_it_fail_loudly_and_the_ignored_label_stays(demo_tokenizer, demo_student):
    size = len(demo_tokenizer)
    rejected = build_examples(table([([5, size], [], None)]), demo_tokenizer).rejected
    assert f"holds id {size}" in rejected["reason"][0].as_py()
    with pytest.raises(IndexError):
        demo_student(torch.tensor([[1, demo_student.head_weight.shape[0]]]))
    logits, labels = torch.randn(1, 4, 6), torch.tensor([[1, IGNORE, 2, IGNORE]])
    one = combined_kd_loss(logits, labels, {"ce_teacher": 1.0})["total"]
    assert labels.tolist() == [[1, IGNORE, 2, IGNORE]]
    torch.testing.assert_close(one, -logits[0, 1].log_softmax(0)[2])


def test_conformance_09_vocabulary_sentinels_get_rows_of_their_own_once_and_ties_are_kept(demo_tokenizer):
    student, tokenizer = load_student(StudentConfig(model=str(DEMO_TEACHER)), seed=0), copy.deepcopy(demo_tokenizer)
    model, before = student.model, student.head_weight.detach().clone()
    sentinels = {"<bot>": "start of thought", "<eot>": ""}
    first = migrate(model, tokenizer, sentinels)
    rows = student.head_weight.detach().clone()
    again = migrate(model, tokenizer, sentinels)
    assert first.token_ids == again.token_ids
    assert len(set(first.token_ids.values())) == 2
    assert min(first.token_ids.values()) >= len(demo_tokenizer)
    assert not torch.equal(*(rows[index] for index in first.token_ids.values()))
    assert again.initialised == ()
    assert torch.equal(student.head_weight, rows)
    assert torch.equal(rows[: len(demo_tokenizer)], before[: len(demo_tokenizer)])
    tied = load_student(StudentConfig(model=str(DEMO_TEACHER)), seed=0).model.config.tie_word_embeddings
    assert (student.head_weight is model.get_input_embeddings().weight) == tied


# --- 10 resume, 15 stages -------------------------------------------------------------------------------------------------


def test_conformance_10_resume_an_interrupted_run_ends_as_the_uninterrupted_one(student_path, tmp_path):
    """Parameters, order, random numbers (dropout) and schedules; lost workers and teachers: tests/e2e and test_train.py."""
    folder = tmp_path / "student"
    load_student(StudentConfig(model=str(student_path)), seed=0).save(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.2}))
    weight = {"kind": "linear", "start": 1.0, "end": 0.2, "over": 5}
    config = make_config(folder, loss={"schedules": {"kd": weight}}, train={"warmup_steps": 2})
    whole, logged = run(config, tmp_path / "whole", [make_rows(48)])
    asked = iter([False, False, False, True])
    _, first = run(config, tmp_path / "parts", [make_rows(48)], stop=lambda: next(asked))
    rest, second = run(config, tmp_path / "parts", [make_rows(48)])
    assert largest_difference(weights(rest), weights(whole)) == 0
    assert losses_of(first) + losses_of(second) == losses_of(logged)
    assert [m["learning_rate"] for _, m in first + second] == [m["learning_rate"] for _, m in logged]
    assert rest.progress == whole.progress
    assert np.array_equal(rest.consumed, whole.consumed)


def test_conformance_15_stages_the_next_one_starts_from_exactly_the_artifact_named_and_never_from_a_changed_one(
    student_path, tmp_path, tiny_model_path
):
    config = make_config(student_path)
    first, _ = run(config, tmp_path / "kd", [make_rows(8)])
    checkpoint = latest_checkpoint(tmp_path / "kd")
    assert checkpoint is not None
    following = make_trainer(make_config(checkpoint / STUDENT), tmp_path / "process", num_steps=5, teacher={})
    assert largest_difference(weights(following), weights(first)) == 0
    artifact = checkpoint / STUDENT / "model.safetensors"
    data = bytearray(artifact.read_bytes())
    data[-3] ^= 1
    artifact.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"student/model\.safetensors has other contents .*sha256"):
        run(config, tmp_path / "kd", [make_rows(8)])
    judged = ["run.name=kd", f"run.dir={tmp_path}", "teacher.kind=hf", f"teacher.model={tiny_model_path}"]
    with pytest.raises(CheckpointError, match="sha256"):
        evaluate(["--config", *judged, f"student.model={student_path}", "data.prompts=none"])


# --- 13 quantisation ------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_conformance_13_a_saved_student_served_by_the_inference_engine_has_the_logits_of_training(tiny_model_path, tmp_path):
    """The float half of the check; loss and logits under INT8 fake quantisation follow with the quantised student."""
    student = load_student(StudentConfig(model=str(tiny_model_path)), seed=0)
    with torch.no_grad():
        for parameter in student.parameters():  # as after training: no longer what the folder holds
            parameter.mul_(1.05)
    student.save(tmp_path / "student")
    random = np.random.default_rng(0)
    ids = [random.integers(0, student.num_valid_ids, length).astype(np.int32) for length in (9, 30)]
    engine = connect(
        VllmTeacherConfig(
            model=str(tmp_path / "student"), dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4, top_k=8,
            kv_cache_memory_bytes=64 << 20, sampling=SamplingConfig(max_tokens=4),
        )
    )  # fmt: skip
    given = pa.table({"uid": [0, 1], "prompt_ids": [row[:4] for row in ids], "output_ids": [row[4:] for row in ids]})
    scored = engine.score(given)
    engine.close()
    for row, served in zip(ids, scored["sampled_logprob"], strict=True):
        whole = torch.from_numpy(row.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = (student.eval()(whole).hidden @ student.head_weight.T)[0, 3:-1].log_softmax(-1)
        expected = logprobs.gather(1, whole[0, 4:, None])[:, 0]
        np.testing.assert_allclose(served.values.to_numpy(), expected.numpy(), atol=1e-3)
