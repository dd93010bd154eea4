"""One job after the other in one process, on one base: nothing of a job is left for the next."""

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
from qlora_service.training.checkpoint.disk_reserve import DiskReserve
from tests.workers.trainer.test_attempt import PAIRS, AttemptRecorder, attempt, published
from tests.workspace import Workspace, job_spec
from workers.trainer.attempt import run_attempt
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.trainer.process_reset import clean_slate, release_all
from workers.warm_base import BaseHolder, BaseRequest

JOBS = 50
RSS_BOUND_BYTES = 8 * 2**20


class Stopper(AttemptRecorder):
    """Ends the attempt when a phase begins, or after its first step."""

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
    """The job's result and its adapter's hash; run as the trainer runs it."""
    return run_inputs(attempt(workspace, workspace.submit_spec(spec)), bases, reporter)


def run_inputs(
    inputs: AttemptInputs, bases: BaseHolder, reporter: AttemptRecorder | None = None
) -> tuple[dict[str, Any], str]:
    metrics_file = inputs.scratch / "metrics.jsonl"
    metrics_file.write_text("")
    reserve = DiskReserve(inputs.checkpoint_dir / "ballast")
    with clean_slate():
        result = run_attempt(
            AttemptContext(inputs, reporter or AttemptRecorder(), lambda: None, reserve, metrics_file, bases)
        )
    return result, hashlib.sha256(published(inputs, "adapter_model.safetensors")).hexdigest()


def spec(**parts: Any) -> dict[str, Any]:
    training = {"micro_batch_tokens": 256, "gradient_checkpointing": False} | parts.pop("training", {})
    return job_spec(**training) | parts


OTHERS: dict[str, dict[str, Any]] = {
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
    assert (first["base"], bases.settle()) == ("quantized", True)
    for name, parts in OTHERS.items():
        run(workspace, bases, spec(**parts))
        assert bases.settle(), name
        result, adapter = run(workspace, bases, spec())
        assert (result["base"], adapter) == ("warm", cold), name
        assert result["certificate"]["base_reused"]
        assert bases.settle()


def test_a_job_that_was_stopped_leaves_the_base_as_it_was(workspace: Workspace) -> None:
    bases = BaseHolder()
    _, cold = run(workspace, bases, spec())
    for at in ("training", "step", "publishing", "certifying"):
        assert bases.settle(), at
        with pytest.raises(Interrupted):
            run(workspace, bases, spec(adapter={"r": 8}, training={"gradient_checkpointing": True}), Stopper(at))
    assert bases.settle()
    result, warm = run(workspace, bases, spec())
    assert (result["base"], warm) == ("warm", cold)


def test_another_base_takes_the_place_of_the_one_that_is_loaded(workspace: Workspace) -> None:
    bases = BaseHolder()
    other = spec(quantization={"type": "none"})
    sources = []
    for wanted in (spec(), other, other, spec()):
        sources.append(run(workspace, bases, wanted)[0]["base"])
        assert bases.settle()
    assert sources == ["quantized", "unquantized", "warm", "quantized"]


@pytest.mark.parametrize("adapter", [{"r": 4, "trainable_token_indices": [3]}, {"r": 4, "init_lora_weights": "olora"}])
def test_a_job_that_may_change_its_base_is_the_processes_last(workspace: Workspace, adapter: dict[str, Any]) -> None:
    bases = BaseHolder()
    run(workspace, bases, spec(adapter=adapter))
    assert not bases.settle()


def test_a_job_whose_optimizer_pages_is_the_processes_last(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has nothing to page to: here it is only said that one did."""
    bases = BaseHolder()
    monkeypatch.setattr("workers.trainer.load.leaves_paged_memory", lambda *_: True)
    run(workspace, bases, spec())
    assert not bases.settle()


def test_a_changed_base_is_the_end_of_its_process(workspace: Workspace) -> None:
    bases = BaseHolder()
    wanted = BaseRequest(workspace.catalog.get("tiny"), Quantization(), torch.bfloat16, torch.device("cpu"), None)
    warm, _ = bases.get(wanted)
    assert bases.settle()
    with torch.no_grad():
        warm.model.get_input_embeddings().weight[7] += 1  # type: ignore[operator, index]
    assert not bases.settle()
    assert bases.get(wanted)[0] is warm
    assert not bases.settle()


def test_a_process_without_a_base_is_of_no_use_to_the_next_job() -> None:
    assert not BaseHolder().settle()


def test_what_a_job_sets_holds_for_itself_alone() -> None:
    torch.manual_seed(5)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    drawn = []
    for _ in range(2):
        with clean_slate():
            drawn.append(torch.rand(1).item())
            torch.set_num_threads(threads + 1)
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
        assert not torch.are_deterministic_algorithms_enabled()
    assert drawn[0] == drawn[1]


MANY: list[dict[str, Any]] = [
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
    """What a test freezes can be garbage after it; what the libraries keep is frozen again, as `conftest` has it."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("thaw")
def test_memory_returns_to_the_level_after_the_load(workspace: Workspace) -> None:
    bases, process = BaseHolder(), psutil.Process()
    levels, resident, threads = list[int](), list[int](), list[int]()
    jobs = [workspace.submit_spec(spec(training={"max_steps": 1}, **parts)) for parts in MANY]
    settled = len(MANY)  # each kind of job has run: tables that a library keeps for ever are there
    for number in range(JOBS):
        run_inputs(attempt(workspace, jobs[number % len(jobs)], token=number), bases)
        assert bases.settle()
        release_all()
        levels.append(live_tensor_bytes())
        resident.append(process.memory_info().rss)
        threads.append(process.num_threads())
        if number == settled:
            gc.freeze()  # the libraries' objects, which would be most of every collection; and the base
    assert levels[settled] > 0
    assert set(levels[settled + 1 :]) == {0}  # nothing beside what there was before
    assert max(resident[settled:]) - resident[1] < RSS_BOUND_BYTES
    # Pools of the libraries grow as they are needed; a job that left a thread behind would be one more each time.
    assert max(threads[settled:]) - threads[settled] < 4
