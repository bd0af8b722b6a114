"""The checked-in demo teacher: small, reproducible from its recipe, and good enough to be worth distilling."""

import pyarrow as pa
import pytest
import torch
import yaml
from transformers import Qwen3ForCausalLM

from raykd.data.extractors import extract_tool_calls
from raykd.demo import build_teacher
from raykd.demo.build_teacher import TeacherRecipe
from raykd.demo.corpus import generate, generate_conversations
from raykd.demo.grade import calls_of, grade_texts
from raykd.demo.muon import orthogonalize
from raykd.demo.tokenizer import train_tokenizer
from teacher_serving.config import SamplingConfig, VllmTeacherConfig
from teacher_serving.connect import connect
from teacher_serving.types import PROMPT_SCHEMA
from tests.conftest import DEMO_TEACHER

RECIPE = build_teacher.RECIPE_PATH


@pytest.mark.vllm
def test_through_vllm_the_teacher_calls_exactly_and_decides_rightly_on_held_out_prompts(demo_tokenizer):
    rows = list(generate(300, 0, "held_out"))
    prompts = [
        demo_tokenizer.apply_chat_template(
            row["messages"], tools=row["tools"], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    config = VllmTeacherConfig(
        model=str(DEMO_TEACHER),
        dtype="float32",
        device="cpu",
        top_k=1,
        max_model_len=512,
        max_num_seqs=64,
        sampling=SamplingConfig(temperature=0.0, max_tokens=128),
    )
    teacher = connect(config)
    try:
        answers = teacher.generate(pa.table([list(range(len(rows))), prompts], schema=PROMPT_SCHEMA))
    finally:
        teacher.close()
    texts = demo_tokenizer.batch_decode(answers["output_ids"].to_pylist(), skip_special_tokens=True)
    for text in texts:
        found = [{"name": call.name, "arguments": call.arguments} for call in extract_tool_calls(text)]
        assert found == calls_of(text)
    grade = grade_texts(rows, texts)
    assert grade.exact >= 0.97, grade
    assert grade.decision >= 0.98, grade


def test_the_folder_is_small_and_holds_its_own_recipe(demo_tokenizer):
    files = {file.name: file.stat().st_size for file in DEMO_TEACHER.iterdir()}
    assert sum(files.values()) <= 4_000_000, files
    recipe = yaml.safe_load((DEMO_TEACHER / "recipe.yaml").read_text())
    assert recipe == yaml.safe_load(RECIPE.read_text())
    model = Qwen3ForCausalLM.from_pretrained(DEMO_TEACHER)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_hidden_layers == recipe["num_layers"]
    assert model.config.vocab_size == len(demo_tokenizer) == recipe["vocab_size"]
    assert model.generation_config.eos_token_id == demo_tokenizer.eos_token_id


@pytest.mark.slow
def test_the_checked_in_tokenizer_is_the_recipes(demo_tokenizer):
    recipe = TeacherRecipe(**yaml.safe_load(RECIPE.read_text()))
    rebuilt = train_tokenizer(generate_conversations(6000, recipe.seed, "train"), recipe.vocab_size)
    assert rebuilt.get_vocab() == demo_tokenizer.get_vocab()
    assert rebuilt.chat_template == demo_tokenizer.chat_template


def test_a_few_steps_lower_the_loss_and_repeat_exactly(demo_tokenizer):
    recipe = TeacherRecipe(
        **{
            **yaml.safe_load(RECIPE.read_text()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": 1,
            "num_steps": 12,
            "warmup_steps": 2,
            "batch_tokens": 1024,
            "num_grades": 0,
        }
    )
    model, again = (build_teacher.train(recipe, demo_tokenizer) for _ in range(2))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    ids, marks = next(build_teacher.batches(recipe, demo_tokenizer))
    before = build_teacher.loss_of(build_teacher.new_model(recipe, demo_tokenizer), ids, marks, recipe)[1]
    assert build_teacher.loss_of(model, ids, marks, recipe)[1] < 0.95 * before


def test_batches_mark_assistant_text_other_text_and_padding(demo_tokenizer):
    recipe = TeacherRecipe(**yaml.safe_load(RECIPE.read_text()))
    stream = build_teacher.batches(recipe, demo_tokenizer)
    seen_padding = False
    for _ in range(20):
        ids, marks = next(stream)
        assert ids.shape == marks.shape
        assert ids.numel() <= max(recipe.batch_tokens, ids.shape[1])
        assert torch.equal(marks == -1, ids == demo_tokenizer.pad_token_id)
        seen_padding |= bool((marks == -1).any())
        text = demo_tokenizer.decode(ids[0][marks[0] == 1])
        assert text.endswith("<|im_end|>")
        assert "<tools>" not in text
    assert seen_padding


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 24, 48)])
def test_orthogonalize_brings_all_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3
    # The same singular vectors: the product with the input is symmetric positive.
    product = torch.linalg.eigvalsh(orthogonalize(matrices).mT @ matrices)
    assert product.min() > -1e-3


def test_the_grade_tells_wrong_types_wrong_order_and_broken_json_from_exact_calls():
    call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    gold = {"kind": "one_call", "gold_calls": [{"name": "f", "arguments": {"a": 1}}], "gold_answer": ""}
    none = {"kind": "no_tool", "gold_calls": [], "gold_answer": "Hi."}
    texts = [call % '{"a": 1}', call % '{"a": true}', call % '{"a": 1.0}', call % '{"a": 1', "Hi."]
    assert [grade_texts([gold], [text]).exact for text in texts] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [grade_texts([gold], [text]).decision for text in texts] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert grade_texts([none], ["Hi."]) == grade_texts([none], ["Hi."])
    assert grade_texts([none], ["Hi."]).by_kind == {"no_tool": 1.0}
    assert grade_texts([none], ["Hello."]).by_kind == {"no_tool": 0.0}
    assert grade_texts([none], [call % "{}"]).decision == 0.0
