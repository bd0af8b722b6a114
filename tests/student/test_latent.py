"""Continuous latent spans: filling all slots at once gives what filling them one by one gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from raykd.student.latent import fill_slots, next_embeddings

VOCAB, SLOT = 32, 31
# Two spans of three and one slots; one of two; none. Padded on the right to nine columns.
INPUT_IDS = torch.tensor(
    [[3, 1, SLOT, SLOT, SLOT, 2, SLOT, 5, 6], [7, 8, 9, 1, SLOT, SLOT, 2, 0, 0], [4, 5, 6, 7, 8, 0, 0, 0, 0]]
)
IS_SLOT = INPUT_IDS == SLOT


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).double().eval()


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to the float32 in which the model's norms calculate."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def hidden_of(model: PreTrainedModel, embeddings: torch.Tensor) -> torch.Tensor:
    return model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state


def one_by_one(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """inputs_embeds [1, T, H] of one row, by hand: each slot takes the last state of a pass over all that is before it."""
    columns: list[torch.Tensor] = []
    for token in ids:
        if token == SLOT:
            columns.append(hidden_of(model, torch.stack(columns)[None])[0, -1])
        else:
            columns.append(model.get_input_embeddings()(token))
    return torch.stack(columns)[None]


def gradients(model: PreTrainedModel, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(model.base_model.parameters()), allow_unused=True, retain_graph=True))


@pytest.mark.parametrize("loops", [4, 6])
def test_as_many_passes_as_slots_equal_the_sequential_computation_in_value_and_gradient(model, loops):
    # Four slots in the longest chain: those of the first row, whose second span sees the first.
    together = hidden_of(model, fill_slots(model, INPUT_IDS, IS_SLOT, loops=loops))
    for row, length in enumerate((9, 7, 5)):
        by_hand = hidden_of(model, one_by_one(model, INPUT_IDS[row, :length]))
        assert_close(together[row, :length], by_hand[0])
        weight = torch.randn(by_hand.shape[1:], generator=torch.Generator().manual_seed(row)).double()
        want = gradients(model, (by_hand[0] * weight).sum())
        got = gradients(model, (together[row, :length] * weight).sum())
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_the_first_slots_are_exact_after_as_many_passes(model, loops):
    filled = fill_slots(model, INPUT_IDS, IS_SLOT, loops=loops)
    want = one_by_one(model, INPUT_IDS[0])
    slots = IS_SLOT[0].nonzero()[:, 0]
    assert_close(filled[0, slots[:loops]], want[0, slots[:loops]])
    assert not torch.allclose(filled[0, slots[loops:]], want[0, slots[loops:]])


def test_no_passes_leave_the_learned_embeddings(model):
    assert_close(fill_slots(model, INPUT_IDS, IS_SLOT, loops=0), model.get_input_embeddings()(INPUT_IDS))


def test_padding_and_other_rows_change_nothing(model):
    together = fill_slots(model, INPUT_IDS, IS_SLOT, loops=3)
    alone = fill_slots(model, INPUT_IDS[1:2, :7], IS_SLOT[1:2, :7], loops=3)
    assert_close(together[1:2, :7], alone)
    assert_close(together[2], model.get_input_embeddings()(INPUT_IDS[2]))


def test_passes_over_the_columns_with_slots_are_enough(model):
    assert_close(fill_slots(model, INPUT_IDS, IS_SLOT, loops=3, width=7), fill_slots(model, INPUT_IDS, IS_SLOT, loops=3))


def test_the_gradient_reaches_what_came_before_the_slots_through_the_state_fed_back(model):
    embedding = model.get_input_embeddings().weight
    filled = fill_slots(model, INPUT_IDS, IS_SLOT, loops=1)
    (gradient,) = torch.autograd.grad(filled[1, 4].sum(), embedding)
    assert (gradient[[7, 8, 9, 1]].abs().sum(dim=1) > 0).all()
    assert gradient[SLOT].abs().sum() == 0  # its embedding is replaced, and it looks not at itself


@torch.no_grad()
def test_generation_with_a_cache_goes_through_the_same_states(model):
    ids, is_slot = INPUT_IDS[:1], IS_SLOT[:1]
    want = hidden_of(model, fill_slots(model, ids, is_slot, loops=4))
    cache, last, states = DynamicCache(), torch.zeros(1, 16).double(), []
    for column in range(ids.shape[1]):
        embeddings = next_embeddings(model, ids[:, column], is_slot[:, column], last)
        last = model.base_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        states.append(last)
    assert_close(torch.stack(states, dim=1), want)
