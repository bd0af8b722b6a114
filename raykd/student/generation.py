"""The student writes: batched generation with a cache, and refinement that stops when the halt head says so.

In:  a Student and prompts of any lengths. Out: token ids with their log-probabilities; the drafts of a refinement.

Prompts are padded on the left, so that all rows write at the same column; the mask and the positions of each token are its
row's own, and what a row gets does not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from raykd.student.heads import HALT
from raykd.student.latent import fill_slots, next_embeddings
from raykd.student.model import Student


@dataclass(frozen=True)
class Generated:
    """What one row got."""

    ids: np.ndarray  # int32 [n], through the end-of-sequence token where it came
    logprobs: np.ndarray  # float32 [n] of those tokens under the student at temperature 1, nats; NaN at latent slots
    ended: bool  # by itself, and not by max_tokens


@dataclass(frozen=True)
class Refined:
    """The drafts of one prompt, of which the last is the answer."""

    drafts: list[np.ndarray]  # int32, each through its end-of-sequence token
    halt_probability: np.ndarray  # float32 [loops], the head's after each draft
    halted: bool  # by the head, and not (or not only) by the limit on loops


@torch.no_grad()
def generate(
    student: Student,
    prompt_ids: Sequence[np.ndarray],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    eos_ids: Sequence[int],
) -> list[Generated]:
    """Continue every prompt until it ends or has `max_tokens` more tokens. Dropout is off; no global random state moves.

    A row that opens a latent span gets its slots (`student.latent`) instead of tokens of its own choice, in continuous mode
    filled one by one with its last state; then it goes on.

    Args:
        prompt_ids: B arrays of at least one id.
        temperature: 0: the most likely token; else sampled, the same for the same `seed`.
        eos_ids: tokens that end a row.

    Errors: ValueError for an empty prompt.
    """
    empty = [row for row, prompt in enumerate(prompt_ids) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens, expected at least one: nothing predicts the first token")
    if not len(prompt_ids):
        return []
    device = student.head_weight.device
    ids, mask = _pad_left(prompt_ids, device)
    inputs = _prompt_inputs(student, prompt_ids, ids)
    ends = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    done = torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)
    slot_id = student.latent.slot_id if student.latent else None  # an input only: never written
    slots_due = torch.zeros(len(prompt_ids), dtype=torch.int64, device=device)
    written, logprobs, running, cache = [], [], [], None
    with _evaluating(student):
        for _ in range(max_tokens):
            num_new = 1 if cache is not None else ids.shape[1]
            output = student.model.base_model(
                **inputs,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -num_new:],
                past_key_values=cache,
                use_cache=True,
            )
            cache, last = output.past_key_values, output.last_hidden_state[:, -1]
            chosen, logprob = _choose(_logits(student, last), temperature, generator, slot_id)
            chosen, slots_due, is_slot = _think(student, chosen, slots_due)
            written.append(chosen)
            logprobs.append(logprob.masked_fill(is_slot, torch.nan))
            running.append(~done)
            done |= torch.isin(chosen, ends)
            if done.all():
                break
            inputs = _next_inputs(student, chosen, is_slot, last)
            mask = functional.pad(mask, (0, 1), value=1)
    if not written:
        return [Generated(np.empty(0, np.int32), np.empty(0, np.float32), ended=False) for _ in prompt_ids]
    return _by_row(torch.stack(written, 1), torch.stack(logprobs, 1), torch.stack(running).sum(0), done)


def _by_row(ids: Tensor, logprobs: Tensor, lengths: Tensor, done: Tensor) -> list[Generated]:
    """What each row wrote: the first `lengths` [B] of ids and log-probabilities [B, n]."""
    rows = zip(ids.int().cpu().numpy(), logprobs.cpu().numpy(), lengths.tolist(), done.tolist(), strict=True)
    return [Generated(row_ids[:length], row_logprobs[:length], ended) for row_ids, row_logprobs, length, ended in rows]


def _prompt_inputs(student: Student, prompt_ids: Sequence[np.ndarray], ids: Tensor) -> dict[str, Tensor]:
    """What the model gets for the prompts [B, P], padded on the left; slots in them hold the student's states."""
    if student.latent is None or not student.latent.loops or not (ids == student.latent.slot_id).any():
        return {"input_ids": ids}
    embeddings = student.model.get_input_embeddings()(ids)
    with _evaluating(student):
        for row, prompt in enumerate(prompt_ids):
            own = ids[row : row + 1, -len(prompt) :]
            is_slot = own == student.latent.slot_id
            embeddings[row, -len(prompt) :] = fill_slots(student.model, own, is_slot, loops=student.latent.loops)[0]
    return {"inputs_embeds": embeddings}


