"""A teacher in plain transformers: the reference that VllmEngine is held against, and the one to debug with.

In:  tables of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score).
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request; a row that could not be answered is an error row.

Shape letters: B sequences of a batch, P prompt tokens, T output tokens, V vocabulary, K top-k entries, L shipped layers,
H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from teacher_serving.arrow import (
    NO_STATES,
    NOTHING,
    Answer,
    ListColumn,
    answers_table,
    find_problems,
    half_states,
    request_seed,
    shipped_states,
)
from teacher_serving.config import HfTeacherConfig, RequestConfig, SamplingConfig
from teacher_serving.types import TeacherInfo, token_limits


class HfEngine:
    """A transformers model behind the Teacher protocol. Calls from several threads take turns."""

    def __init__(self, config: HfTeacherConfig, info: TeacherInfo) -> None:
        assert config.device != "auto", "resolve the device first: connect.resolve_device"
        self.info = info
        self._config = config
        self._device = torch.device(config.device)
        self._turn = threading.Lock()
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype)
        self._model = torch.nn.Module.to(model.eval(), self._device)
        self._states: list[Tensor] = []  # what the shipped layers gave out in the last forward pass, each [B, T, H]
        self._body: torch.nn.Module = getattr(model, model.base_model_prefix)  # without the LM head
        layers = _decoder_layers(model)
        for layer in config.hidden_layers:
            layers[layer].register_forward_hook(self._keep_output)

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order."""
        return self._table(prompts, self.generate_answers(prompts))

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order."""
        return self._table(sequences, self.score_answers(sequences))

    def probe(self) -> None:
        """Score one sequence of full length, so that too little memory shows now and not in an hour."""
        ids = np.arange(self.info.max_model_len, dtype=np.int32) % self.info.vocab_size
        self._score_one(ids[:1], ids[1:], self._config.top_k)

    def problem(self) -> str | None:
        """Why this teacher can answer nothing any more: never."""
        return None

    def close(self) -> None:
        """Release the model. Idempotent."""
        self._model = self._body = torch.nn.Identity()

    def generate_answers(self, prompts: pa.Table, request: RequestConfig | None = None) -> list[Answer]:
        """As generate, an Answer a row in full precision. `request`: in place of the config's own settings."""
        request = request or self._config.request
        context = request.context(self.info.max_model_len)
        problems = find_problems(prompts, self.info, context=context)
        answers = [Answer.error(problem) if problem else NOTHING for problem in problems]
        prompt = ListColumn.of(prompts, "prompt_ids")
        uids = prompts.column("uid").to_pylist()
        limits = token_limits(prompts, request.sampling.max_tokens)
        room = [min(limit, context - length) for limit, length in zip(limits, prompt.lengths.tolist(), strict=True)]
        rows = [row for row, problem in enumerate(problems) if problem is None]
        with self._turn:
            for start in range(0, len(rows), self._config.max_num_seqs):
                batch = rows[start : start + self._config.max_num_seqs]
                written = self._write(
                    [prompt.row(row) for row in batch],
                    [uids[row] for row in batch],
                    [room[row] for row in batch],
                    request,
                )
                for row, answer in zip(batch, written, strict=True):
                    answers[row] = answer
        return answers

    def score_answers(self, sequences: pa.Table, request: RequestConfig | None = None) -> list[Answer]:
        """As score, an Answer a row in full precision. `request`: in place of the config's own settings."""
        request = request or self._config.request
        problems = find_problems(sequences, self.info, context=request.context(self.info.max_model_len))
        prompt = ListColumn.of(sequences, "prompt_ids")
        output = ListColumn.of(sequences, "output_ids")
        with self._turn:
            return [
                Answer.error(problem) if problem else self._score_one(prompt.row(row), output.row(row), request.top_k)
                for row, problem in enumerate(problems)
            ]

    def _keep_output(self, _layer: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._states.append(output if isinstance(output, Tensor) else output[0])

    def _take_states(self) -> np.ndarray:
        """States [L, T, H] of the one sequence of the last forward pass, as they are shipped."""
        states, self._states = self._states, []
        if not states:
            return NO_STATES
        half = half_states(torch.cat(states).cpu().float().numpy())
        return shipped_states(half, num_tokens=half.shape[1])

    def _table(self, rows: pa.Table, answers: Sequence[Answer]) -> pa.Table:
        return answers_table(rows, answers, self.info, self._config.top_k, self._config.weight_version)

    @torch.inference_mode()
    def _score_one(self, prompt_ids: np.ndarray, output_ids: np.ndarray, top_k: int) -> Answer:
        """One forward over one sequence: no padding, no batch to depend on."""
        if not len(output_ids):
            return Answer(np.empty(0, np.int32), (), "given")
        self._states.clear()
        ids = torch.from_numpy(np.concatenate((prompt_ids, output_ids)).astype(np.int64)).to(self._device)
        before_each_output = torch.arange(len(prompt_ids) - 1, len(ids) - 1, device=self._device)
        logits = self._model(input_ids=ids[None], logits_to_keep=before_each_output, use_cache=False).logits[0]  # [T, V]
        piece = _columns(logits, ids[len(prompt_ids) :], top_k)
        return Answer(np.array(output_ids, np.int32), (piece,), "given", self._take_states())

    @torch.inference_mode()
    def _states_of(self, prompt_ids: np.ndarray, output_ids: np.ndarray) -> np.ndarray:
        """States [L, P + T, H] of a sequence that was written, by one more forward pass over it, without the LM head."""
        if not self._config.hidden_layers:
            return NO_STATES
        self._states.clear()
        ids = torch.from_numpy(np.concatenate((prompt_ids, output_ids)).astype(np.int64)).to(self._device)
        self._body(input_ids=ids[None], use_cache=False)
        return self._take_states()

    @torch.inference_mode()
    def _write(self, prompts: list[np.ndarray], uids: list[int], room: list[int], request: RequestConfig) -> list[Answer]:
        """Write a batch, padded on the left, until every sequence has stopped or as many tokens as it has `room` for."""
        sampling = request.sampling
        stop = self.info.eos_token_ids if sampling.stop_token_ids is None else sampling.stop_token_ids
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long, device=self._device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        generators = [torch.Generator(self._device).manual_seed(request_seed(sampling.seed, uid, attempt=0)) for uid in uids]
        finish: list[str | None] = [None] * len(prompts)
        num_written = [0] * len(prompts)
        steps: list[tuple[np.ndarray, np.ndarray]] = []
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        while None in finish:
            self._states.clear()
            out = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            cache = out.past_key_values
            logits = out.logits[:, -1]
            next_ids = _next_tokens(logits, sampling, generators)
            steps.append(_columns(logits, next_ids, request.top_k))
            for row, token in enumerate(next_ids.tolist()):
                if finish[row] is None:
                    num_written[row] += 1
                    finish[row] = "stop" if token in stop else "length" if num_written[row] == room[row] else None
            ids = next_ids[:, None]
            mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
            positions = positions[:, -1:] + 1
        all_ids = np.stack([step_ids for step_ids, _ in steps], axis=1)  # [B, steps, K + 1]
        all_logprobs = np.stack([step_logprobs for _, step_logprobs in steps], axis=1)
        return [
            Answer(
                all_ids[row, :n, 0],
                ((all_ids[row, :n], all_logprobs[row, :n]),),
                str(finish[row]),
                self._states_of(prompts[row], all_ids[row, :n, 0]),
            )
            for row, n in enumerate(num_written)
        ]


def _decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The stack of the model's layers."""
    num_layers = model.config.get_text_config().num_hidden_layers
    return next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    )


def _columns(logits: Tensor, sampled: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, V] -> (ids [N, K + 1] int32, raw log-probabilities [N, K + 1] float32), the sampled token in front."""
    logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
    topk_logprobs, topk_ids = logprobs.topk(top_k, dim=-1)
    ids = torch.cat((sampled[:, None], topk_ids), dim=1)
    values = torch.cat((logprobs.gather(1, sampled[:, None]), topk_logprobs), dim=1)
    return ids.to(torch.int32).cpu().numpy(), values.cpu().numpy()


def _next_tokens(logits: Tensor, sampling: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """Logits [B, V] -> token ids [B], greedily or from the truncated softmax, each row by its own generator."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.sample_top_k < logits.shape[-1]:
        least = logits.topk(sampling.sample_top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # the first token is always inside
        probabilities = probabilities.masked_fill(outside.scatter(1, order, outside), 0.0)
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)
