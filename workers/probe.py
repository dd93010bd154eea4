"""Times the longest step of a planned job: `python -m workers.probe KEY DEVICE`, a child process of the supervisor.

The process exits when its supervisor ends (its stdin closes). It may be killed at any time: a later process repeats
the probe.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

# Set before the libraries read them: no network, no progress bars.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from qlora_service.process.startup import end_process, importing_torch

with importing_torch():
    import structlog
    import torch
    from transformers.utils.logging import disable_progress_bar

    from qlora_service.domain.clock import utc_now
    from qlora_service.errors import InvalidModel, QLoRAError
    from qlora_service.models.adapters import attach_adapter, prune_after_step, trainable_parameters
    from qlora_service.models.base.load import load_cached_base
    from qlora_service.models.base.quantized_cache import QuantizedCache
    from qlora_service.models.catalog.catalog import Catalog
    from qlora_service.planning.largest_step import largest_step
    from qlora_service.planning.simulation.tracked_step import examples_of, tracking
    from qlora_service.process.child import exit_when_stdin_closes
    from qlora_service.process.logging import configure_logging
    from qlora_service.settings import Settings
    from qlora_service.specs import JobSpec
    from qlora_service.store.database import Database, persist
    from qlora_service.store.probes import find_probe, finish_probe
    from qlora_service.training.device import choose_device, compute_dtype, device_name, synchronize
    from qlora_service.training.network.isolation import isolate_documents
    from qlora_service.training.network.micro_batch import TrainingExample
    from qlora_service.training.network.network import Network
    from qlora_service.training.objectives import evaluate, make_objective
    from qlora_service.training.optimizer import managed_optimizer
    from qlora_service.training.step import StepGradients, example_tokens
    from workers.trainer.step_memory import peak_memory

DATABASE_PATIENCE_S = 30.0

log = structlog.get_logger()


class DoesNotFit(Exception):
    """The device has too little memory for the planned step."""


def main(key: str, device: str, settings: Settings) -> None:
    """Times the probe's step on `device` (cuda or cpu) and stores the figures, or the error."""
    threading.Thread(target=exit_when_stdin_closes, name="supervisor", daemon=True).start()
    disable_progress_bar()
    database = Database(settings.resolved_database_url)
    with database.read() as connection:
        probe = find_probe(connection, key)
    if probe is None or probe.result is not None:
        return
    try:
        result = timed_step(
            probe.request,
            Catalog(settings.models_dir),
            QuantizedCache(settings.cache_dir, settings.cache_bytes),
            choose_device(needs_gpu=device == "cuda"),
        )
    except (DoesNotFit, QLoRAError) as error:
        result = {"error": str(error)}
    except Exception as error:
        # The text of an unexpected error stays in the log: it may quote paths.
        log.exception("probe_failed", key=key)
        result = {"error": f"the probe failed with an unexpected {type(error).__name__}; the worker's log has more"}

    def store() -> None:
        with database.write() as connection:
            finish_probe(connection, key, result, utc_now())

    persist(store, DATABASE_PATIENCE_S)
    database.close()


def timed_step(
    request: Mapping[str, Any], catalog: Catalog, cache: QuantizedCache, device: torch.device
) -> dict[str, Any]:
    """Seconds of loading, of a step and of an evaluation, and the memory of the step.

    Raises:
        DoesNotFit: the device ran out of memory.
        InvalidModel: the base model has changed since the probe was requested.
    """
    spec = JobSpec.model_validate(request["spec"])
    base = catalog.get(spec.base_model)
    if base.weights_sha256 != request["base_weights_sha256"]:
        raise InvalidModel(f"base model {base.name} has other weights than when the probe was requested: plan again")
    started_at = time.perf_counter()
    dtype = compute_dtype(spec.quantization.compute_dtype, device)
    model, _ = load_cached_base(cache, base, spec.quantization, dtype, device)
    network = Network(
        attach_adapter(model, spec.adapter, spec.training.seed),
        isolate_documents(model),
        checkpointing=request["checkpointing"],
        neftune_noise_alpha=spec.training.neftune_noise_alpha,
    )
    loading_s = time.perf_counter() - started_at
    budget_tokens, longest_tokens = request["micro_batch_tokens"], request["longest_tokens"]
    step = largest_step(spec, micro_batch_tokens=budget_tokens, longest_tokens=longest_tokens)
    examples = examples_of(step, spec.objective)
    return {"device": device_name(device), "loading_s": loading_s} | _measure(
        network, spec, examples, max(budget_tokens, step.tokens), is_whole_step=step.is_whole_step
    )


def _measure(
    network: Network,
    spec: JobSpec,
    examples: list[TrainingExample],
    micro_batch_tokens: int,
    *,
    is_whole_step: bool,
) -> dict[str, Any]:
    """Time and memory of a step of one micro-batch, and the speed of an evaluation.

    One warm-up step, one timed step, and on a CPU one step whose tensors are tracked. Unless `is_whole_step`,
    gradients of earlier micro-batches are present, as in the real step.
    """
    objective = make_objective(spec.objective)
    training = spec.training.model_copy(update={"micro_batch_tokens": micro_batch_tokens})
    gradients = StepGradients(network, objective, training, _raise_does_not_fit)
    model, device = network.model, network.device
    model.train()
    with managed_optimizer(model, training, device) as optimizer:

        def run_step(step: int) -> float:
            """Seconds of the step."""
            if not is_whole_step:
                for parameter in trainable_parameters(model):
                    parameter.grad = torch.zeros_like(parameter)
            synchronize(device)
            started_at = time.perf_counter()
            gradients.compute(step, examples)
            torch.nn.utils.clip_grad_norm_(trainable_parameters(model), training.max_grad_norm)
            optimizer.step()
            prune_after_step(model, step + 1)
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            return time.perf_counter() - started_at

        run_step(0)
        seconds = run_step(1)
        memory = peak_memory(device)
        if memory is None:
            with tracking(model, optimizer) as tracker:
                run_step(2)
            memory = {"allocated": tracker.peak, "source": "tensors of a step"}
    started_at = time.perf_counter()
    evaluate(network, objective, examples[:1])
    synchronize(device)
    return {
        "seconds": seconds,
        "tokens_per_second": sum(example_tokens(examples)) / seconds,
        "evaluated_tokens_per_second": example_tokens(examples[:1])[0] / (time.perf_counter() - started_at),
        "memory": memory,
    }


def _raise_does_not_fit(_: dict[str, Any]) -> None:
    """The `plan_changed` callback of the step, called before a retry in smaller micro-batches."""
    raise DoesNotFit("the planned step does not fit into the device's memory")


if __name__ == "__main__":
    _settings = Settings()
    configure_logging(_settings.log_level)
    main(sys.argv[1], sys.argv[2], _settings)
    end_process(0)
