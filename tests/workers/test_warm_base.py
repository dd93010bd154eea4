"""Consecutive jobs in one process on one base: no job affects the next one."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from qlora_service.errors import Interrupted
from qlora_service.specs import Quantization
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE, DiskReserve
from tests.workers.trainer._attempts import PAIRS, AttemptRecorder, make_inputs, published_bytes
from tests.workspace import Workspace, job_spec
from workers.trainer.attempt import run_attempt
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.trainer.process_reset import release_freed_memory, reset_process_state
from workers.warm_base import BaseHolder, BaseRequest

JOBS = 50
RSS_BOUND_BYTES = 8 * 2**20


class Stopper(AttemptRecorder):
    """Interrupts the attempt at the start of a phase, or after its first step."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        if phase == self._at:
            raise Interrupted("enough")

    def on_step(self, metrics: Any) -> None:
        if self._at == "step":
            raise Interrupted("enough")


def run(
    workspace: Workspace, bases: BaseHolder, spec: dict[str, Any], reporter: AttemptRecorder | None = None
) -> tuple[dict[str, Any], str]:
    """The result and the adapter's SHA-256 of a job that runs as in the trainer."""
    return run_inputs(make_inputs(workspace, workspace.submit_spec(spec)), bases, reporter)


def run_inputs(
    inputs: AttemptInputs, bases: BaseHolder, reporter: AttemptRecorder | None = None
) -> tuple[dict[str, Any], str]:
    metrics_file = inputs.scratch / "metrics.jsonl"
    metrics_file.write_text("")
    reserve = DiskReserve(inputs.checkpoint_dir / RESERVE_FILE)
    with reset_process_state():
        result = run_attempt(
            AttemptContext(inputs, reporter or AttemptRecorder(), lambda: None, reserve, metrics_file, bases)
        )
    return result, hashlib.sha256(published_bytes(inputs, "adapter_model.safetensors")).hexdigest()


def spec(**parts: Any) -> dict[str, Any]:
    training = {"micro_batch_tokens": 256, "gradient_checkpointing": False} | parts.pop("training", {})
    return job_spec(**training) | parts


