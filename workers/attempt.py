"""One attempt at one job, from the dataset's bytes to a certified adapter."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest, describe_file
from qlora_service.artifacts.model_card import model_card
from qlora_service.artifacts.store import ArtifactStore, dataset_key, job_key
from qlora_service.data.batching import Split, split_rows, step_rows, total_steps
from qlora_service.data.checks import read_examples
from qlora_service.data.rendering import Renderer, RenderReport, RenderRules
from qlora_service.errors import Finding, JobFailed
from qlora_service.jobs import FailureReason, Job
from qlora_service.models.adapters import attach, checkpoint_activations, load_adapter, save_adapter
from qlora_service.models.catalog import BaseModel
from qlora_service.models.nf4 import base_fingerprint, load_base
from qlora_service.store.datasets import Dataset
from qlora_service.training.attention import Isolation, isolate_documents
from qlora_service.training.device import choose_device, device_name, has_bf16
from qlora_service.training.evaluation import mean_loss
from qlora_service.training.loop import Losses, Observer, train
from qlora_service.training.micro_batch import TokenRow
from qlora_service.training.rows import RenderedRows, store_rendered

CERTIFICATE_TOLERANCE = 1e-4
"""Nats. The same code on the same device gives the same loss; this leaves room for non-deterministic kernels."""
TRAINING_ROWS_JUDGED = 32
"""Rows the loss is measured on when none are held out."""
PACKAGES = ("qlora-service", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets", "safetensors")


@dataclass(frozen=True)
class AttemptInputs:
    """Everything an attempt is a function of, and where it may write."""

    job: Job
    token: int
    dataset: Dataset
    base: BaseModel
    artifacts: ArtifactStore
    scratch: Path


@dataclass(frozen=True)
class PreparedRows:
    """The job's rows: which are trained on, which are judged."""

    rows: RenderedRows
    split: Split
    report: RenderReport

    @property
    def judged(self) -> list[TokenRow]:
        """The held-out rows; without any, the first training rows."""
        positions = self.split.held_out or self.split.train[:TRAINING_ROWS_JUDGED]
        return [self.rows[position] for position in positions]


