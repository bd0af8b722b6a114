from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.masking_utils import create_causal_mask

from raykd.config import StudentConfig
from raykd.student.latent import LatentSpans
from raykd.student.model import Student, count_parameters, load_student, student_config

VOCAB = 48
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def embedding(student: Student) -> torch.Tensor:
    weight = student.model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def save_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(VOCAB)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Qwen3 of four layers with tied embeddings."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def load(folder: Path, **options) -> Student:
    return load_student(StudentConfig(model=str(folder), **options), seed=0).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_changing_a_token_changes_no_hidden_state_before_it(folder):
    student, ids = load(folder), random_ids(2, 9)
    before = student(ids).hidden
    for position in range(9):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = student(changed).hidden
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@torch.no_grad()
def test_padding_on_the_right_changes_no_hidden_state(folder):
    student, ids = load(folder), random_ids(1, 7)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    torch.testing.assert_close(student(padded).hidden[:, :7], student(ids).hidden, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_head_give_the_models_own_logits(folder):
    student, ids = load(folder), random_ids(2, 6)
    own = Qwen3ForCausalLM.from_pretrained(folder).eval()(ids).logits
    torch.testing.assert_close(student(ids).hidden @ student.head_weight.T, own, atol=1e-5, rtol=1e-5)
    assert student.head_bias is None


@torch.no_grad()
def test_kept_layers_compute_what_they_computed_in_the_larger_model(folder):
    layers = (0, 3, 1)
    student, ids = load(folder, layers=layers), random_ids(2, 8)
    whole = Qwen3ForCausalLM.from_pretrained(folder).eval().model
    hidden = whole.embed_tokens(ids)
    positions = torch.arange(8)[None]
    mask = create_causal_mask(
        config=whole.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
    )
    rotary = whole.rotary_emb(hidden, positions)
    for layer in layers:
        hidden = whole.layers[layer](hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    torch.testing.assert_close(student(ids).hidden, whole.norm(hidden), atol=1e-6, rtol=1e-5)
    assert [layer.self_attn.layer_idx for layer in student.model.model.layers] == [0, 1, 2]
    assert student.model.config.num_hidden_layers == len(student.model.config.layer_types) == 3


def test_tied_embeddings_stay_tied_and_are_saved_once(folder, tmp_path):
    student = load(folder, layers=(0, 2))
    assert student.head_weight is embedding(student)
    student.save(tmp_path)
    again = load(tmp_path)
    assert again.head_weight is embedding(again)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_an_untied_head_stays_its_own(tmp_path):
    Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    student = load(tmp_path)
    assert student.head_weight.data_ptr() != embedding(student).data_ptr()
    student.save(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").head_weight, student.head_weight)


def test_weights_are_float32_and_the_saved_config_names_the_original_type(tmp_path):
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    student = load(tmp_path)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    student.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.float32}
    assert load(tmp_path / "again").saved_dtype == torch.bfloat16


def test_random_weights_come_from_the_seed_alone(folder):
    config = StudentConfig(model=str(folder / "config.json"), random_weights=True, tokenizer=str(folder), layers=(0,))
    torch.manual_seed(5)
    first, second, other = load_student(config, 1), load_student(config, 1), load_student(config, 2)
    assert torch.equal(first.head_weight, second.head_weight)
    assert not torch.equal(first.head_weight, other.head_weight)
    assert len(first.model.model.layers) == 1


SENTINELS = {"<bot>": "w3", "<slot>": "", "<eot>": ""}


@pytest.mark.parametrize("options", [{}, {"layers": (0, 2)}, {"random_weights": True}])
def test_new_tokens_get_rows_once_and_a_saved_student_keeps_what_training_made_of_them(folder, tmp_path, options):
    student, plain = load(folder, new_tokens=SENTINELS, **options), load(folder, **options)
    assert torch.equal(student.head_weight[:VOCAB], plain.head_weight)
    assert student.head_weight is embedding(student)
    assert (student.num_valid_ids, len(student.head_weight)) == (VOCAB + 3, 64)
    torch.testing.assert_close(student.head_weight[VOCAB], plain.head_weight[3], atol=0.05, rtol=0)
    assert torch.equal(load(folder, new_tokens=SENTINELS, **options).head_weight, student.head_weight)
    with torch.no_grad():
        student.head_weight[VOCAB:] = 5.0
    student.save(tmp_path)
    for new_tokens in (SENTINELS, {}):
        again = load(tmp_path, new_tokens=new_tokens)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
        assert again.num_valid_ids == VOCAB + 3


@torch.no_grad()
def test_passes_that_fill_slots_look_no_further_than_the_last_one(folder):
    student, ids = load(folder), random_ids(2, 9)
    student.latent = LatentSpans(begin_id=46, slot_id=47, num_slots=2, loops=2)
    ids[ids == 47] = 46
    plain = load(folder)(ids).hidden
    assert student.latent_width(ids) == 0
    assert torch.equal(student(ids, latent_width=0).hidden, plain)
    ids[0, [3, 4]], ids[1, 2] = 47, 47
    assert student.latent_width(ids) == 5
    seen: list[int] = []
    hook = student.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    narrow = student(ids, latent_width=student.latent_width(ids)).hidden
    hook.remove()
    assert seen == [5, 5, 9]
    torch.testing.assert_close(narrow, student(ids).hidden)
    student.latent = replace(student.latent, loops=0)  # mask mode
    assert student.latent_width(ids) == 0


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_folder_with_other_tensors_than_the_model_has_is_refused(folder, tmp_path, damage):
    load(folder).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors[name := "model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(tmp_path)


@pytest.mark.parametrize("layers", [(0, 4), (-1,), ()])
def test_layers_that_are_not_there_are_refused(folder, layers):
    with pytest.raises(ValueError, match="between 0 and 3"):
        load(folder, layers=layers)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        student_config(StudentConfig(model=str(tmp_path / "nowhere")))


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, final_logit_softcapping=0.5, pad_token_id=0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="capping"):
        load(tmp_path)


def test_parameters_are_counted_without_allocating_them(folder):
    config = StudentConfig(model=str(folder), layers=(1, 2))
    counted = count_parameters(student_config(config))
    assert counted == sum(parameter.numel() for parameter in load_student(config, 0).parameters())
