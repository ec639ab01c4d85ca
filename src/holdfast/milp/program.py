"""The mixed-integer program whose feasible points are the forward passes of a ReLU network, and bounds to shrink it."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .network import Affine, Array, interval

TIE = 1e-6  # of the logits' scale: a logit difference within +- this of zero is called neither robust nor broken
ANY = 1e9  # a relative gap to the optimum so wide that the first feasible point ends the search
ACCURACY = 1e-5  # of the logits' scale: a search for the optimum ends this near to it
HIGHS_PRINTF = b"HighsMipSolverData::transformNewIntegerFeasibleSolution"  # starts a debugging line that HiGHS prints
DUAL = 1e-7  # HiGHS's tolerance on reduced costs: the error of a bound, for each unit of a variable's range


def preactivation_bounds(net: list[Affine], box: tuple[Array, Array]) -> list[tuple[Array, Array]]:
    """(low, high) of each layer's outputs before the ReLU: the tighter of intervals and back-substitution."""
    bounds: list[tuple[Array, Array]] = []
    low, high = box
    for number in range(len(net)):
        by_interval = interval(net[number], low, high)
        top = back_substitution(net[: number + 1], box, bounds)
        weight, bias = net[number]
        bottom = -back_substitution([*net[:number], (-weight, -bias)], box, bounds)
        bounds.append((np.maximum(by_interval[0], bottom), np.minimum(by_interval[1], top)))
        low, high = (np.maximum(side, 0) for side in bounds[-1])
    return bounds


def back_substitution(net: list[Affine], box: tuple[Array, Array], bounds: list[tuple[Array, Array]]) -> Array:
    """Upper bounds of the last layer's outputs as linear functions of x (CROWN, Zhang et al. 2018).

    An unstable ReLU is bounded by its chord from above, and by 0 or z from below, whichever leaves the smaller area.
    """
    weight, bias = net[-1]
    for (before, offset), (low, high) in zip(net[-2::-1], bounds[len(net) - 2 :: -1], strict=True):
        off, on = high <= 0, low >= 0
        slope = np.where(on, 1.0, np.where(off, 0.0, high / np.where(on | off, 1.0, high - low)))
        lift = np.where(on | off, 0.0, -low * slope)
        under = np.where(on, 1.0, np.where(off, 0.0, (high > -low).astype(float)))
        plus, minus = np.maximum(weight, 0), np.minimum(weight, 0)
        bias = bias + plus @ lift
        weight = plus * slope + minus * under
        weight, bias = weight @ before, bias + weight @ offset
    return interval((weight, bias), *box)[1]


