"""Fifth stage: reload the adapter from the published bytes and measure its held-out loss again."""

from __future__ import annotations

from typing import Any

from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.published import fetch_published
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.models.adapters import load_adapter
from qlora_service.training.loop import Outcome, checks_every_layer
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import evaluate, make_objective
from workers.trainer.context import AttemptContext
from workers.trainer.load import LoadedNetwork
from workers.trainer.prepare import PreparedRows

CERTIFICATE_TOLERANCE = 1e-4
"""Nats. The same code on the same device gives the same loss; this leaves room for non-deterministic kernels."""


def certify(
    context: AttemptContext, rows: PreparedRows, loaded: LoadedNetwork, outcome: Outcome, manifest: Manifest
) -> dict[str, Any]:
    """The certificate of the published adapter. Drops network and base from `loaded`.

    Raises:
        JobFailed: the bytes of a published file differ from the manifest, or the loss differs.
    """
    context.reporter.enter_phase("certifying", rows.total_steps)
    published = context.inputs.scratch / "published"
    fetch_published(manifest, context.inputs.artifacts, published)
    paths, isolation, base = loaded.network.paths, loaded.warm.isolation, loaded.warm.model
    is_reused = loaded.warm.restore()
    loaded.drop()
    if not is_reused:
        del base  # the last reference: the changed base is freed before its replacement is loaded
        base = context.bases.replace_changed(loaded.request).model
    reloaded = Network(load_adapter(base, published), isolation, paths=paths)
    with checks_every_layer(reloaded, context.check):
        measured = evaluate(reloaded, make_objective(context.spec.objective), rows.held_out)
    return check_loss(measured.loss, outcome.after.loss) | {"base_reused": is_reused}


def check_loss(published: float, trained: float) -> dict[str, Any]:
    """The figures of a certificate, from the held-out losses (nats) of the published and of the trained adapter.

    Raises:
        JobFailed: they differ.
    """
    difference = abs(published - trained)
    if not difference <= CERTIFICATE_TOLERANCE:  # also true for NaN
        raise JobFailed(
            f"the published adapter gives a held-out loss of {published:.6f}, the trained one gave {trained:.6f}: "
            "the files are not what was trained",
            reason=FailureReason.CERTIFICATE,
        )
    return {"held_out_loss": published, "difference": difference}
