"""Log-probabilities of vLLM as arrays: kept as its engine made them, or read from its public flat lists.

In:  what an engine step has for one request, or what vLLM makes of it.
Out: pieces (ids [n, C], logprobs [n, C]) in the order of the tokens.

Shape letters: P prompt tokens, C = K + 1 columns (the sampled token in front).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from vllm.logprobs import FlatLogprobs
from vllm.v1.engine import EngineCoreOutput


class KeptArrays:
    """Stands in for vLLM's LogprobsProcessor of one request and keeps the arrays it would turn into lists.

    vLLM's own costs 12 microseconds a token at K = 64, this one a list append. It has the attributes that the output
    processor reads of a request that wants its final output only; checked at start by VllmEngine.
    """

    cumulative_logprob = None
    prompt_token_id_logprobs = None

    def __init__(self) -> None:
        self.logprobs: list[tuple[np.ndarray, np.ndarray]] = []  # (ids, logprobs), each [tokens of a step, C]
        self.prompt_logprobs: list[tuple[np.ndarray, np.ndarray]] = []  # (ids, logprobs), each [P - 1, C]

    def update_from_output(self, output: EngineCoreOutput) -> None:
        """Take what one engine step has for this request."""
        if output.new_logprobs is not None:
            ids, logprobs, *_ = output.new_logprobs
            self.logprobs.append((ids, logprobs))
        if output.new_prompt_logprobs_tensors is not None:
            ids, logprobs, *_ = output.new_prompt_logprobs_tensors
            self.prompt_logprobs.append((ids.numpy(), logprobs.numpy()))


def pieces_of(logprobs: object, num_rows: int, top_k: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """What a request's log-probabilities are as arrays (ids [n, C], logprobs [n, C]), num_rows rows in all.

    An engine step has as many columns as the request in it that asks for the most: those beyond `top_k` are cut off.
    """
    if not isinstance(logprobs, FlatLogprobs):
        assert isinstance(logprobs, list), f"expected kept arrays, found {type(logprobs).__name__}"
        return [(ids[:, : top_k + 1], values[:, : top_k + 1]) for ids, values in logprobs]
    ids = np.array(logprobs.token_ids, np.int32).reshape(num_rows, -1)
    return ((ids, np.array(logprobs.logprobs, np.float32).reshape(num_rows, -1)),)
