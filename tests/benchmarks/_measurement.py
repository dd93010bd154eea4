"""Measurements of a training run: seconds per step, matrix rate before and after each step, peak memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import torch

Shape = tuple[int, int]
"""(outputs, inputs) of a linear layer"""
REPEATS = 5
FLOPS_PER_PARAMETER_AND_TOKEN = 4
"""Forward and input gradient; frozen weights have no weight gradient"""


@dataclass(frozen=True)
class Run:
    """Measurements of one process by step; of the first step, the warm-up, only the loss counts."""

    tokens: list[int]
    """Useful tokens: those of the examples, without padding"""
    trained_tokens: list[int]
    seconds: list[float]
    losses: list[float]
    matrix_rates: list[float]
    """FLOP/s before the first step and after each"""
    layer_parameters: int
    head_parameters: int
    peak_rss_bytes: int
    engine_seconds: list[float] | None = None
    """Seconds in forward, backward and optimizer; None if not measured"""

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens per second over the measured steps."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:])

    @property
    def roofline_share(self) -> float:
        """Useful FLOP/s over the matrix rate around the step: median of the measured steps.

        Useful are the layers' products for every token and the head's for trained tokens; LoRA and attention are not
        counted.
        """
        shares = []
        for step in range(1, len(self.seconds)):
            products = self.layer_parameters * self.tokens[step] + self.head_parameters * self.trained_tokens[step]
            rate = (self.matrix_rates[step] + self.matrix_rates[step + 1]) / 2
            shares.append(FLOPS_PER_PARAMETER_AND_TOKEN * products / self.seconds[step] / rate)
        return statistics.median(shares)

    @property
    def outside_share(self) -> float:
        """Share of the time outside forward, backward and optimizer: median of the measured steps."""
        assert self.engine_seconds is not None
        pairs = zip(self.seconds[1:], self.engine_seconds[1:], strict=True)
        return statistics.median(1 - inside / whole for whole, inside in pairs)


class StepClock:
    """Seconds per step; the matrix rate is measured between steps and does not count."""

    def __init__(self, shapes: Mapping[Shape, int], tokens: int) -> None:
        self._shapes, self._tokens = shapes, tokens
        self.seconds: list[float] = []
        self.matrix_rates: list[float] = []
        self._started = 0.0

    def start(self) -> None:
        """Begins the first step."""
        self.matrix_rates.append(matrix_rate(self._shapes, self._tokens))
        self._started = time.perf_counter()

    def lap(self) -> None:
        """Ends a step; the next one begins when this returns."""
        self.seconds.append(time.perf_counter() - self._started)
        self.start()


def layer_shapes(model: torch.nn.Module) -> dict[Shape, int]:
    """Number of 4-bit linear layers of each shape."""
    counts: dict[Shape, int] = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            shape = (module.out_features, module.in_features)
            counts[shape] = counts.get(shape, 0) + 1
    return counts


def parameters(shapes: Mapping[Shape, int]) -> int:
    return sum(count * outputs * inputs for (outputs, inputs), count in shapes.items())


def matrix_rate(shapes: Mapping[Shape, int], tokens: int) -> float:
    """FLOP/s of bf16 products of these shapes, forward (x Wᵀ) and input gradient (grad_y W), weighted by their time."""
    flops, seconds = 0, 0.0
    for (outputs, inputs), count in shapes.items():
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        hidden = torch.randn(tokens, inputs, dtype=torch.bfloat16)
        grad_output = torch.randn(tokens, outputs, dtype=torch.bfloat16)
        seconds += count * (_product_seconds(hidden, weight.t()) + _product_seconds(grad_output, weight))
        flops += count * 2 * (2 * tokens * outputs * inputs)
    return flops / seconds


def peak_rss_bytes() -> int:
    """Peak resident memory of this process (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Median seconds of a matrix product, after a warm-up."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
