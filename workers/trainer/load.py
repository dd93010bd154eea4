"""Second stage: load the quantized base, attach the adapter, and settle the plan of the execution."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from qlora_service.models.adapters import attach_adapter
from qlora_service.models.base.needed_base import may_change_base
from qlora_service.specs import JobSpec
from qlora_service.training.device import choose_device, compute_dtype, reset_peaks
from qlora_service.training.network.isolation import Isolation
from qlora_service.training.network.network import KernelPaths, Network
from qlora_service.training.optimizer import may_leave_paged_memory
from workers.trainer.context import AttemptContext
from workers.trainer.environment import describe_environment, inherit_plan
from workers.trainer.execution_settings import starting_settings
from workers.trainer.prepare import PreparedRows
from workers.warm_base import BaseRequest, ProbedAdapter, WarmBase


@dataclass
class LoadedNetwork:
    """The network to train, and the base and settings it was made from. The plan may change during the attempt."""

    network: Network
    warm: WarmBase
    request: BaseRequest
    plan: dict[str, Any]
    environment: dict[str, Any]
    base_source: str
    """warm, cached, quantized or unquantized: where the base's weights came from"""

    def drop(self) -> None:
        """Deletes the references to network and base, so that their memory is free for another base."""
        del self.network, self.warm


def load(context: AttemptContext, rows: PreparedRows) -> LoadedNetwork:
    """The base with a new adapter, and the plan of the execution.

    Raises:
        JobFailed: the slot's GPU cannot be used.
        InvalidModel: transformers cannot load the base.
    """
    inputs, spec = context.inputs, context.spec
    context.reporter.enter_phase("loading", rows.total_steps)
    device = choose_device(inputs.needs_gpu)
    reset_peaks(device)
    environment = describe_environment(device)
    plan = inherit_plan(context.job.plan, environment)
    dtype = compute_dtype(plan.get("compute_dtype", spec.quantization.compute_dtype), device)
    request = BaseRequest(inputs.base, spec.quantization, dtype, device, inputs.cache)
    warm, base_source = context.bases.get(request)
    plan |= {
        **environment,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "total_steps": rows.total_steps,
        "base_fingerprint": warm.fingerprint,
    }
    network = _probed_network(warm, spec, rows, plan)
    if may_change_base(spec.adapter):
        context.bases.retire("the job's adapter may change its base")
    if may_leave_paged_memory(network.model, spec.training, device):
        context.bases.retire("the job's optimizer leaves paged memory")
    return LoadedNetwork(network, warm, request, plan, environment, base_source)


def make_network(
    base: PreTrainedModel,
    spec: JobSpec,
    isolation: Isolation,
    rows: PreparedRows,
    plan: dict[str, Any],
    activation_bytes_per_token: float | None = None,
) -> Network:
    """The base with a new adapter, in training mode, with the settings of `plan`.

    Settings that the plan lacks are chosen and added to it. Activations are measured if a choice depends on them and
    `activation_bytes_per_token` is None.
    """
    training = spec.training
    known = {field.name: plan[field.name] for field in fields(KernelPaths) if field.name in plan}
    network = Network(
        attach_adapter(base, spec.adapter, training.seed, total_steps=rows.total_steps),
        isolation,
        paths=KernelPaths(**known) if known else None,
        neftune_noise_alpha=training.neftune_noise_alpha,
        activation_bytes_per_token=activation_bytes_per_token,
    )
    if "micro_batch_tokens" not in plan:
        choice = starting_settings(network, spec, rows.longest_tokens)
        plan["micro_batch_tokens"] = choice.micro_batch_tokens
        plan["gradient_checkpointing"] = choice.gradient_checkpointing
    if plan["gradient_checkpointing"]:
        network.checkpoint()
    plan |= asdict(network.paths) | {"gradient_checkpointing": network.checkpointing}
    return network


def _probed_network(warm: WarmBase, spec: JobSpec, rows: PreparedRows, plan: dict[str, Any]) -> Network:
    """`make_network`, with the probe results of an earlier job that had the same adapter on this base."""
    adapter = spec.adapter.model_dump_json()
    activation_bytes = None
    if (probed := warm.probed.get(adapter)) is not None:
        activation_bytes = probed.activation_bytes_per_token
        for name, path in asdict(probed.paths).items():
            plan.setdefault(name, path)  # the plan of an earlier attempt takes precedence
    network = make_network(warm.model, spec, warm.isolation, rows, plan, activation_bytes)
    warm.probed[adapter] = ProbedAdapter(network.paths, network.activation_bytes_per_token)
    return network