OTHER_JOBS: dict[str, dict[str, Any]] = {
    "the same": {},
    "dora, other seed, recomputation": {
        "adapter": {"r": 8, "use_dora": True},
        "training": {"seed": 7, "gradient_checkpointing": True},
    },
    "other dropout and length, noise": {
        "adapter": {"r": 4, "lora_dropout": 0.5},
        "training": {"max_seq_len_tokens": 64, "neftune_noise_alpha": 5, "optim": "paged_adamw_8bit"},
    },
    "dpo": {"objective": {"type": "dpo"}, "dataset": {"rows": PAIRS}},
    "prefix tuning": {"adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4}},
    "ia3": {"adapter": {"method": "ia3"}},
    "llama adapter": {"adapter": {"method": "llama_adapter", "adapter_layers": 2}},
    "answers": {"evaluation": {"generate_rows": 1, "max_new_tokens": 2}},
}


def test_a_jobs_adapter_is_the_same_after_any_other_job(workspace: Workspace) -> None:
    bases = BaseHolder()
    first, cold = run(workspace, bases, spec())
    assert (first["base"], bases.restore()) == ("quantized", True)
    for name, parts in OTHER_JOBS.items():
        run(workspace, bases, spec(**parts))
        assert bases.restore(), name
        result, adapter = run(workspace, bases, spec())
        assert (result["base"], adapter) == ("warm", cold), name
        assert result["certificate"]["base_reused"]
        assert bases.restore()


def test_an_interrupted_job_leaves_the_base_unchanged(workspace: Workspace) -> None:
    bases = BaseHolder()
    _, cold = run(workspace, bases, spec())
    for at in ("training", "step", "publishing", "certifying"):
        assert bases.restore(), at
        with pytest.raises(Interrupted):
            run(workspace, bases, spec(adapter={"r": 8}, training={"gradient_checkpointing": True}), Stopper(at))
    assert bases.restore()
    result, warm = run(workspace, bases, spec())
    assert (result["base"], warm) == ("warm", cold)


def test_another_base_replaces_the_loaded_one(workspace: Workspace) -> None:
    bases = BaseHolder()
    other = spec(quantization={"type": "none"})
    sources = []
    for job in (spec(), other, other, spec()):
        sources.append(run(workspace, bases, job)[0]["base"])
        assert bases.restore()
    assert sources == ["quantized", "unquantized", "warm", "quantized"]


@pytest.mark.parametrize("adapter", [{"r": 4, "trainable_token_indices": [3]}, {"r": 4, "init_lora_weights": "olora"}])
def test_a_job_that_may_change_its_base_is_the_last_of_its_process(
    workspace: Workspace, adapter: dict[str, Any]
) -> None:
    bases = BaseHolder()
    run(workspace, bases, spec(adapter=adapter))
    assert not bases.restore()


def test_a_job_whose_optimizer_pages_is_the_last_of_its_process(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU does not page, so the check for paged memory is replaced."""
    bases = BaseHolder()
    monkeypatch.setattr("workers.trainer.load.may_leave_paged_memory", lambda *_: True)
    run(workspace, bases, spec())
    assert not bases.restore()


def test_a_process_with_a_changed_base_runs_no_other_job(workspace: Workspace) -> None:
    bases = BaseHolder()
    request = BaseRequest(workspace.catalog.get("tiny"), Quantization(), torch.bfloat16, torch.device("cpu"), None)
    warm, _ = bases.get(request)
    assert bases.restore()
    with torch.no_grad():
        warm.model.get_input_embeddings().weight[7] += 1  # type: ignore[operator, index]
    assert not bases.restore()
    assert bases.get(request)[0] is warm
    assert not bases.restore()


def test_a_process_without_a_base_runs_no_other_job() -> None:
    assert not BaseHolder().restore()


def test_process_state_that_a_job_sets_is_undone() -> None:
    torch.manual_seed(5)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    drawn = []
    for _ in range(2):
        with reset_process_state():
            drawn.append(torch.rand(1).item())
            torch.set_num_threads(threads + 1)
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
        assert not torch.are_deterministic_algorithms_enabled()
    assert drawn[0] == drawn[1]


JOB_KINDS: list[dict[str, Any]] = [
    {"validation": {"max_rows": 1}},
    {"validation": {"max_rows": 1}, "adapter": {"r": 16, "use_dora": True}},
    {"validation": {"max_rows": 1}, "objective": {"type": "dpo"}, "dataset": {"rows": PAIRS}},
]


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python holds and has not frozen, each storage once."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def thaw() -> Iterator[None]:
    """Unfreezes the objects that a test froze, and freezes those of the libraries again, as in `conftest`."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("thaw")
def test_memory_returns_to_the_level_after_loading(workspace: Workspace) -> None:
    bases, process = BaseHolder(), psutil.Process()
    levels, resident, threads = list[int](), list[int](), list[int]()
    jobs = [workspace.submit_spec(spec(training={"max_steps": 1}, **parts)) for parts in JOB_KINDS]
    warmed_up = len(JOB_KINDS)  # every kind of job has run once, and the libraries have filled their caches
    for number in range(JOBS):
        run_inputs(make_inputs(workspace, jobs[number % len(jobs)], token=number), bases)
        assert bases.restore()
        release_freed_memory()
        levels.append(live_tensor_bytes())
        resident.append(process.memory_info().rss)
        threads.append(process.num_threads())
        if number == warmed_up:
            gc.freeze()  # the base, and the libraries' objects, which would take most of each collection
    assert levels[warmed_up] > 0
    assert set(levels[warmed_up + 1 :]) == {0}  # no new tensors
    assert max(resident[warmed_up:]) - resident[1] < RSS_BOUND_BYTES
    # Thread pools of the libraries grow on demand; a leak would add one thread per job.
    assert max(threads[warmed_up:]) - threads[warmed_up] < 4
