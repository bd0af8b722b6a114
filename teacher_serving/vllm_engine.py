"""A teacher in vLLM: one stepping thread, any number of calling threads, arrays all the way.

In:  tables of PROMPT_SCHEMA (generate) or SEQUENCE_SCHEMA (score), from several threads at once.
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request; a row that could not be answered is an error row.

With vllm_arrays.py and vllm_states.py the only file that imports vllm. One code path for CPU and GPU: vLLM's LLMEngine
is driven by add_request and step, so the requests of all calls share its running batch and a slow sequence holds back
nobody but itself. With VLLM_ENABLE_V1_MULTIPROCESSING=0 the engine lives in this process, else in a child.

Shape letters: P prompt tokens, T output tokens, K top-k entries, C = K + 1 columns (the sampled token in front).
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import vllm
from vllm import EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from teacher_serving.arrow import NOTHING, Answer, ListColumn, answers_table, find_problems, request_seed, same_answer
from teacher_serving.config import RequestConfig, VllmTeacherConfig
from teacher_serving.faults import planned_fault
from teacher_serving.identity import context_limit, cpu_kv_cache_bytes
from teacher_serving.types import TeacherDeadError, TeacherInfo, token_limits
from teacher_serving.vllm_arrays import KeptArrays, pieces_of
from teacher_serving.vllm_states import received_states, settings_for_states

ARRAYS_KEPT_IN = ("0.32.",)
"""vLLM versions whose output processor KeptArrays is known to fit; others take the public flat path."""
SCORING_BYTES = 256 * 2**20
POLL_S = 1.0
"""How often a waiting caller looks whether the engine still lives."""
STALL_S = 60.0
"""How much longer than request_timeout_s one step may take before the engine counts as dead."""


class VllmEngine:
    """A vLLM engine behind the Teacher protocol. Thread-safe; close it when done."""

    def __init__(self, config: VllmTeacherConfig, info: TeacherInfo) -> None:
        self.info = info
        self._config = config
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"
        if config.hidden_layers and config.device == "cpu" and not in_process:
            raise ValueError(
                f"hidden_layers={list(config.hidden_layers)} with VLLM_ENABLE_V1_MULTIPROCESSING=1 on the CPU, where vLLM "
                "then schedules in another process than its model is in; set VLLM_ENABLE_V1_MULTIPROCESSING=0"
            )
        args = _engine_args(config, info)
        self._engine = LLMEngine.from_engine_args(args, enable_multiprocessing=not in_process)
        # vLLM wants room for a token after the last scored one, which a model at its own limit does not have.
        self._score_context = min(info.max_model_len, self._engine.model_config.max_model_len - 1)
        assert self._engine.model_config.logprobs_mode == "raw_logprobs", "log-probabilities must be the raw ones"
        self._empty_fault = planned_fault("teacher", "empty")
        self._waiting: deque[_Request] = deque()
        self._running: dict[str, _Request] = {}
        self._next_id = 0
        self._wakeup = threading.Condition()
        self._closing = False
        self._death: str | None = None
        self._step_began = time.monotonic()
        self._keeps_arrays = False
        self._thread = threading.Thread(target=self._run, name="teacher-engine", daemon=True)
        self._thread.start()
        self._keeps_arrays = vllm.__version__.startswith(ARRAYS_KEPT_IN) and self._kept_arrays_agree()
        gc.collect()
        gc.freeze()  # the engine's objects live as long as it does: no collection need look at them again

    # ---- the Teacher protocol

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        Raises TeacherDeadError once the engine is dead.
        """
        return self._table(prompts, self.generate_answers(prompts))

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        Raises TeacherDeadError once the engine is dead.
        """
        return self._table(sequences, self.score_answers(sequences))

    def probe(self) -> None:
        """Score one sequence of full length, so that too little memory shows now and not in an hour."""
        ids = np.arange(self._score_context, dtype=np.int32) % self.info.vocab_size
        sequence = pa.table({"uid": [0], "prompt_ids": [ids[:1]], "output_ids": [ids[1:]]})
        (answer,) = self.score_answers(sequence)
        if answer.finish_reason != "given":
            raise TeacherDeadError(f"the engine could not score {len(ids)} tokens: {answer.finish_reason}")

    def problem(self) -> str | None:
        """Why this teacher can answer nothing any more; None while it can."""
        return self._death or self._engine_problem()

    def close(self) -> None:
        """Stop the stepping thread and the engine; callers still waiting get TeacherDeadError. Idempotent."""
        with self._wakeup:
            if self._closing:
                return
            self._closing = True
            self._wakeup.notify()
        if self._death is None:
            self._thread.join()
        self._engine.engine_core.shutdown()

    # ---- answers in full precision, before they become a table

    def generate_answers(self, prompts: pa.Table, request: RequestConfig | None = None) -> list[Answer]:
        """As generate, an Answer a row. `request`: in place of the config's own settings."""
        request = request or self._config.request
        context = request.context(self.info.max_model_len)
        prompt = ListColumn.of(prompts, "prompt_ids")
        uids = prompts.column("uid").to_pylist()
        sampling, top_k = request.sampling, request.top_k
        stop = self.info.eos_token_ids if sampling.stop_token_ids is None else sampling.stop_token_ids
        limits = token_limits(prompts, sampling.max_tokens)

        def asked_for(row: int, attempt: int) -> _Request:
            prompt_ids = prompt.row(row).tolist()
            params = _sampling_params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.sample_top_k,
                seed=None if sampling.temperature == 0.0 else request_seed(sampling.seed, uids[row], attempt),
                max_tokens=min(limits[row], context - len(prompt_ids)),
                stop_token_ids=list(stop),
                logprobs=top_k,
            )
            return _Request(prompt_ids, params)

        problems = find_problems(prompts, self.info, context=context)
        answers = [Answer.error(problem or "the teacher was not asked") for problem in problems]
        open_rows = [row for row, problem in enumerate(problems) if problem is None]
        for attempt in range(self._config.max_retries + 1):
            requests = [asked_for(row, attempt) for row in open_rows]
            self._ask(requests)
            for row, asked in zip(open_rows, requests, strict=True):
                answers[row] = self._written(asked, uids[row])
            open_rows = [row for row in open_rows if answers[row].finish_reason == NOTHING.finish_reason]
            if not open_rows:
                break
        return answers

    def score_answers(self, sequences: pa.Table, request: RequestConfig | None = None) -> list[Answer]:
        """As score, an Answer a row. `request`: in place of the config's own settings."""
        request = request or self._config.request
        prompt = ListColumn.of(sequences, "prompt_ids")
        output = ListColumn.of(sequences, "output_ids")
        problems = find_problems(sequences, self.info, context=request.context(self._score_context))
        rows = [row for row, problem in enumerate(problems) if problem is None and output.lengths[row]]
        params = _sampling_params(temperature=0.0, max_tokens=1, prompt_logprobs=request.top_k)
        requests = [_Request(np.concatenate((prompt.row(row), output.row(row))).tolist(), params) for row in rows]
        self._ask(requests)
        empty = Answer(np.empty(0, np.int32), (), "given")
        answers = [empty if problem is None else Answer.error(problem) for problem in problems]
        for row, asked in zip(rows, requests, strict=True):
            answers[row] = self._scored(asked, prompt.lengths[row], output.row(row))
        return answers

    # ---- the callers' side

    def _table(self, rows: pa.Table, answers: Sequence[Answer]) -> pa.Table:
        return answers_table(rows, answers, self.info, self._config.top_k, self._config.weight_version)

    def _ask(self, requests: list[_Request]) -> None:
        """Hand the requests to the stepping thread and wait until each is answered or given up."""
        with self._wakeup:
            if self._death or self._closing:
                raise TeacherDeadError(self._death or "the teacher is closed")
            self._waiting.extend(requests)
            self._wakeup.notify()
        pending = {request.done for request in requests}
        while pending:
            done, pending = wait_for(pending, timeout=POLL_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises TeacherDeadError
            if pending and (problem := self._engine_problem()):
                self._die(problem)  # the stepping thread hangs in vLLM and cannot say it

    def _engine_problem(self) -> str | None:
        """What keeps the engine from ever finishing its step, seen from outside the stepping thread."""
        resources = getattr(self._engine.engine_core, "resources", None)  # of an engine in a child process
        if resources is not None and resources.engine_dead:
            return "the engine's process has ended"
        stuck_s = time.monotonic() - self._step_began
        if self._running and stuck_s > self._config.request_timeout_s + STALL_S:
            return f"the engine has not finished a step for {stuck_s:.0f} s"
        return None

    def _written(self, asked: _Request, uid: int) -> Answer:
        output = asked.done.result()
        if isinstance(output, str):
            return Answer.error(output)
        completion = output.outputs[0]
        if not completion.token_ids or (self._empty_fault is not None and self._empty_fault.strikes(uid=uid)):
            return NOTHING
        if completion.finish_reason not in ("stop", "length"):
            return Answer.error(f"the engine finished with {completion.finish_reason}")
        output_ids = np.asarray(completion.token_ids, np.int32)
        pieces = pieces_of(completion.logprobs, len(output_ids), asked.params.logprobs or 0)
        states = received_states(output, self._config.hidden_layers, len(asked.prompt_ids) + len(output_ids))
        return Answer(output_ids, pieces, completion.finish_reason, states)

    def _scored(self, asked: _Request, prompt_length: int, output_ids: np.ndarray) -> Answer:
        output = asked.done.result()
        if isinstance(output, str):
            return Answer.error(output)
        pieces = pieces_of(output.prompt_logprobs, len(asked.prompt_ids) - 1, asked.params.prompt_logprobs or 0)
        first = prompt_length - 1  # this row says what follows the prompt
        ids, logprobs = (np.concatenate(parts)[first:] for parts in zip(*pieces, strict=True))
        states = received_states(output, self._config.hidden_layers, len(asked.prompt_ids))
        return Answer(output_ids, ((ids, logprobs),), "given", states)

    # ---- the stepping thread: nothing else touches the engine while it runs

    def _run(self) -> None:
        try:
            while self._admit():
                # Without a request in it, an engine in a child process would be waited for for ever.
                for output in self._engine.step() if self._running else ():
                    assert isinstance(output, RequestOutput), f"expected written text, found {type(output).__name__}"
                    if request := self._running.pop(output.request_id, None):
                        request.done.set_result(output)
                self._give_up_late_requests()
            self._die("the teacher was closed")
        except Exception as error:  # whatever broke the engine, its callers must not wait for ever
            self._die(f"{type(error).__name__}: {error}")

    def _admit(self) -> bool:
        """Wait for work and pass it to the engine, a few sequences more than it runs. False: close."""
        room = self._config.max_num_seqs + self._config.max_num_seqs // 8 + 1
        with self._wakeup:
            while not (self._waiting or self._running or self._closing):
                self._wakeup.wait()
            if self._closing:
                return False
            now = time.monotonic()
            self._step_began = now
            admitted: dict[str, _Request] = {}
            while self._waiting and len(self._running) + len(admitted) < room:
                request = self._waiting.popleft()
                request.deadline = now + self._config.request_timeout_s
                admitted[str(self._next_id)] = request
                self._next_id += 1
            self._running.update(admitted)
        for name, request in admitted.items():
            self._add(name, request)
        return True

    def _add(self, name: str, request: _Request) -> None:
        try:
            internal = self._engine.add_request(name, tokens_input(request.prompt_ids), request.params)
        except (ValueError, VLLMValidationError) as error:  # vLLM refuses this one; the others go on
            self._running.pop(name).done.set_result(f"vLLM refused the request: {error}")
            return
        if self._keeps_arrays:
            state = self._engine.output_processor.request_states[internal]
            # Stands in for vLLM's own processor without inheriting its lists; checked against it at start-up.
            state.logprobs_processor = KeptArrays()  # type: ignore[assignment]  (all of it that is read)

    def _give_up_late_requests(self) -> None:
        now = time.monotonic()
        late = [name for name, request in self._running.items() if now > request.deadline]
        if late:
            self._engine.abort_request(late)
            for name in late:
                reason = f"no answer within request_timeout_s={self._config.request_timeout_s:g} s"
                self._running.pop(name).done.set_result(reason)

    def _die(self, reason: str) -> None:
        with self._wakeup:
            self._death = self._death or reason
            abandoned = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for request in abandoned:
            request.done.set_exception(TeacherDeadError(reason))

    # ---- start-up check of the array path

    def _kept_arrays_agree(self) -> bool:
        """Whether the array path gives what vLLM's public flat path gives, for written and for given text."""
        sequence = pa.table({"uid": [0], "prompt_ids": [[0]], "output_ids": [[1]]})
        greedy = _sampling_params(temperature=0.0, max_tokens=3, logprobs=self._config.top_k)

        def both() -> list[Answer]:
            request = _Request([0], greedy)
            self._ask([request])
            return [self._written(request, uid=0), *self.score_answers(sequence)]

        self._keeps_arrays = False
        flat = both()
        self._keeps_arrays = True
        kept = both()
        return all(same_answer(a, b) for a, b in zip(flat, kept, strict=True))


@dataclass(eq=False)
class _Request:
    """One sequence on its way through the engine. `done` holds vLLM's output, or why there is none."""

    prompt_ids: list[int]
    params: SamplingParams
    done: Future[RequestOutput | str] = field(default_factory=Future)
    deadline: float = float("inf")  # on the monotonic clock, from its admission


def _sampling_params(**settings: Any) -> SamplingParams:
    """vLLM's settings of one request, with what is the same for all of ours."""
    return SamplingParams(
        ignore_eos=True,  # the stop tokens are the whole list
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **settings,
    )


def _engine_args(config: VllmTeacherConfig, info: TeacherInfo) -> EngineArgs:
    assert config.device != "auto", "resolve the device first: connect.resolve_device"
    on_cpu = config.device == "cpu"
    model_limit = max(context_limit(Path(config.model)), info.max_model_len)
    batched_tokens = config.max_num_batched_tokens or int(
        np.clip(SCORING_BYTES // (8 * info.vocab_size), max(512, config.max_num_seqs), 8192)
    )
    if batched_tokens < config.max_num_seqs:
        raise ValueError(
            f"max_num_batched_tokens={batched_tokens} is below max_num_seqs={config.max_num_seqs}; expected at least it"
        )
    return EngineArgs(
        model=config.model,
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=config.dtype,
        # One more than asked for where the model has it: a scored sequence needs room for a token nobody wants.
        max_model_len=min(info.max_model_len + 1, model_limit),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        max_logprobs=config.top_k,
        logprobs_mode="raw_logprobs",
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes or (cpu_kv_cache_bytes(config, info) if on_cpu else None),
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=on_cpu,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        seed=config.sampling.seed % 2**31,
        **settings_for_states(config.hidden_layers),
    )
