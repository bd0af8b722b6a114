"""The one pass over a chunk's logits on a GPU, between the GEMM that makes them and the two that use their gradient.

In:  logits [c, V] float32, ids and support [c, C]. Out: logits of the ids, the tail's log-sum-exp, and the tail's softmax
up to a factor of the row, in the dtype of the GEMMs.

Imported by losses/head.py for CUDA tensors alone. The pass costs what memory costs, 4 bytes a logit read and 2 written. That
one is enough: exp(logit - reference) needs no more than some logit of the row as reference, not the largest; what makes it a
softmax is left to the caller, with whatever else the row is to be multiplied by.
Source: ours; after the online softmax of Milakov & Gimelshein (2018).
"""

# Triton's language is not Python: what its operators take is not what their types say.
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # 16 values for each of 256 threads: loads of 16 bytes
_WARPS = 8


class Tail(NamedTuple):
    """What a row of logits is for a loss that looks at the ids and at the mass of all ids outside the support."""

    selected: Tensor  # [c, C] float32, logits of the ids
    owner: Tensor  # [c, C] bool; of the support columns that name the same id, one
    total: Tensor  # [c] log-sum-exp of the logits outside the support; -inf where nothing is outside
    top: Tensor  # [c] the largest of them
    factor: Tensor  # [c] weights times factor are their softmax


def split_tail(logits: Tensor, ids: Tensor, support: Tensor, weights: Tensor) -> Tail:
    """Separate the tail from the ids, in one pass.

    Args:
        logits: [c, V] float32; overwritten by -inf on the support.
        ids: [c, C] int64.
        support: [c, C] bool.
        weights: [c, V], written: positive, up to e^20, and 0 on the support.
    """
    (num_rows, vocab_size), num_ids = logits.shape, ids.shape[1]
    selected = logits.new_empty(num_rows, num_ids, dtype=torch.float32)
    owner = torch.empty_like(support, memory_format=torch.contiguous_format)
    total, top, factor = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    if num_rows:
        launch: Any = _split_kernel[(num_rows,)]  # whose stub does not know launch options
        inputs = logits, ids.contiguous(), support.contiguous().view(torch.uint8)
        outputs = weights, selected, owner.view(torch.uint8), total, top, factor
        sizes = logits.stride(0), weights.stride(0), num_ids, vocab_size
        with torch.cuda.device_of(logits):
            launch(*inputs, *outputs, *sizes, triton.next_power_of_2(max(1, num_ids)), BLOCK=_BLOCK, num_warps=_WARPS)
    return Tail(selected, owner, total, top, factor)


@triton.jit
def _split_kernel(
    logits, ids, support, weights, selected, owner, total_out, top_out, factor_out,
    stride, weights_stride, num_ids, vocab_size, IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program has one row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    weights += row * weights_stride
    column = tl.arange(0, IDS)
    inside, at = column < num_ids, row * num_ids + column
    place = logits + tl.load(ids + at, mask=inside, other=0)
    in_support = tl.load(support + at, mask=inside, other=0) != 0
    tl.store(selected + at, tl.load(place, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()  # threads see each other's writes behind one
    tl.store(place, column.to(tl.float32), mask=in_support)  # every support column signs its place
    tl.debug_barrier()
    signature = tl.load(place, mask=in_support, other=-1.0)  # and the one whose signature is left is the owner
    tl.store(owner + at, (signature == column.to(tl.float32)).to(tl.uint8), mask=inside)
    tl.debug_barrier()
    tl.store(place, tl.full((IDS,), float("-inf"), tl.float32), mask=in_support)
    tl.debug_barrier()

    block = tl.arange(0, BLOCK)
    first = tl.load(logits + block, mask=block < vocab_size, other=float("-inf")).to(tl.float32)
    reference = tl.max(first, axis=0)
    top, total = _sweep(logits, weights, reference, vocab_size, BLOCK)
    if top > reference + 20.0:  # hardly ever: the first block of the vocabulary is far below the rest
        reference = top
        top, total = _sweep(logits, weights, reference, vocab_size, BLOCK)
    tl.store(total_out + row, tl.where(total == 0.0, float("-inf"), reference + tl.log(total)))
    tl.store(top_out + row, top)
    tl.store(factor_out + row, tl.where(total == 0.0, 0.0, 1.0 / total))


@triton.jit
def _sweep(logits, weights, reference, vocab_size, BLOCK: tl.constexpr):
    """Write exp(logits - reference); -> the largest logit, the sum of what was written."""
    base = tl.where(reference == float("-inf"), 0.0, reference)  # -inf - -inf would be NaN
    block = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + block < vocab_size
        x = tl.load(logits + start + block, mask=inside, other=float("-inf")).to(tl.float32)
        value = tl.exp(x - base)
        tl.store(weights + start + block, value.to(weights.dtype.element_ty), mask=inside)
        tops, totals = tl.maximum(tops, x), totals + value
    return tl.max(tops, axis=0), tl.sum(totals, axis=0)
