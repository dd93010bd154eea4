"""What a run measures: seconds from step to step, the matrix rate around each, peak memory."""

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
"""Forward and input gradient; the frozen weights have no gradient of their own."""


@dataclass(frozen=True)
class Run:
    """What one process measured, step by step; the first step is the warm-up and counts for nothing but its loss."""

    tokens: list[int]
    """useful tokens: of the examples, without padding"""
    trained_tokens: list[int]
    seconds: list[float]
    losses: list[float]
    matrix_rates: list[float]
    """FLOP/s before the first step and after each"""
    layer_parameters: int
    head_parameters: int
    peak_rss_bytes: int
    engine_seconds: list[float] | None = None
    """Seconds in forward, backward and optimizer; None where it was not looked at."""

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens per second over the measured steps."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:])

    @property
    def roofline_share(self) -> float:
        """Median over the measured steps of the useful FLOP/s over the matrix rate around the step.

        Useful: the layers for every token, the head for trained tokens; LoRA and attention are not counted.
        """
        shares = []
        for step in range(1, len(self.seconds)):
            products = self.layer_parameters * self.tokens[step] + self.head_parameters * self.trained_tokens[step]
            rate = (self.matrix_rates[step] + self.matrix_rates[step + 1]) / 2
            shares.append(FLOPS_PER_PARAMETER_AND_TOKEN * products / self.seconds[step] / rate)
        return statistics.median(shares)

    @property
    def outside_share(self) -> float:
        """Median over the measured steps of the time outside forward, backward and optimizer."""
        assert self.engine_seconds is not None
        pairs = zip(self.seconds[1:], self.engine_seconds[1:], strict=True)
        return statistics.median(1 - inside / whole for whole, inside in pairs)


class StepClock:
    """Seconds from step to step; the matrix rate is measured between them, while the clock stands."""

    def __init__(self, shapes: Mapping[Shape, int], tokens: int) -> None:
        self._shapes, self._tokens = shapes, tokens
        self.seconds: list[float] = []
        self.matrix_rates: list[float] = []
        self._started = 0.0

    def start(self) -> None:
        """The first step begins."""
        self.matrix_rates.append(matrix_rate(self._shapes, self._tokens))
        self._started = time.perf_counter()

    def lap(self) -> None:
        """A step ends; the next one begins when this returns."""
        self.seconds.append(time.perf_counter() - self._started)
        self.start()


def layer_shapes(model: torch.nn.Module) -> dict[Shape, int]:
    """How many 4-bit linear layers there are of each shape."""
    counts: dict[Shape, int] = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            shape = (module.out_features, module.in_features)
            counts[shape] = counts.get(shape, 0) + 1
    return counts


def parameters(shapes: Mapping[Shape, int]) -> int:
    return sum(count * outputs * inputs for (outputs, inputs), count in shapes.items())


def matrix_rate(shapes: Mapping[Shape, int], tokens: int) -> float:
    """FLOP/s of bf16 products of these shapes, forward (x Wᵀ) and input gradient (g W), weighted by their time."""
    flops, seconds = 0, 0.0
    for (outputs, inputs), count in shapes.items():
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        hidden = torch.randn(tokens, inputs, dtype=torch.bfloat16)
        gradient = torch.randn(tokens, outputs, dtype=torch.bfloat16)
        seconds += count * (_product_seconds(hidden, weight.t()) + _product_seconds(gradient, weight))
        flops += count * 2 * (2 * tokens * outputs * inputs)
    return flops / seconds


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def peak_rss_bytes() -> int:
    """Most memory this process held at once (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
