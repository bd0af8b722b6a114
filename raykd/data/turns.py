"""The assistant's turns of a sequence: where each begins, and each response token within its turn.

In:  marks of the tokens of one or more sequences, end to end. Out: `Turns`, an entry per response token.

A turn is a run of response tokens; latent slots do not end it, and a latent span is a preamble of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raykd.types import Mark


class Turns(NamedTuple):
    """Turns, on the axis of the N response tokens."""

    first: np.ndarray  # int64 [F] first token of each turn that is no sentinel
    has_call: np.ndarray  # bool [N] the token's turn holds a tool call
    index_in_turn: np.ndarray  # int64 [N] 0 at the first token; -1 at <bot> and <eot>, which surround latent slots


def find_turns(marks: np.ndarray, sequence: np.ndarray) -> Turns:
    """Turns of the tokens with these marks [T] (bits of Mark); `sequence` [T] differs between neighbouring sequences."""
    is_response = (marks & Mark.RESPONSE) != 0
    is_latent = (marks & Mark.LATENT) != 0
    goes_on = np.zeros(len(marks), dtype=bool)  # the token before belongs to the same sequence
    goes_on[1:] = sequence[1:] == sequence[:-1]
    before_is = np.zeros((2, len(marks)), dtype=bool)  # response, latent
    before_is[:, 1:] = np.stack([is_response, is_latent])[:, :-1]
    before_is &= goes_on
    after_is_latent = np.zeros(len(marks), dtype=bool)
    after_is_latent[:-1] = is_latent[1:] & goes_on[1:]

    begins = ~(before_is[0] | before_is[1])[is_response]
    turn = np.cumsum(begins) - 1  # of each response token
    calls = np.bincount(turn[(marks[is_response] & Mark.TOOL_NAME) != 0], minlength=int(begins.sum()))
    spoken = ~(before_is[1] | after_is_latent)[is_response]
    spoken_before = np.cumsum(spoken) - spoken
    index_in_turn = np.where(spoken, spoken_before - spoken_before[begins][turn], -1)
    return Turns(np.flatnonzero(index_in_turn == 0), calls[turn] > 0, index_in_turn)