def tighten(
    net: list[Affine], box: tuple[Array, Array], bounds: list[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    """The bounds, made tighter for the unstable ReLUs beyond the first layer by linear programs.

    The mixed-integer program then has fewer binary variables and smaller big-M constants.
    """
    tight = bounds[:1]
    for number in range(1, len(net) - 1):
        low, high = (side.copy() for side in bounds[number])
        program = Program.of(net[:number], box, tight)
        weight, bias = net[number]
        for i in np.flatnonzero((low < 0) & (high > 0)):
            high[i] = min(high[i], program.relaxation(weight[i], bias[i])[0] + program.slack)
            if high[i] > 0:
                low[i] = max(low[i], -program.relaxation(-weight[i], -bias[i])[0] - program.slack)
        tight = [*tight, (low, high)]
    top = back_substitution(net, box, tight)
    return [*tight, (bounds[-1][0], np.minimum(bounds[-1][1], top))]


@dataclass(frozen=True)
class Program:
    """A mixed-integer program whose feasible points are the forward passes of a ReLU network over a box.

    Variables: x, then for each hidden layer its activations a and a binary d for each unstable ReLU. With z = W a + b
    of the layer before, in [l, u]:  a >= 0,  a >= z,  a <= z - l (1 - d),  a <= u d;  always on: a = z, always off: 0.
    """

    rows: csr_array
    low: Array
    high: Array
    lower: Array
    upper: Array
    binary: NDArray[np.bool_]
    last: slice  # the activations that the last layer reads
    width: int  # how many of the variables are x: the first ones

    @staticmethod
    def of(hidden: list[Affine], box: tuple[Array, Array], bounds: list[tuple[Array, Array]]) -> Program:
        """The program of these hidden layers; bounds: those of their pre-activations, and perhaps of later layers."""
        unstable = [np.flatnonzero((low < 0) & (high > 0)) for low, high in bounds[: len(hidden)]]
        count = len(box[0]) + sum(len(b) + len(u) for (_, b), u in zip(hidden, unstable, strict=True))
        lower, upper, binary = np.zeros(count), np.ones(count), np.zeros(count, dtype=bool)
        last, end = slice(0, len(box[0])), len(box[0])
        lower[last], upper[last] = box
        blocks = [np.zeros((0, count))]
        lows, highs = [np.zeros(0)], [np.zeros(0)]
        for (weight, bias), (low, high), loose in zip(hidden, bounds, unstable, strict=False):
            now, end = slice(end, end + len(bias)), end + len(bias) + len(loose)
            bits = np.arange(now.stop, end)
            lower[now], upper[now] = np.maximum(low, 0), np.maximum(high, 0)
            binary[bits] = True
            kept = np.flatnonzero(high > 0)  # the others are always off: their bounds say a = 0
            above = np.zeros((len(bias), count))  # a - z >= 0, and a - z = 0 if it is always on
            above[:, now] = np.eye(len(bias))
            above[:, last] = -weight
            below, under = above[loose], np.zeros((len(loose), count))
            below[np.arange(len(loose)), bits] = -low[loose]
            under[np.arange(len(loose)), now.start + loose] = 1
            under[np.arange(len(loose)), bits] = -high[loose]
            blocks += [above[kept], below, under]
            lows += [bias[kept], np.full(2 * len(loose), -np.inf)]
            highs += [np.where(low >= 0, bias, np.inf)[kept], bias[loose] - low[loose], np.zeros(len(loose))]
            last = now
        return Program(
            csr_array(np.vstack(blocks)), np.hstack(lows), np.hstack(highs), lower, upper, binary, last, len(box[0])
        )

    def relaxation(self, weight: Array, bias: float) -> tuple[float, Array]:
        """An upper bound of w a + b, a the last activations, by the linear relaxation, and the x of its optimum."""
        answer = self._solve(weight, integers=False)
        if answer.status != 0:  # numerical trouble: no bound
            return np.inf, (self.lower + self.upper)[: self.width] / 2
        return bias - float(answer.fun), answer.x[: self.width]

    def search(self, weight: Array, bias: float, least: float, until: float) -> tuple[str, list[Array]]:
        """Look for forward passes with w a + b >= least: (state, their x, the best first).

        state: "infeasible" if there are none, "feasible" if some were found, "late" if time ran out.
        """
        seconds = until - time.perf_counter()
        if seconds <= 0:
            return "late", []
        answer = self._solve(weight, least=least - bias, seconds=seconds)
        if answer.status == 2:
            return "infeasible", []
        if answer.x is None:
            return "late", []
        return "feasible", self.polished(weight, answer.x)

    def maximum(self, weight: Array, bias: float, least: float, until: float) -> tuple[str, float, list[Array]]:
        """Maximise w a + b: (state, top, points). No forward pass has w a + b > top + ``slack``.

        state: "infeasible" if no forward pass reaches ``least``, which is then top; "feasible" if top is within
        ``ACCURACY`` of one that was found; "late" if time ran out, and top is the best bound so far.
        points: the x of the best forward passes found, the best first.
        """
        if not self.binary.any():
            top, point = self.relaxation(weight, bias)
            return "feasible", top, [point]
        seconds = until - time.perf_counter()
        if seconds <= 0:
            return "late", np.inf, []
        answer = self._solve(weight, least=least - bias, seconds=seconds, gap=ACCURACY)
        if answer.status == 2:
            return "infeasible", least, []
        # The dual bound covers forward passes with w a + b >= least; least bounds all others.
        bounded = answer.status in (0, 1) and answer.mip_dual_bound is not None  # else: numerical trouble
        top = max(bias - float(answer.mip_dual_bound), least) if bounded else np.inf
        state = "feasible" if answer.status == 0 else "late"
        return state, top, [] if answer.x is None else self.polished(weight, answer.x)

    def polished(self, weight: Array, solution: Array) -> list[Array]:
        """The best x of the linear region that a solution lies in, and the solution's own x."""
        fixed = self._solve(weight, integers=False, pattern=np.round(solution))
        points = [solution[: self.width]]
        return [fixed.x[: self.width], *points] if fixed.status == 0 else points

    @property
    def slack(self) -> float:
        """By how much HiGHS's tolerances and float32's rounding can exceed a bound."""
        return 4 * TIE + DUAL * float((self.upper - self.lower).sum())

    def _solve(
        self,
        weight: Array,
        *,
        integers: bool = True,
        least: float | None = None,
        pattern: Array | None = None,
        seconds: float | None = None,
        gap: float = ANY,
    ) -> Any:
        cost = np.zeros(len(self.lower))
        cost[self.last] = -weight
        constraints = [LinearConstraint(self.rows, self.low, self.high)] if self.rows.shape[0] else []
        if least is not None:
            constraints.append(LinearConstraint(csr_array(-cost[None]), least, np.inf))
        lower, upper = self.lower, self.upper
        if pattern is not None:
            lower, upper = (np.where(self.binary, pattern, side) for side in (lower, upper))
        # Presolve doubles the time that these programs take.
        options = {"mip_rel_gap": gap, "presolve": False} | ({} if seconds is None else {"time_limit": seconds})
        with _without_highs_printf():
            return milp(
                cost,
                integrality=self.binary.astype(int) if integers else None,
                bounds=Bounds(lower, upper),
                constraints=constraints,
                options=options,
            )


@contextmanager
def _without_highs_printf() -> Iterator[None]:
    """Drop a debugging line that HiGHS prints. Anything else that C code prints meanwhile is printed afterwards.

    With that line, the output of a command that prints JSON could not be parsed.
    """
    try:
        flush = ctypes.CDLL(None).fflush
        sys.stdout.flush()
        flush(None)
        kept = os.dup(1)
    except (OSError, AttributeError, TypeError, ValueError):  # no libc, or no stdout
        yield
        return
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        try:
            yield
        finally:
            flush(None)
            os.dup2(kept, 1)
            os.close(kept)
            printed.seek(0)
            for line in printed:
                if HIGHS_PRINTF not in line:
                    os.write(1, line)
