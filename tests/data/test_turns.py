"""Turns of a sequence, by hand."""

from __future__ import annotations

import numpy as np

from raykd.data.turns import find_turns
from raykd.types import Mark

R, NAME, LATENT = int(Mark.RESPONSE), int(Mark.RESPONSE | Mark.TOOL_NAME), int(Mark.LATENT)


def turns_of(*sequences: list[int]):
    marks = np.array([mark for sequence in sequences for mark in sequence], np.uint16)
    return find_turns(marks, np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences]))


def test_every_run_of_response_tokens_is_a_turn():
    # A turn with a call, a tool result, an answer up to the end; then a sequence that is one answer.
    turns = turns_of([0, R, NAME, R, 0, R, R], [R, R, 0])
    assert turns.first.tolist() == [0, 3, 5]
    assert turns.has_call.tolist() == [True] * 3 + [False] * 4
    assert turns.index_in_turn.tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_a_latent_span_is_a_preamble_of_its_turn():
    turns = turns_of([0, R, LATENT, LATENT, R, R, NAME], [0, R, LATENT, R, 0, R, 0])
    # <bot> slot slot <eot> word name; then <bot> slot <eot> and nothing else, then a turn of one word.
    assert turns.index_in_turn.tolist() == [-1, -1, 0, 1, -1, -1, 0]
    assert turns.first.tolist() == [2, 6]
    assert turns.has_call.tolist() == [True] * 4 + [False] * 3


def test_without_response_tokens_there_are_no_turns():
    assert [len(part) for part in turns_of([0, 0], [0])] == [0, 0, 0]
    assert [len(part) for part in turns_of([])] == [0, 0, 0]