def _think(student: Student, chosen: Tensor, slots_due: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens [B] with slots where a latent span wants them; slots [B] that are due now; which tokens [B] are slots."""
    if student.latent is None:
        return chosen, slots_due, torch.zeros_like(chosen, dtype=torch.bool)
    is_slot = slots_due > 0
    chosen = torch.where(is_slot, student.latent.slot_id, chosen)
    opened = (chosen == student.latent.begin_id).long() * student.latent.num_slots
    return chosen, torch.where(is_slot, slots_due - 1, opened), is_slot


def _next_inputs(student: Student, chosen: Tensor, is_slot: Tensor, last_hidden: Tensor) -> dict[str, Tensor]:
    if student.latent is None or not student.latent.loops:
        return {"input_ids": chosen[:, None]}
    return {"inputs_embeds": next_embeddings(student.model, chosen, is_slot, last_hidden)}


def _pad_left(prompt_ids: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, P] with zeros on the left, and which of them are tokens, int64 [B, P]."""
    width = max(len(prompt) for prompt in prompt_ids)
    ids = np.zeros((len(prompt_ids), width), np.int64)
    mask = np.arange(width) >= width - np.array([len(prompt) for prompt in prompt_ids])[:, None]
    ids[mask] = np.concatenate(prompt_ids)
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask.astype(np.int64)).to(device)


def _logits(student: Student, hidden: Tensor) -> Tensor:
    """Logits [B, V] float32 of hidden states [B, H]; ids that the tokenizer lacks have none."""
    logits = functional.linear(hidden, student.head_weight, student.head_bias).float()
    logits[:, student.num_valid_ids :] = -torch.inf
    return logits


def _choose(
    logits: Tensor, temperature: float, generator: torch.Generator, never: int | None = None
) -> tuple[Tensor, Tensor]:
    """The next ids [B], and their log-probabilities [B] at temperature 1; the id `never` is left out of the choice alone."""
    choice = logits.clone()
    if never is not None:
        choice[:, never] = -torch.inf
    if temperature == 0:
        chosen = choice.argmax(-1)
    else:
        chosen = torch.multinomial((choice / temperature).softmax(-1), 1, generator=generator)[:, 0]
    return chosen, logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]


@contextlib.contextmanager
def _evaluating(student: Student) -> Iterator[None]:
    """Within: no dropout and no gradient checkpointing, which would do without the cache."""
    training = student.training
    student.eval()
    try:
        yield
    finally:
        student.train(training)


def refine(
    student: Student,
    prompt_ids: Sequence[np.ndarray],
    *,
    continue_ids: np.ndarray,
    max_loops: Sequence[int],
    halt_probability: float,
    max_tokens: int,
    temperature: float,
    seed: int,
    eos_ids: Sequence[int],
) -> list[Refined]:
    """Answer every prompt in drafts: after each, read the halt head at its last token; halt, or ask for another.

    A draft that `max_tokens` cuts off is closed with the first of `eos_ids`, for the head has learned to decide there.

    Args:
        prompt_ids: B arrays of at least one id.
        continue_ids: what stands between two drafts in the training data, such as a wish for a better answer and the
            header of the next turn.
        max_loops: [B] drafts at most, at least 1 (data/halt_targets.py, `loop_caps`).
        halt_probability: the head must give at least this much.
        max_tokens: of one draft.
        temperature, seed, eos_ids: see `generate`.

    Errors: ValueError when the student has no halt head, or a limit is below 1.
    """
    if HALT not in student.heads:
        raise ValueError(
            f"the student has the heads {sorted(student.heads)}, expected a halt head: train it with loss.halt > 0"
        )
    if len(max_loops) != len(prompt_ids) or any(limit < 1 for limit in max_loops):
        raise ValueError(f"max_loops is {list(max_loops)}, expected a number from 1 for each of {len(prompt_ids)} prompts")
    texts = [np.asarray(prompt, np.int32) for prompt in prompt_ids]
    drafts: list[list[np.ndarray]] = [[] for _ in texts]
    given: list[list[float]] = [[] for _ in texts]
    going, loop = list(range(len(texts))), 0
    while going:
        written = generate(
            student,
            [texts[row] for row in going],
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed * 1_000_003 + loop,  # every loop draws anew
            eos_ids=eos_ids,
        )
        for row, draft in zip(going, written, strict=True):
            drafts[row].append(draft.ids if draft.ended else np.append(draft.ids, np.int32(eos_ids[0])))
            texts[row] = np.concatenate([texts[row], drafts[row][-1]])
        for row, probability in zip(going, halt_probabilities(student, [texts[row] for row in going]), strict=True):
            given[row].append(float(probability))
        loop += 1
        going = [row for row in going if given[row][-1] < halt_probability and loop < max_loops[row]]
        for row in going:
            texts[row] = np.concatenate([texts[row], continue_ids.astype(np.int32)])
    return [
        Refined(row_drafts, np.array(row_given, np.float32), halted=row_given[-1] >= halt_probability)
        for row_drafts, row_given in zip(drafts, given, strict=True)
    ]


@torch.no_grad()
def halt_probabilities(student: Student, texts: Sequence[np.ndarray]) -> np.ndarray:
    """The halt head's probability [B] at the last token of every text, through the very forward pass of training."""
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((len(texts), lengths.max()), np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(texts)
    last = np.arange(len(texts)) * ids.shape[1] + lengths - 1
    device = student.head_weight.device
    with _evaluating(student):
        output = student(torch.from_numpy(ids).to(device), decision_index=torch.from_numpy(last).to(device))
    assert output.halt_logits is not None, "the student has no halt head"
    return output.halt_logits.softmax(-1)[:, 1].cpu().numpy()
