"""This service's side, in its own process: `python -m tests.benchmarks._ours LAYERS WORKLOAD` prints `Run` as JSON."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel

from qlora_service.models.adapters import attach_adapter
from qlora_service.models.base.quantize import load_base
from qlora_service.specs import Quantization, Supervised
from qlora_service.training import loop
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import EvaluationMetrics, StepMetrics
from qlora_service.training.network import network
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.objectives import make_objective
from tests.benchmarks._measurement import Run, StepClock, layer_shapes, parameters, peak_rss_bytes
from tests.benchmarks._workload import ADAPTER, SEED, TRAINING, Workload

Layers = Literal["fast", "general"]


class StepRecorder:
    """An observer that measures the time of every step, and its part in forward, backward and optimizer."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.steps: list[StepMetrics] = []
        self.engine_seconds: list[float] = []
        self._step_engine_s = self._switched_at = 0.0
        self._in_engine = False

    def on_step(self, metrics: StepMetrics) -> None:
        self.clock.lap()
        self.steps.append(metrics)
        self.engine_seconds.append(self._step_engine_s)
        self._step_engine_s = 0.0

    def on_evaluation(self, metrics: EvaluationMetrics) -> None:
        if metrics.step == 0:
            self.clock.start()
            self._step_engine_s = 0.0

    def count(self, owner: Any, name: str, *, as_engine: bool) -> None:
        """Patches `owner.name` so that its time counts as forward, backward and optimizer, or does not."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            before = self._switch(as_engine)
            try:
                return function(*arguments, **named)
            finally:
                self._switch(before)

        setattr(owner, name, timed)

    def _switch(self, in_engine: bool) -> bool:
        """Counts the time since the last switch, and returns what it was counted as."""
        now = time.perf_counter()
        if self._in_engine:
            self._step_engine_s += now - self._switched_at
        self._switched_at = now
        before, self._in_engine = self._in_engine, in_engine
        return before


def measure(layers: Layers, work: Workload) -> Run:
    """The measurements of a training like that of a job."""
    model, recorder = _train_ours(layers, work)
    return Run(
        tokens=[step.tokens for step in recorder.steps],
        trained_tokens=[step.trained_tokens for step in recorder.steps],
        seconds=recorder.clock.seconds,
        losses=[step.loss for step in recorder.steps],
        matrix_rates=recorder.clock.matrix_rates,
        layer_parameters=parameters(layer_shapes(model)),
        head_parameters=model.get_output_embeddings().weight.numel(),
        peak_rss_bytes=peak_rss_bytes(),
        engine_seconds=recorder.engine_seconds,
    )


def _train_ours(layers: Layers, work: Workload) -> tuple[PeftModel, StepRecorder]:
    """The trained model and the measurements; the only function that depends on the product's training code."""
    base = load_base(Path(work.model_dir), Quantization(), torch.bfloat16, torch.device("cpu"))
    isolation = isolate_documents(base)
    model = attach_adapter(base, ADAPTER, SEED, total_steps=work.total_steps)
    net = network.Network(model, isolation, fast=layers == "fast")
    if (net.layers == "general") is not (layers == "general"):
        raise RuntimeError(f"requested {layers} layers, the network chose {net.layers}: see Network._choose_paths")
    rows = work.rows()
    recorder = StepRecorder(StepClock(layer_shapes(base), TRAINING.resolved_micro_batch_tokens))
    recorder.count(network.Network, "losses", as_engine=True)
    recorder.count(network, "collate", as_engine=False)
    recorder.count(torch.Tensor, "backward", as_engine=True)
    recorder.count(torch.nn.utils, "clip_grad_norm_", as_engine=True)
    recorder.count(bnb.optim.AdamW, "step", as_engine=True)
    loop.train(
        net,
        make_objective(Supervised()),
        loop.Workload(
            lambda step: work.rows_of_step(rows, step),
            work.rows_of_step(rows, 0)[:1],
            total_steps=work.total_steps,
            evaluate_every=work.total_steps,
        ),
        TRAINING,
        recorder,
        RowLosses(),
    )
    return model, recorder


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], Workload(**json.loads(sys.argv[2]))))))  # type: ignore[arg-type]