def run_attempt(
    inputs: AttemptInputs,
    observer: Observer,
    enter_phase: Callable[[str, int | None], None],
    metrics_file: Path,
) -> dict[str, Any]:
    """Train, publish and certify; the job's result.

    `enter_phase(name, total_steps)` is told where the attempt stands, and may raise to stop it.

    Raises:
        JobFailed: with the reason.
        QLoRAError: the dataset or the model turned out unusable.
    """
    disable_progress_bar()  # a log is no terminal
    spec = inputs.job.spec
    enter_phase("rendering", None)
    with _renderer(inputs) as renderer:
        prepared = prepare_rows(inputs, renderer)
        chat_template = renderer.chat_template
    steps = total_steps(
        len(prepared.split.train), spec.training.batch_size, spec.training.epochs, spec.training.max_steps
    )

    enter_phase("loading", steps)
    device = choose_device()
    dtype = compute_dtype(spec.quantization.compute_dtype, device)

    def fresh_base() -> tuple[PreTrainedModel, Isolation]:
        base = load_base(inputs.base.path, spec.quantization, dtype, device)
        return base, isolate_documents(base)

    base, isolation = fresh_base()
    fingerprint = base_fingerprint(base)
    micro_batch_tokens = spec.training.micro_batch_tokens if isolation != "alone" else 1
    model = attach(base, spec.adapter, spec.training.seed)
    checkpointing = spec.training.gradient_checkpointing and checkpoint_activations(model)

    enter_phase("training", steps)
    judged = prepared.judged
    losses = train(
        model,
        lambda step: _rows_of_step(step, prepared, inputs),
        judged,
        total_steps=steps,
        evaluate_every=spec.evaluation.every_steps or max(1, steps // 10),
        training=spec.training,
        device=device,
        observer=observer,
        micro_batch_tokens=micro_batch_tokens,
    )

    enter_phase("publishing", steps)
    plan = {
        "device": device_name(device),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "total_steps": steps,
        "micro_batch_tokens": spec.training.micro_batch_tokens,
        "isolation": isolation,
        "gradient_checkpointing": checkpointing,
        "base_fingerprint": fingerprint,
    }
    manifest = publish(inputs, model, prepared, losses, plan, str(chat_template), metrics_file)

    enter_phase("certifying", steps)

    published = inputs.scratch / "published"
    _fetch_published(inputs, manifest, published)
    base, reused = clean_base(model, fingerprint, lambda: fresh_base()[0])
    reloaded = load_adapter(base, published)
    loss = mean_loss(reloaded, judged, device)
    certificate: dict[str, Any] = {"held_out_loss": loss, "difference": abs(loss - losses.after), "base_reused": reused}
    if not abs(loss - losses.after) <= CERTIFICATE_TOLERANCE:
        raise JobFailed(
            f"the published adapter gives a held-out loss of {loss:.6f}, the trained one gave {losses.after:.6f}: "
            "the files are not what was trained",
            reason=FailureReason.CERTIFICATE,
            **certificate,
        )
    return {
        "attempt": inputs.token,
        "losses": asdict(losses),
        "certificate": certificate,
        "held_out_rows": len(prepared.split.held_out),
        "steps": steps,
    }


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The precision of the maths: what was asked for; "auto" is bfloat16 where the hardware has it."""
    if asked == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[asked]


def prepare_rows(inputs: AttemptInputs, renderer: Renderer) -> PreparedRows:
    """Render every row and split them.

    Raises:
        JobFailed: rows too long, none usable, or too few to hold any out.
    """
    spec, report = inputs.job.spec, inputs.dataset.report
    path = inputs.artifacts.local_copy(dataset_key(inputs.dataset.sha256), inputs.scratch)
    results = renderer.render(read_examples(path, report.container, report.shape))
    rows, rendered = store_rendered(results, inputs.scratch / "rows.arrow")
    findings = [Finding(**finding) for finding in rendered.findings]
    if rendered.too_long_rows and spec.training.too_long == "refuse":
        raise JobFailed(
            f"{rendered.too_long_rows} rows are longer than max_seq_len_tokens = "
            f"{spec.training.max_seq_len_tokens}; the longest has {rendered.longest_tokens} tokens",
            reason=FailureReason.INVALID_INPUT,
            findings=findings,
        )
    try:
        split = split_rows(len(rows), spec.validation.fraction, spec.validation.max_rows, spec.training.seed)
    except ValueError as error:
        raise JobFailed(str(error), reason=FailureReason.INVALID_INPUT, findings=findings) from None
    return PreparedRows(rows, split, rendered)


def clean_base(model: PeftModel, fingerprint: str, load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, bool]:
    """The base without an adapter, as it was loaded, and whether it is the same object.

    The base is used again only if its logits equal the load-time ones bit for bit.
    """
    base: PreTrainedModel = model.unload()
    if base_fingerprint(base) == fingerprint:
        return base, True
    del base, model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return load(), False


def publish(
    inputs: AttemptInputs,
    model: PeftModel,
    prepared: PreparedRows,
    losses: Losses,
    plan: dict[str, Any],
    chat_template: str,
    metrics_file: Path,
) -> Manifest:
    """Put the adapter and what belongs to it into the artifact store; the manifest last."""
    directory = inputs.scratch / "adapter"
    save_adapter(model, directory, inputs.base.reference, inputs.base.revision)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (inputs.base.path / name).is_file():
            shutil.copyfile(inputs.base.path / name, directory / name)
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    shutil.copyfile(metrics_file, directory / "metrics.jsonl")
    held_out = {
        "loss_before": losses.before,
        "loss_after": losses.after,
        "rows": len(prepared.judged),
        "trained_tokens": sum(row.trained_tokens for row in prepared.judged),
        "source": "held-out rows" if prepared.split.held_out else "training rows (none were held out)",
    }
    with (directory / "held_out.jsonl").open("w", encoding="utf-8") as file:
        for row in prepared.judged:
            record = {"line": row.line, "input_ids": list(row.input_ids), "trained": [int(t) for t in row.trained]}
            file.write(json.dumps(record) + "\n")
    spec = inputs.job.spec.model_dump(mode="json")
    base = {
        "name": inputs.base.name,
        "hub_id": inputs.base.hub_id,
        "revision": inputs.base.revision,
        "weights_sha256": inputs.base.weights_sha256,
    }
    dataset = {
        "id": inputs.dataset.id,
        "sha256": inputs.dataset.sha256,
        "rows": inputs.dataset.report.rows,
        "trained_on": len(prepared.split.train),
        "left_out": inputs.dataset.report.rows - prepared.report.usable_rows,
    }
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    card = model_card(inputs.job.id, base, dataset, spec, held_out, versions)
    (directory / "README.md").write_text(card, encoding="utf-8")
    files = sorted(directory.iterdir())
    manifest = Manifest(
        job_id=inputs.job.id,
        attempt=inputs.token,
        base_model=base,
        dataset=dataset,
        spec=spec,
        plan=plan,
        versions=versions,
        held_out=held_out,
        files=tuple(describe_file(path) for path in files),
    )
    for path in files:
        inputs.artifacts.put_file(_key(inputs, path.name), path)
    content = manifest.model_dump_json(indent=2).encode() + b"\n"
    inputs.artifacts.create(_key(inputs, MANIFEST), content)
    return manifest


def _fetch_published(inputs: AttemptInputs, manifest: Manifest, directory: Path) -> None:
    """Read every published file back. Raises: JobFailed when its bytes are not the manifest's."""
    for file in manifest.files:
        path = directory / file.name
        inputs.artifacts.fetch(_key(inputs, file.name), path)
        if describe_file(path) != file:
            raise JobFailed(
                f"artifact {file.name} does not have the bytes that were published: the disk or store is faulty",
                reason=FailureReason.CERTIFICATE,
            )


def _rows_of_step(step: int, prepared: PreparedRows, inputs: AttemptInputs) -> list[TokenRow]:
    training = inputs.job.spec.training
    train_positions = prepared.split.train
    chosen = step_rows(
        step, len(train_positions), training.batch_size, training.epochs, training.max_steps, training.seed
    )
    return [prepared.rows[train_positions[index]] for index in chosen]


def _key(inputs: AttemptInputs, name: str) -> str:
    return job_key(inputs.job.id, inputs.token, name)


@contextmanager
def _renderer(inputs: AttemptInputs) -> Iterator[Renderer]:
    training = inputs.job.spec.training
    rules = RenderRules(training.max_seq_len_tokens, training.too_long, training.train_on)
    # The job's own time, not the clock's: every attempt renders the same text.
    with Renderer(inputs.base.path, rules, inputs.job.created_at) as renderer:
        yield renderer
