"""Several teachers of one vocabulary as one: every row is answered by the teacher that it is for.

In:  tables of PROMPT_SCHEMA or SEQUENCE_SCHEMA with a column `for_teacher` beside them, from several threads at once.
Out: tables of TEACHER_OUTPUT_SCHEMA in the order of the request; `teacher_id` says who answered, `teacher_fingerprint` is
     that of all together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from teacher_serving.config import SeveralTeachersConfig
from teacher_serving.connect import connect, contact
from teacher_serving.identity import describe
from teacher_serving.types import FOR_TEACHER, TEACHER_OUTPUT_SCHEMA, Teacher, TeacherInfo


def teacher_for(uid: int, weights: Mapping[str, float], seed: int) -> str:
    """Who answers a row that names no teacher: the same one every time, and each as often as its weight says.

    Every teacher draws a time until it comes, at a rate of its weight, from a hash of seed, uid and its name; the first one
    has the row. So only rows that go to, or from, a teacher whose weight has changed are another's than before.
    """

    def time_of(name: str) -> float:
        drawn = hashlib.blake2b(f"{seed} {uid} {name}".encode(), digest_size=8).digest()
        return -math.log((int.from_bytes(drawn, "little") + 0.5) / 2**64) / weights[name]

    return min((name for name, weight in weights.items() if weight > 0), key=time_of)


def describe_several(config: SeveralTeachersConfig) -> TeacherInfo:
    """What all of them can deliver. Raises ValueError where one cannot be asked, or has another vocabulary.

    The weights are no part of the fingerprint: who answers a row is part of the row's uid.
    """
    infos: dict[str, TeacherInfo] = {}
    for name in config.teachers:
        try:
            infos[name] = describe(config.config_of(name))
        except ValueError as error:
            raise ValueError(f"teacher.teachers.{name}: {error}") from error
    parts = "".join(f"{name} {infos[name].fingerprint}\n" for name in sorted(infos))
    return TeacherInfo(
        teacher_id=config.teacher_id or "+".join(infos),
        fingerprint=hashlib.sha256(parts.encode()).hexdigest()[:32],
        vocabulary_fingerprint=next(iter(infos.values())).vocabulary_fingerprint,  # that of teacher.tokenizer
        vocab_size=max(info.vocab_size for info in infos.values()),
        max_model_len=min(info.max_model_len for info in infos.values()),
        eos_token_ids=tuple(dict.fromkeys(token for info in infos.values() for token in info.eos_token_ids)),
    )


def contact_several(config: SeveralTeachersConfig, *, scoring: bool) -> str:
    """What each says it gives (connect.contact)."""
    said = {name: contact(own := config.config_of(name), describe(own), scoring=scoring) for name in config.teachers}
    return "; ".join(f"{name}: {words}" for name, words in said.items() if words)


class SeveralTeachers:
    """A client of each, behind the Teacher protocol. Thread-safe."""

    def __init__(self, config: SeveralTeachersConfig, info: TeacherInfo, ledger: Path | None = None) -> None:
        self.info = info
        self._teachers: dict[str, Teacher] = {}
        for name in config.teachers:
            own = ledger and ledger.with_name(f"{ledger.stem}-{name}{ledger.suffix}")
            self._teachers[name] = connect(config.config_of(name), ledger=own)

    def generate(self, prompts: pa.Table) -> pa.Table:
        """Write a completion for every row of PROMPT_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        Errors: those of the teachers.
        """
        return self._answers("generate", prompts)

    def score(self, sequences: pa.Table) -> pa.Table:
        """Top-k at every output position of SEQUENCE_SCHEMA; return TEACHER_OUTPUT_SCHEMA in the same order.

        Errors: those of the teachers.
        """
        return self._answers("score", sequences)

    def probe(self) -> None:
        """Nothing: none of them is loaded here."""

    def close(self) -> None:
        """End the connections. Idempotent."""
        for teacher in self._teachers.values():
            teacher.close()

    def _answers(self, method: str, rows: pa.Table) -> pa.Table:
        if not rows.num_rows:
            return TEACHER_OUTPUT_SCHEMA.empty_table()
        names = rows[FOR_TEACHER].to_numpy()
        places = {name: np.flatnonzero(names == name) for name in self._teachers}
        places = {name: place for name, place in places.items() if len(place)}
        order = np.concatenate(list(places.values()))
        assert len(order) == rows.num_rows, f"rows for {set(names)}, but teachers {set(self._teachers)}"
        with ThreadPoolExecutor(len(places)) as threads:  # at once: none waits for another
            running = [
                threads.submit(getattr(self._teachers[name], method), rows.take(pa.array(place)).drop_columns(FOR_TEACHER))
                for name, place in places.items()
            ]
            answers = pa.concat_tables(one.result() for one in running)
        answers = answers.take(pa.array(np.argsort(order))).combine_chunks()
        place = answers.schema.get_field_index("teacher_fingerprint")
        return answers.set_column(place, "teacher_fingerprint", pa.repeat(self.info.fingerprint, answers.num_rows))
