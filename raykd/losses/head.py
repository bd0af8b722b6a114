"""The LM head and the softmax as one operation, for losses that look at a few ids of each row and at the mass of the rest.

In:  hidden states [N, H], the head's weight [V, H], C ids per row.
Out: log-probabilities of those ids, log of the mass outside the support, and gradients by a hand-written backward.

The logits exist for one chunk of rows at a time, never as [N, V]. Per chunk: one GEMM; gather the C logits; overwrite the
support with -inf; the softmax of what is left is the tail, free of the cancellation of 1 - sum(q), and the same buffer then
becomes the gradient: tail softmax times dL/d(log tail), plus dL/d(logit) at the C ids. On a GPU all that the GEMMs leave to
do is one pass over the logits (head_triton.py). Two executions share all of this:

* `head_loss`: the loss is a closure run on each chunk, whose gradient is taken at once (3 GEMMs). Training uses it.
* `head_logprobs`: plain autograd function; logits are recomputed in backward (4 GEMMs). Any later loss may follow.

Source: ours; gradient-in-forward after Liger Kernel's fused linear cross-entropy (Hsu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_CHUNK_ROWS = 320  # smaller chunks repeat the packing of the weight in every GEMM, larger ones cost memory for little
_CUDA_MIN_CHUNK_ROWS = 2048  # adding a chunk's dW costs 245/rows of its GEMM time
_CUDA_CHUNK_ELEMENTS = 4_300_000  # rows * H that fill 132 SMs with 128x256 tiles of dX
_MAX_CHUNK_BYTES = 5 << 28  # 1.25 GiB of float32 logits
_KERNEL_CHUNK_BYTES = 5 << 28  # with a kernel: of the logits' gradient, in the dtype of the GEMMs
_KERNEL_LOGITS_ROWS = 512  # and so many rows of it at a time as logits
_KERNEL_LOGITS_DTYPE = torch.float32  # bfloat16 would round a logit of 20 by up to 0.06
_LEAST_FACTOR = 1e-32


class HeadRows(NamedTuple):
    """What a loss sees of the rows [rows.start, rows.stop): c of them."""

    logprobs: Tensor  # [c, C] log q(ids) under the full softmax
    log_tail: Tensor  # [c] log of the student's mass outside the support; -inf where nothing is outside
    top_logprob: Tensor  # [c] log-probability of the student's most likely id; no graph
    rows: slice


RowsLoss = Callable[[HeadRows], tuple[Tensor, Tensor]]
"""Chunk -> (its share of the loss: scalar with graph, statistics: 1-D tensor without graph, added up over chunks)."""


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    support: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    num_valid_ids: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Student log-probabilities at a few ids per row and the mass of the rest, without the [N, V] logits.

    Args:
        hidden: [N, H], the input of the LM head.
        weight: [V, H], the head's weight. Its gradient is accumulated in float32.
        ids: [N, C] int64 in [0, V). Any column may repeat another.
        support: [N, C] bool, the columns whose mass is not tail. An id that is repeated in a row counts once.
        bias: [V], added to the logits.
        chunk_rows: rows of logits that exist at once; None chooses by device.
        num_valid_ids: ids from here to V are padding of the head: their logits are -inf.

    Returns:
        logprobs: [N, C] float32 (float64 for float64 input), log q(ids) under the full softmax.
        log_tail: [N] likewise, log of the mass outside the support; -inf where the support is the whole vocabulary.
    """
    hidden = match_autocast(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits, tail, owner = _HeadLogits.apply(
            hidden, weight, bias, ids, support, _choose_rows(chunk_rows, hidden, weight), num_valid_ids
        )
        return _normalise(logits, tail, owner)[:2]


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    support: Tensor,
    rows_loss: RowsLoss,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    num_valid_ids: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss on the head's log-probabilities with its gradient taken on the way: three GEMMs, each row's logits once.

    Arguments as in `head_logprobs`, and `rows_loss`, called on one chunk after the other (once, on zero rows, if N = 0).
    It must be a sum over rows, with its normaliser known beforehand; a graph reaches it through `HeadRows` alone.

    Returns:
        loss: scalar, the sum over chunks. It can be differentiated once: backward hands the gradients over, not copies.
        statistics: the sum over chunks of what rows_loss returned beside the loss.
    """
    hidden = match_autocast(hidden)
    if not torch.is_grad_enabled():  # a Function cannot tell: inside, gradients are always off
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(
            hidden, weight, bias, ids, support, rows_loss, _choose_rows(chunk_rows, hidden, weight), num_valid_ids
        )


class _HeadLogits(torch.autograd.Function):
    """-> logits of the ids [N, C], log-sum-exp of the logits outside the support [N], columns that own their id [N, C]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, support, chunk_rows, num_valid_ids):  # pyright: ignore[reportIncompatibleMethodOverride]  (theirs: *args)
        head = ChunkedHead(hidden, weight, bias, chunk_rows, num_valid_ids)
        selected = hidden.new_empty(ids.shape, dtype=head.logits_dtype)
        tail = hidden.new_empty(ids.shape[:1], dtype=head.logits_dtype)
        owner = torch.empty_like(support)
        for chunk in _split_chunks(head, ids, support):
            selected[chunk.rows], owner[chunk.rows], tail[chunk.rows] = chunk.selected, chunk.owner, chunk.tail
        ctx.save_for_backward(hidden, weight, bias, ids, support)
        ctx.chunk_rows, ctx.num_valid_ids = chunk_rows, num_valid_ids
        ctx.mark_non_differentiable(owner)
        return selected, tail, owner

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_selected, grad_tail, _):  # pyright: ignore[reportIncompatibleMethodOverride]  (theirs: *args)
        hidden, weight, bias, ids, support = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, ctx.chunk_rows, ctx.num_valid_ids)
            gradients = HeadGradients(head, *ctx.needs_input_grad[:3])
            for chunk in _split_chunks(head, ids, support):
                rows = chunk.rows
                gradients.add(rows, *_logits_gradient_(chunk, ids[rows], grad_selected[rows], grad_tail[rows]))
        return *gradients.result(), None, None, None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, support, rows_loss, chunk_rows, num_valid_ids):  # pyright: ignore[reportIncompatibleMethodOverride]  (theirs: *args)
        head = ChunkedHead(hidden, weight, bias, chunk_rows, num_valid_ids)
        needs_gradient = any(ctx.needs_input_grad)
        gradients = HeadGradients(head, *ctx.needs_input_grad[:3])
        losses, statistics = [], []
        for chunk in _split_chunks(head, ids, support):
            rows, selected, tail = chunk.rows, chunk.selected, chunk.tail
            with torch.set_grad_enabled(needs_gradient):
                selected.requires_grad_(needs_gradient)
                tail.requires_grad_(needs_gradient)
                logprobs, log_tail, log_total = _normalise(selected, tail, chunk.owner)
                with torch.no_grad():
                    top = torch.cat([selected, chunk.tail_top[:, None]], dim=1).amax(dim=1) - log_total
                loss, chunk_statistics = rows_loss(HeadRows(logprobs, log_tail, top, rows))
            losses.append(loss.detach())
            statistics.append(chunk_statistics)
            if needs_gradient:
                gradient = _logits_gradient_(chunk, ids[rows], *torch.autograd.grad(loss, (selected, tail)))
                gradients.add(rows, *gradient)
                del gradient
            del chunk  # frees its buffer before the result is made
        ctx.gradients = gradients.result()
        total_statistics = torch.stack(statistics).sum(dim=0)
        ctx.mark_non_differentiable(total_statistics)
        return torch.stack(losses).sum(), total_statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # pyright: ignore[reportIncompatibleMethodOverride]  (theirs: *args)
        assert ctx.gradients is not None, (
            "head_loss was differentiated a second time, but its gradients were handed over at the first; "
            "use head_logprobs where a graph is kept"
        )
        # Dropping our reference lets autograd keep dW as weight.grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None, None


