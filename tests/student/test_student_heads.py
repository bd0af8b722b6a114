"""Heads and wanted layers come out of the one forward pass, with gradients, and go to disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from raykd.config import StudentConfig
from raykd.student.heads import load_heads, make_heads, save_heads
from raykd.student.model import Student, load_student
from tests.student.test_model import SMALL, VOCAB, random_ids, save_tokenizer

ALL = {"kd": 1.0, "halt": 0.1, "self_evaluation": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def with_heads(folder: Path) -> Student:
    student = load_student(StudentConfig(model=str(folder)), seed=0)
    student.heads = make_heads(student.hidden_size, ALL, {1: (32, 24)}, seed=3)
    student.layers = (0, 2)
    return student


def test_only_the_heads_of_active_losses_exist():
    assert not len(make_heads(32, {"kd": 1.0}))
    assert set(make_heads(32, {"halt": 0.1})) == {"halt"}
    heads = make_heads(32, ALL, {1: (32, 24)})
    assert {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()} == {
        "halt.weight": (2, 32),
        "halt.bias": (2,),
        "self_evaluation.0.weight": (16, 32),
        "self_evaluation.0.bias": (16,),
        "self_evaluation.2.weight": (1, 16),
        "self_evaluation.2.bias": (1,),
        "projections.1.weight": (24, 32),
    }


def test_heads_come_from_the_seed_alone_and_leave_the_generator_where_it_was():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = make_heads(32, ALL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again, other = make_heads(32, ALL, seed=1), make_heads(32, ALL, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first["halt"].get_parameter("weight"), other["halt"].get_parameter("weight"))


def test_one_forward_pass_gives_the_layers_and_the_head_outputs_at_their_tokens(folder):
    student, ids = with_heads(folder), random_ids(2, 7)
    output = student(ids, torch.tensor([3, 5, 12]), torch.tensor([6, 11]))
    assert not any(module._forward_hooks for module in student.modules())
    states = student.model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(output.layers) == 2
    for layer, kept in zip((0, 2), output.layers, strict=True):
        torch.testing.assert_close(kept, states[layer + 1])
    hidden = output.hidden
    torch.testing.assert_close(output.halt_logits, student.heads["halt"](hidden[[0, 0, 1], [3, 5, 5]]))
    torch.testing.assert_close(output.quality_logits, student.heads["self_evaluation"](hidden[[0, 1], [6, 4]])[:, 0])
    assert torch.equal(output.hidden, load_student(StudentConfig(model=str(folder)), seed=0)(ids).hidden)


def test_nothing_is_computed_that_nobody_asked_for(folder):
    student = load_student(StudentConfig(model=str(folder)), seed=0)
    output = student(random_ids(1, 4), torch.tensor([2]), torch.tensor([3]))
    assert output.layers == ()
    assert output.halt_logits is None
    assert output.quality_logits is None
    output = with_heads(folder)(random_ids(1, 4))
    assert output.halt_logits is None
    assert output.quality_logits is None


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("num_decisions", [0, 2])
def test_every_head_has_a_gradient_even_without_a_decision_point(folder, num_decisions, gradient_checkpointing):
    student = with_heads(folder)
    if gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    output = student(random_ids(2, 7), torch.arange(num_decisions), torch.tensor([6, 13]))
    assert output.halt_logits is not None
    assert output.quality_logits is not None
    assert output.halt_logits.shape == (num_decisions, 2)
    (output.halt_logits.sum() + output.quality_logits.sum()).backward()
    weight = student.heads["halt"].get_parameter("weight").grad
    assert weight is not None
    assert weight.any() == bool(num_decisions)
    assert all(parameter.grad is not None for parameter in student.heads["self_evaluation"].parameters())


def test_a_kept_layer_has_its_gradient_also_under_gradient_checkpointing(folder):
    gradients = []
    for gradient_checkpointing in (False, True):
        student = with_heads(folder)
        if gradient_checkpointing:
            student.model.gradient_checkpointing_enable({"use_reentrant": False})
        first, last = student(random_ids(2, 7)).layers
        (first.square().sum() + last.square().sum()).backward()
        gradients.append({name: p.grad for name, p in student.model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert any("layers.2." in name for name in plain)
    assert not any("layers.3." in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_the_self_evaluation_head_can_be_kept_from_the_layers_below(folder):
    student = with_heads(folder)
    student.detach_self_evaluation = True
    quality = student(random_ids(2, 7), None, torch.tensor([6, 13])).quality_logits
    assert quality is not None
    quality.sum().backward()
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_heads_compute_in_float32_under_autocast(folder):
    student = with_heads(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = student(random_ids(2, 7), torch.tensor([3]), torch.tensor([6, 13]))
    assert output.halt_logits is not None
    assert output.quality_logits is not None
    assert output.halt_logits.dtype == output.quality_logits.dtype == torch.float32


def test_padding_changes_no_head_output(folder):
    student, ids = with_heads(folder).eval(), random_ids(1, 7)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    for index in (torch.tensor([3]), torch.tensor([6])):
        short, long = student(ids, index, index), student(padded, index, index)
        torch.testing.assert_close(long.halt_logits, short.halt_logits, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(long.quality_logits, short.quality_logits, atol=2e-5, rtol=1e-4)


def test_heads_are_saved_and_loaded_exactly_and_the_served_folder_has_none(folder, tmp_path):
    student = with_heads(folder)
    save_heads(student.heads, tmp_path / "heads.safetensors")
    again = make_heads(student.hidden_size, ALL, {1: (32, 24)}, seed=9)
    load_heads(again, tmp_path / "heads.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(student.heads.parameters(), again.parameters(), strict=True))
    student.save(tmp_path / "student")
    assert not any("heads" in name for name in load_file(tmp_path / "student" / "model.safetensors"))
    assert load_student(StudentConfig(model=str(tmp_path / "student")), 0).model.config.vocab_size == VOCAB


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "no file"])
def test_a_file_with_other_heads_is_refused(tmp_path, damage):
    heads, file = make_heads(32, ALL, seed=1), tmp_path / "heads.safetensors"
    tensors = heads.state_dict()
    if damage == "missing":
        del tensors["halt.bias"]
    elif damage == "extra":
        tensors["projections.4.weight"] = torch.zeros(2, 2)
    elif damage == "shape":
        tensors["halt.weight"] = torch.zeros(2, 16)
    if damage != "no file":
        save_file(tensors, file)
    expected = {"missing": "halt.bias", "extra": "projections.4", "shape": r"\[2, 16\]", "no file": "cannot be read"}
    with pytest.raises(ValueError, match=expected[damage]):
        load_heads(make_heads(32, ALL, seed=2), file)
