"""The student's own text: the same with and without cache, padding and neighbours; refinement that ends where it should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from raykd.config import StudentConfig
from raykd.student.generation import Generated, generate, halt_probabilities, refine
from raykd.student.heads import make_heads
from raykd.student.latent import LatentSpans
from raykd.student.model import Student, load_student
from tests.conftest import needs_gpu
from tests.student.test_model import SMALL, VOCAB, random_ids, save_tokenizer

EOS, AGAIN = 1, 2


def prompts(*lengths: int) -> list[np.ndarray]:
    return [random_ids(1, 12)[0, :length].numpy().astype(np.int32) for length in lengths]


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load(folder: Path) -> Student:
    return load_student(StudentConfig(model=str(folder)), seed=0)


def write(student: Student, given: list[np.ndarray], **options) -> list[Generated]:
    return generate(student, given, **{"max_tokens": 8, "temperature": 0.0, "seed": 0, "eos_ids": [EOS]} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save(Qwen3ForCausalLM(Qwen3Config(**SMALL)), tmp_path_factory.mktemp("qwen"))


def rope(kind: str, **options) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **options}, "max_position_embeddings": 64}


FAMILIES = {
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "qwen, sliding window": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "linear positions": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **rope("linear", factor=4.0))),
    "yarn": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=16))),
    "llama3 positions": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_conformance_2_decoding_with_the_cache_gives_the_log_probabilities_of_one_forward_pass(family, tmp_path):
    torch.manual_seed(0)
    student = load(save(FAMILIES[family](), tmp_path))
    given = prompts(1, 5, 12)
    for prompt, row in zip(given, write(student, given, temperature=1.5, eos_ids=[]), strict=True):
        assert len(row.ids) == 8
        ids = torch.from_numpy(np.concatenate([prompt, row.ids]).astype(np.int64))[None]
        with torch.no_grad():
            logits = student.eval()(ids).hidden @ student.head_weight.T
        expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(row.logprobs, expected.numpy(), atol=2e-4)


@torch.no_grad()
def test_conformance_1_changing_a_token_changes_no_logits_before_it_bit_for_bit(folder):
    student, ids = load(folder).eval(), random_ids(2, 9)
    student.heads = make_heads(student.hidden_size, {"halt": 1.0})

    def outputs(ids: torch.Tensor) -> torch.Tensor:
        output = student(ids, torch.arange(18))
        assert output.halt_logits is not None
        return torch.cat([output.hidden @ student.head_weight.T, output.halt_logits.view(2, 9, 2)], dim=-1)

    before = outputs(ids)
    for position in range(9):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = outputs(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_conformance_1_training_on_random_tokens_cannot_beat_chance(folder):
    student, generator = load(folder), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        ids = torch.randint(0, VOCAB, (8, 24), generator=generator)
        logits = student(ids).hidden @ student.head_weight.T
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) > math.log(VOCAB) - 0.02
    assert np.mean(losses[-20:]) < math.log(VOCAB) + 0.5  # it did learn that there is nothing to learn


def test_a_row_gets_the_same_alone_and_beside_longer_and_shorter_ones(folder):
    student, given = load(folder), prompts(3, 12, 1, 7)
    together = write(student, given)
    for prompt, row in zip(given, together, strict=True):
        alone = write(student, [prompt])[0]
        assert row.ids.tolist() == alone.ids.tolist()
        np.testing.assert_allclose(row.logprobs, alone.logprobs, atol=1e-4)


def test_greedy_text_is_that_of_transformers(folder):
    student, given = load(folder), prompts(6)
    expected = student.model.eval().generate(  # pyright: ignore[reportCallIssue]
        torch.from_numpy(given[0])[None].long(), max_new_tokens=8, do_sample=False, eos_token_id=EOS, pad_token_id=0
    )[0, 6:]
    assert write(student, given)[0].ids.tolist() == expected.tolist()


def test_each_row_ends_at_its_own_end_token(folder):
    student, given = load(folder), prompts(3, 12, 7)
    free = write(student, given, eos_ids=[])
    ends = [int(free[0].ids[2]), int(free[1].ids[5])]
    for row, stopped in zip(free, write(student, given, eos_ids=ends), strict=True):
        at = np.flatnonzero(np.isin(row.ids, ends))
        length = at[0] + 1 if len(at) else 8
        assert stopped.ids.tolist() == row.ids[:length].tolist()
        assert len(stopped.logprobs) == length
        assert stopped.ended == bool(len(at))
    assert not any(row.ended for row in free)


def test_samples_come_from_the_seed_alone(folder):
    student, given = load(folder), prompts(4, 9)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = write(student, given, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = write(student, given, temperature=1.0, seed=3), write(student, given, temperature=1.0, seed=4)
    assert [row.ids.tolist() for row in first] == [row.ids.tolist() for row in again]
    assert [row.ids.tolist() for row in first] != [row.ids.tolist() for row in other]


def test_samples_follow_the_students_distribution(folder):
    student = load(folder).eval()
    rows = write(student, prompts(5) * 4000, temperature=2.0, max_tokens=1)
    counts = np.bincount([row.ids[0] for row in rows], minlength=VOCAB) / 4000
    with torch.no_grad():
        logits = (student(torch.from_numpy(prompts(5)[0])[None].long()).hidden @ student.head_weight.T)[0, -1]
    np.testing.assert_allclose(counts, (logits / 2).softmax(-1).numpy(), atol=0.03)
    np.testing.assert_allclose(rows[0].logprobs, logits.log_softmax(-1)[rows[0].ids].numpy(), atol=1e-4)  # at temperature 1


def test_padding_rows_of_the_head_are_never_written(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(**SMALL)
    config.vocab_size = 2 * VOCAB
    student = load(save(Qwen3ForCausalLM(config), tmp_path))
    rows = write(student, prompts(2) * 50, temperature=100.0)
    assert max(row.ids.max() for row in rows) < VOCAB
    assert all(np.isfinite(row.logprobs).all() for row in rows)


def test_generating_leaves_the_student_as_it_was(folder):
    student = load(folder)
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    write(student, prompts(4))
    assert student.training
    assert student.model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def thinking(student: Student, given: list[np.ndarray], loops: int) -> LatentSpans:
    """Spans that open at what the student would write as its second token in the first row."""
    return LatentSpans(begin_id=int(write(student, given)[0].ids[1]), slot_id=VOCAB - 1, num_slots=3, loops=loops)


@pytest.mark.parametrize("loops", [0, 9])  # as many passes as slots: exactly what one by one gives
def test_what_follows_a_latent_span_is_what_training_sees_there(folder, loops):
    student, given = load(folder), prompts(6, 3)
    spans = student.latent = thinking(student, given, loops)
    first, other = write(student, given, max_tokens=12, eos_ids=[])
    assert first.ids[1:5].tolist() == [spans.begin_id] + [spans.slot_id] * 3
    for prompt, row in ((given[0], first), (given[1], other)):
        ids = torch.from_numpy(np.concatenate([prompt, row.ids]).astype(np.int64))[None]
        with torch.no_grad():
            logits = student.eval()(ids).hidden @ student.head_weight.T
        expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        is_slot = row.ids == spans.slot_id
        assert np.isnan(row.logprobs).tolist() == is_slot.tolist()
        np.testing.assert_allclose(row.logprobs[~is_slot], expected[~is_slot], atol=2e-4)


def test_spans_in_a_prompt_hold_the_states_that_they_held_when_they_were_written(folder):
    student, given = load(folder), prompts(6)
    student.latent = thinking(student, given, loops=9)
    (whole,) = write(student, given, max_tokens=12, eos_ids=[])
    longer = np.concatenate([given[0], whole.ids[:5]])  # up to the last slot
    continued = write(student, [longer, given[0]], max_tokens=7, eos_ids=[])[0]
    assert continued.ids.tolist() == whole.ids[5:].tolist()
    np.testing.assert_allclose(continued.logprobs, whole.logprobs[5:], atol=2e-4)


def test_edges_of_what_can_be_asked(folder):
    student = load(folder)
    assert write(student, []) == []
    assert len(write(student, prompts(3), max_tokens=0)[0].ids) == 0
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        write(student, [*prompts(3), np.empty(0, np.int32)])


DRAFT = 10  # draft k of the toy world is [DRAFT + k, EOS]
HALT_AFTER = {5: 1, 6: 2, 7: 3, 8: 99}  # by the prompt's last token: after so many drafts the head should halt


@pytest.fixture(scope="module")
def refiner(folder) -> Student:
    """Trained to write draft after draft, and to tell from the prompt when enough is enough."""
    student = load(folder)
    student.heads = make_heads(student.hidden_size, {"halt": 1.0})
    drafts = [token for k in range(4) for token in (DRAFT + k, EOS, AGAIN)][:-1]
    texts = [[4, 4, prompt, *drafts] for prompt in HALT_AFTER]
    ids = torch.tensor(texts)
    ends = torch.arange(4)[:, None] * ids.shape[1] + torch.tensor([4, 7, 10, 13])  # of each text its four EOS
    done = torch.arange(1, 5)
    targets = torch.cat([(done >= after).float() for after in HALT_AFTER.values()])
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(80):
        output = student(ids, ends.flatten())
        assert output.halt_logits is not None
        logits = output.hidden @ student.head_weight.T
        loss = functional.cross_entropy(logits[:, 2:-1].flatten(0, 1), ids[:, 3:].flatten())
        loss = loss + functional.cross_entropy(output.halt_logits, targets.long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def refined(student: Student, given: list[int], max_loops: list[int], **options):
    rows = [np.array([4] * (2 if index % 2 else 1) + [prompt], np.int32) for index, prompt in enumerate(given)]
    settings = {"halt_probability": 0.5, "max_tokens": 5, "temperature": 0.0, "seed": 0, "eos_ids": [EOS]} | options
    return refine(student, rows, continue_ids=np.array([AGAIN]), max_loops=max_loops, **settings)


def test_refinement_halts_where_the_head_was_trained_to(refiner):
    rows = refined(refiner, [5, 6, 7, 8], [4, 4, 4, 4])
    assert [len(row.drafts) for row in rows] == [1, 2, 3, 4]
    assert [row.halted for row in rows] == [True, True, True, False]
    for row in rows:
        assert [draft.tolist() for draft in row.drafts] == [[DRAFT + k, EOS] for k in range(len(row.drafts))]
        assert (row.halt_probability[:-1] < 0.5).all()
        assert len(row.halt_probability) == len(row.drafts)


def test_the_limit_on_loops_holds_for_every_row(refiner):
    rows = refined(refiner, [8, 8, 8, 5], [1, 2, 3, 2])
    assert [len(row.drafts) for row in rows] == [1, 2, 3, 1]
    assert [row.halted for row in rows] == [False, False, False, True]
    never = refined(refiner, [5, 6], [2, 4], halt_probability=1.0)
    assert [len(row.drafts) for row in never] == [2, 4]


def test_the_head_is_read_when_generating_as_it_is_in_training(refiner):
    row = refined(refiner, [7], [4])[0]
    text = np.concatenate([[4, 7], *(np.append(draft, AGAIN) for draft in row.drafts)])
    at = np.cumsum([2 + len(row.drafts[0]), *(1 + len(draft) for draft in row.drafts[1:])]) - 1
    with torch.no_grad():
        logits = refiner.eval()(torch.from_numpy(text)[None], torch.from_numpy(at)).halt_logits
    assert logits is not None
    np.testing.assert_allclose(row.halt_probability, logits.softmax(-1)[:, 1].numpy(), atol=1e-5)
    np.testing.assert_allclose(halt_probabilities(refiner, [text[: at[1] + 1]])[0], row.halt_probability[1], atol=1e-5)


def test_a_draft_that_is_cut_off_is_closed_before_the_head_is_read(refiner):
    row = refined(refiner, [8], [2], max_tokens=1)[0]
    assert [draft.tolist() for draft in row.drafts] == [[DRAFT, EOS], [DRAFT + 1, EOS]]


def test_refinement_without_a_halt_head_or_with_a_limit_of_none_is_refused(folder, refiner):
    with pytest.raises(ValueError, match="expected a halt head"):
        refined(load(folder), [5], [2])
    with pytest.raises(ValueError, match="expected a number from 1"):
        refined(refiner, [5], [0])


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@needs_gpu
def test_on_a_gpu_the_student_writes_what_it_writes_on_the_cpu_and_the_same_for_the_same_seed(folder):
    given = prompts(3, 7, 5)
    on_cpu, student = write(load(folder), given), load(folder).cuda()
    for found, expected in zip(write(student, given), on_cpu, strict=True):
        assert found.ids.tolist() == expected.ids.tolist()
        np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    sampled = [[row.ids.tolist() for row in write(student, given, temperature=1.0, seed=seed)] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