class ChunkedHead:
    """The forward GEMM, chunk by chunk into one reused buffer."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, num_valid_ids: int | None
    ) -> None:
        # CPUs without matrix units are fastest in float32, and lose nothing by it.
        low_precision = hidden.dtype in (torch.bfloat16, torch.float16)
        self.gemm_dtype = torch.float32 if low_precision and hidden.device.type == "cpu" else hidden.dtype
        self.logits_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.gemm_weight = weight.detach().to(self.gemm_dtype)
        self.chunk_rows = chunk_rows
        self.num_valid_ids = weight.shape[0] if num_valid_ids is None else num_valid_ids

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits [c, V]; the buffer is overwritten by the next chunk."""
        slices = even_slices(0, self.hidden.shape[0], self.chunk_rows)
        buffer = self.new_buffer(slices, self.logits_dtype)
        for rows in slices:
            yield rows, self.logits_(rows, buffer)

    def new_buffer(self, slices: list[slice], dtype: torch.dtype) -> Tensor:
        """[c, V] for the longest of the slices, which is the first."""
        return self.hidden.new_empty((slices[0].stop - slices[0].start, self.weight.shape[0]), dtype=dtype)

    def logits_(self, rows: slice, buffer: Tensor) -> Tensor:
        """Logits of the rows, in the buffer."""
        logits = buffer[: rows.stop - rows.start]
        hidden = self.hidden[rows].detach().to(self.gemm_dtype)
        if self.gemm_dtype == logits.dtype:
            torch.mm(hidden, self.gemm_weight.T, out=logits)
        else:
            torch.mm(hidden, self.gemm_weight.T, out_dtype=logits.dtype, out=logits)
        if self.bias is not None:
            logits.add_(self.bias.detach())
        logits[:, self.num_valid_ids :] = -torch.inf
        return logits


