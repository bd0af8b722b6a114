"""Served against reference in figures, and the gates that they must pass before a student is handed out.

In:  log-probabilities of the same tokens from an engine and from the reference.
Out: `ServingReport`, and what in it is beyond `Gates`.

INT8 linear layers agree to the bit on equal inputs. What is left comes from codes that flip where attention and norms
differ in the last bit, so it is a matter of tails: gates are on mean, 99th percentile and likelihood, never on the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Served:
    """What an engine says about S sequences."""

    logprobs: list[np.ndarray]  # [T-1] of every token after the first
    written: list[np.ndarray]  # greedy continuation of every sequence's first half
    kernels: dict[str, str]  # INT8 layer -> kernel


class Floor(NamedTuple):
    """What two correct implementations differ by, in nats a token: nothing that is served can be told from it."""

    mean: float
    p99: float


@dataclass(frozen=True)
class Referred:
    """What the reference says about the same."""

    logprobs: list[np.ndarray]
    agrees: list[np.ndarray]  # whether each written token is the reference's most likely one
    floor: Floor | None = None


@dataclass(frozen=True)
class Gates:
    """What may differ, in nats a token. None: no gate."""

    mean: float
    p99: float | None = None
    nll: float | None = None
    greedy_agreement: float | None = None


FLOAT32 = Gates(mean=1e-3, p99=1.5e-2, nll=2e-4, greedy_agreement=0.99)
BFLOAT16 = Gates(mean=3e-2, nll=3e-3)
"""Of a model that is not quantised: what two engines differ by in bfloat16."""


def int8_gates(dtype: str, floor: Floor) -> Gates:
    """Gates of an INT8 model: FLOAT32, or a little beyond the floor of the same run.

    One flipped code moves all later ones of its token and of those behind it: in deep models the floor is above FLOAT32.
    """
    if dtype == "bfloat16":
        return Gates(mean=6 * floor.mean, nll=2e-3)
    return Gates(
        mean=max(FLOAT32.mean, 2 * floor.mean),
        p99=max(FLOAT32.p99 or 0.0, 2 * floor.p99),
        nll=max(FLOAT32.nll or 0.0, floor.mean / 10),
        greedy_agreement=FLOAT32.greedy_agreement,
    )


@dataclass(frozen=True)
class ServingReport:
    """Served against reference; differences of log-probabilities in nats, absolute unless they have a sign."""

    dtype: str
    num_tokens: int
    mean: float
    p99: float
    max: float
    nll: float  # of the reference
    nll_difference: float  # served - reference
    greedy_agreement: float
    int8_layers: list[str]  # that the folder holds
    float_layers: list[str]  # of these, those that vLLM computes in float after all
    kernels: list[str]  # names of the kernels of the others
    floor: Floor | None = None  # float32: of the reference with noise in the last bit; bfloat16: of the float twin

    def problems(self, gates: Gates) -> list[str]:
        """Everything beyond the gates, each with what was found and what was expected."""
        limits = {
            "mean difference of log-probabilities": (self.mean, gates.mean),
            "its 99th percentile": (self.p99, gates.p99),
            "difference of the mean likelihood": (abs(self.nll_difference), gates.nll),
        }
        found = [f"{n}: found {v:.2g}, expected at most {g:.2g}" for n, (v, g) in limits.items() if g and not v <= g]
        if gates.greedy_agreement and not self.greedy_agreement >= gates.greedy_agreement:
            found.append(
                f"greedy agreement: found {self.greedy_agreement:.2%}, expected at least {gates.greedy_agreement:.0%}"
            )
        if self.float_layers:
            found.append(f"{len(self.float_layers)} INT8 layers are served in float, such as {self.float_layers[0]}")
        return found


def gates_for(report: ServingReport) -> Gates:
    """The gates of what was served."""
    if not report.int8_layers:
        return FLOAT32 if report.dtype == "float32" else BFLOAT16
    assert report.floor is not None, "an INT8 model has a floor: its own in float32, that of its float twin in bfloat16"
    return int8_gates(report.dtype, report.floor)


def compare(served: Served, referred: Referred, int8_layers: list[str], dtype: str) -> ServingReport:
    """The figures of a report."""
    ours, reference = np.concatenate(served.logprobs), np.concatenate(referred.logprobs)
    difference = np.abs(ours - reference)
    return ServingReport(
        dtype=dtype,
        num_tokens=len(ours),
        mean=float(difference.mean()),
        p99=float(np.quantile(difference, 0.99)),
        max=float(difference.max()),
        nll=float(-reference.mean(dtype=np.float64)),
        nll_difference=float((reference - ours).mean(dtype=np.float64)),
        greedy_agreement=float(np.concatenate(referred.agrees).mean()),
        int8_layers=int8_layers,
        float_layers=[name for name in int8_layers if name not in served.kernels],
        kernels=sorted(set(served.kernels.values())),
        floor=referred.floor,
    )
