"""The kernels of the head operation: by Triton's interpreter on any machine, compiled where there is a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raykd.losses.head_triton import split_tail
from tests.conftest import needs_gpu
from tests.losses.test_head import EXECUTIONS, assert_same, dense, ours, special_cases
from tests.losses.test_head import make_case as make_head_case

SHAPES = [(1, 1), (3, 50), (5, 4096), (7, 4097), (4, 10_000)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cpu",) if INTERPRETED else (pytest.param("cuda", marks=needs_gpu),)
by_device = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_by_the_interpreter_all_of_this_holds():
    """In a process of its own: Triton decides when it is imported."""
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]  # log(0)
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "26 passed" in done.stdout


def make_case(num_rows: int, vocab_size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids, support. Logits are large and small, -inf at the front, and all along the last row; ids repeat. In the
    first row those behind the first block are out of reach of its exponentials."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 20
    logits[:, : vocab_size // 3] = -torch.inf
    logits[0, 4096:] += 300
    if num_rows > 1:
        logits[-1] = -torch.inf
    ids = torch.randint(0, vocab_size, (num_rows, 5), generator=generator)
    ids[:, 1] = ids[:, 0]
    support = torch.rand(num_rows, 5, generator=generator) < 0.7
    support[::2, :2] = True
    return logits.to(device), ids.to(device), support.to(device)


@by_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
def test_weights_times_factor_are_the_softmax_outside_the_support(device, num_rows, vocab_size, dtype):
    logits, ids, support = make_case(num_rows, vocab_size, device)
    outside = logits.clone()
    for row in range(num_rows):
        outside[row, ids[row, support[row]]] = -torch.inf
    weights = torch.full((num_rows, vocab_size + 3), 7.0, dtype=dtype, device=device)
    selected = logits.gather(1, ids)
    found = split_tail(logits, ids, support, weights[:, :vocab_size])
    assert torch.equal(found.selected, selected)
    assert torch.equal(found.top, outside.amax(dim=1))
    torch.testing.assert_close(found.total.double(), outside.double().logsumexp(dim=1), rtol=1e-6, atol=1e-5)
    softmax = weights[:, :vocab_size].double() * found.factor[:, None].double()
    expected = outside.double().softmax(dim=1).nan_to_num()  # NaN: a row of -inf
    torch.testing.assert_close(softmax, expected, rtol=1e-4 if dtype == torch.float32 else 8e-3, atol=1e-12)
    assert (weights[:, vocab_size:] == 7.0).all()


@by_device
def test_of_the_support_columns_that_name_an_id_one_owns_it(device):
    logits, ids, support = make_case(8, 50, device)
    owner = split_tail(logits, ids, support, torch.empty_like(logits)).owner
    assert not (owner & ~support).any()
    for row in range(8):
        assert sorted(ids[row, owner[row]].tolist()) == sorted(set(ids[row, support[row]].tolist()))


@by_device
def test_no_rows_are_no_work_and_no_ids_leave_all_to_the_tail(device):
    nothing = torch.empty(0, 50, device=device)
    ids = torch.empty(0, 3, dtype=torch.int64, device=device)
    assert split_tail(nothing, ids, ids.bool(), nothing.clone()).selected.shape == (0, 3)
    logits, ids, support = make_case(3, 50, device)
    expected = logits.logsumexp(dim=1)
    found = split_tail(logits, ids[:, :0], support[:, :0], torch.empty_like(logits))
    assert found.selected.shape == found.owner.shape == (3, 0)
    torch.testing.assert_close(found.total, expected)


@pytest.mark.skipif(not INTERPRETED, reason="tests/losses/test_head.py does it on a GPU")
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ["plain", *special_cases()])
def test_the_head_operation_by_kernel_is_dense_float64_autograd(name, execution, monkeypatch):
    monkeypatch.setattr("raykd.losses.head._has_kernels", lambda hidden: True)
    monkeypatch.setattr("raykd.losses.head._KERNEL_LOGITS_ROWS", 4)
    case = {"plain": make_head_case(), **special_cases()}[name].to(torch.float32)
    assert_same(ours(case, execution), dense(case), 1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter does it")
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_where_the_tail_has_no_gradient_the_ids_keep_theirs(execution, monkeypatch):
    """Their gradient is divided by the factor of the row, which is that of the tail."""
    monkeypatch.setattr("raykd.losses.head._has_kernels", lambda hidden: True)
    case = make_head_case().to(torch.float32)
    # Weights along log q that sum to 0 in a row push the logits of the ids alone.
    weight = case.logprob_weight - case.logprob_weight.mean(dim=1, keepdim=True)
    case = replace(case, logprob_weight=weight, tail_weight=torch.zeros_like(case.tail_weight))
    assert_same(ours(case, execution), dense(case), 1e-5)