def even_slices(start: int, stop: int, longest: int) -> list[slice]:
    """As few slices as can be, none longer than the first; one that is empty if there is nothing to cut."""
    number = max(1, -(-(stop - start) // longest))
    length = max(1, -(-(stop - start) // number))
    return [slice(at, min(at + length, stop)) for at in range(start, max(stop, start + 1), length)]


class HeadGradients:
    """The two backward GEMMs, summed over chunks; only those that are asked for."""

    def __init__(self, head: ChunkedHead, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
        self.head = head
        accumulate = head.logits_dtype
        self.hidden = torch.zeros_like(head.hidden) if needs_hidden else None
        self.weight = torch.empty_like(head.weight, dtype=accumulate) if needs_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=accumulate) if needs_bias and head.bias is not None else None
        self.is_empty = True  # nothing was written to `weight`, which is large

    def add(self, rows: slice, logits_gradient: Tensor, factor: Tensor | None = None) -> None:
        """`factor` [c]: what the rows of logits_gradient [c, V] are still to be multiplied by."""
        gemm_dtype = self.head.gemm_dtype
        if self.bias is not None:
            of_rows = logits_gradient if factor is None else logits_gradient * factor[:, None]
            self.bias.add_(of_rows.sum(dim=0, dtype=self.bias.dtype))
        gradient = logits_gradient.to(gemm_dtype)
        if self.hidden is not None:
            product = torch.mm(gradient, self.head.gemm_weight)
            self.hidden[rows] = (product if factor is None else product * factor[:, None]).to(self.hidden.dtype)
        if self.weight is not None:
            hidden = self.head.hidden[rows].detach()
            hidden = (hidden if factor is None else hidden * factor[:, None]).to(gemm_dtype)
            beta = 0.0 if self.is_empty else 1.0
            if gemm_dtype == self.weight.dtype:
                self.weight.addmm_(gradient.T, hidden, beta=beta)
            else:  # float32 sums of bfloat16 products, added up by the GEMM itself
                torch.addmm(self.weight, gradient.T, hidden, beta=beta, out_dtype=self.weight.dtype, out=self.weight)
        self.is_empty = False

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias, each in the dtype of its tensor."""
        if self.weight is not None and self.is_empty:
            self.weight.zero_()
        weight = None if self.weight is None else self.weight.to(self.head.weight.dtype)
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return self.hidden, weight, bias


class _Chunk(NamedTuple):
    """What the loss needs of the rows, and what its gradient will be made of."""

    rows: slice
    selected: Tensor  # [c, C] logits of the ids
    owner: Tensor  # [c, C] of the support columns that name the same id, one
    tail: Tensor  # [c] log-sum-exp of the logits outside the support
    tail_top: Tensor  # [c] the largest of them
    weights: Tensor  # [c, V] softmax of the tail, 0 on the support; overwritten by the next chunk
    factor: Tensor | None  # [c] what the rows of weights are still to be multiplied by


def _split_chunks(head: ChunkedHead, ids: Tensor, support: Tensor) -> Iterator[_Chunk]:
    if _has_kernels(head.hidden):
        yield from _split_chunks_by_kernel(head, ids, support)
        return
    for rows, logits in head.chunks():
        selected, owner = _take_support_(logits, ids[rows], support[rows])
        tail, tail_top = _tail_softmax_(logits, may_be_empty=ids.shape[1] >= head.num_valid_ids)
        yield _Chunk(rows, selected, owner, tail, tail_top, logits, None)


def _split_chunks_by_kernel(head: ChunkedHead, ids: Tensor, support: Tensor) -> Iterator[_Chunk]:
    """Only the weights, of half the size, exist for a whole chunk at once; the logits for a part of it."""
    from raykd.losses.head_triton import split_tail

    chunks = even_slices(0, len(ids), head.chunk_rows)
    parts = even_slices(chunks[0].start, chunks[0].stop, _KERNEL_LOGITS_ROWS)
    logits, weights = head.new_buffer(parts, _KERNEL_LOGITS_DTYPE), head.new_buffer(chunks, head.gemm_dtype)
    for rows in chunks:
        tails = []
        for part in even_slices(rows.start, rows.stop, _KERNEL_LOGITS_ROWS):
            written = weights[part.start - rows.start : part.stop - rows.start]
            tails.append(split_tail(head.logits_(part, logits), ids[part], support[part], written))
        selected, owner, tail, top, factor = (torch.cat(parts) for parts in zip(*tails, strict=True))
        yield _Chunk(rows, selected, owner, tail, top, weights[: rows.stop - rows.start], factor)


def buffer_bytes(num_rows: int, vocab_size: int, itemsize: int) -> int:
    """What the operation takes on a GPU for chunks of so many rows, at so many bytes a value of the GEMMs."""
    weights = min(num_rows * vocab_size * itemsize, _KERNEL_CHUNK_BYTES)
    return weights + min(num_rows, _KERNEL_LOGITS_ROWS) * vocab_size * torch.float32.itemsize


def _has_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float32)


def _choose_rows(chunk_rows: int | None, hidden: Tensor, weight: Tensor) -> int:
    if chunk_rows is None and _has_kernels(hidden):
        chunk_rows = max(1, _KERNEL_CHUNK_BYTES // (len(weight) * hidden.itemsize))
    return choose_chunk_rows(chunk_rows, hidden, weight)


def _take_support_(logits: Tensor, ids: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the logits of the ids [c, C], then overwrite the support with -inf.

    Also returns which columns [c, C] own their id: of the support columns that name the same id, exactly one does.
    """
    selected = logits.gather(1, ids)
    if ids.shape[1] == 0:
        return selected, support
    # Columns outside the support must not write. They repeat the write of the row's first support column instead; in a
    # row without any they put the logit of column 0 back where it was.
    first = support.to(torch.uint8).argmax(dim=1, keepdim=True)
    places = torch.where(support, ids, ids.gather(1, first))
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # Every support column signs its place; the one whose signature is left is the owner.
    logits.scatter_(1, places, torch.where(support, column, first).to(logits.dtype))
    owner = support & (logits.gather(1, ids) == column)
    fill = torch.where(support.any(dim=1, keepdim=True), -torch.inf, selected.gather(1, first))
    logits.scatter_(1, places, fill.expand_as(places))
    return selected, owner


def _tail_softmax_(logits: Tensor, *, may_be_empty: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the tail, in place; returns its log-sum-exp [c] and its largest logit [c]."""
    top = logits.amax(dim=1)
    torch.softmax(logits, dim=1, out=logits)
    if may_be_empty:  # the support may be the whole vocabulary
        logits.masked_fill_((top == -torch.inf)[:, None], 0.0)
    # The most likely tail id has probability exp(top - log_tail).
    return torch.where(top == -torch.inf, top, top - logits.amax(dim=1).log()), top


def _logits_gradient_(chunk: _Chunk, ids: Tensor, grad_selected: Tensor, grad_tail: Tensor) -> tuple[Tensor, Tensor | None]:
    """dL/d(logits) [c, V], written over the chunk's weights, and what its rows are still to be multiplied by [c]."""
    if chunk.factor is None:
        return chunk.weights.mul_(grad_tail[:, None]).scatter_add_(1, ids, grad_selected), None
    # A pass less: the factors go to the small sides of the GEMMs. At the ids they are divided out, so none may be 0.
    factor = chunk.factor * grad_tail
    factor = torch.where(factor.abs() < _LEAST_FACTOR, _LEAST_FACTOR, factor)
    return chunk.weights.scatter_add_(1, ids, (grad_selected / factor[:, None]).to(chunk.weights.dtype)), factor


def _normalise(selected: Tensor, tail: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the ids and the tail's log-sum-exp -> their log-probabilities, and the log-sum-exp of the row [c]."""
    categories = torch.cat([selected.masked_fill(~owner, -torch.inf), tail[:, None]], dim=1)
    log_total = categories.logsumexp(dim=1)
    return selected - log_total[:, None], tail - log_total, log_total


def match_autocast(hidden: Tensor) -> Tensor:
    """Follow CUDA autocast, whose lower precision buys speed here; on a CPU it buys none."""
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        return hidden.to(torch.get_autocast_dtype("cuda"))
    return hidden


def choose_chunk_rows(chunk_rows: int | None, hidden: Tensor, weight: Tensor) -> int:
    assert hidden.shape == (hidden.shape[0], weight.shape[1]), (
        f"hidden must be [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
    )
    if chunk_rows is not None:
        return chunk_rows
    vocab_size, hidden_size = weight.shape
    on_gpu = max(_CUDA_MIN_CHUNK_ROWS, _CUDA_CHUNK_ELEMENTS // hidden_size)
    return max(1, min(on_gpu if hidden.is_cuda else _CPU_CHUNK_ROWS, _MAX_CHUNK_BYTES // (4 * vocab_size)))
