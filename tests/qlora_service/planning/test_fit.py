"""What is chosen, and where the line between fitting and not runs. Memory is the formula's, which has its own tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_service.planning.cards import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES, Device, named_device
from qlora_service.planning.fit import (
    BUDGETS,
    SEGMENTS_BYTES,
    Choice,
    Question,
    chosen,
    fastest_fit,
    fitting_choices,
    surely_fits,
)
from qlora_service.planning.memory import GIB, Memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec
from tests.planning_models import MODELS

NOT_THE_JOBS = CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES
LEAST = Choice(1024, True, "paged")


def question(model: str = "Llama-2-7B", device: Device | str = "80GB", longest: int = 1024, **spec: Any) -> Question:
    job = JobSpec.model_validate({"base_model": model} | spec)
    found = named_device(device) if isinstance(device, str) else device
    return Question(ModelShape.from_config(MODELS[model]), job, found, longest)


def needing_least(asked: Question) -> int:
    """Bytes of the setting that needs least."""
    return min(
        asked.needed_bytes(asked.estimated(tokens, recomputed), Choice(tokens, recomputed, "paged"))
        for tokens, recomputed in asked.settings()
    )


def with_free(asked: Question, free_for_the_job: int) -> Question:
    return replace(asked, device=Device("card", 80 * GIB, free_bytes=free_for_the_job + NOT_THE_JOBS))


def test_where_there_is_room_nothing_is_recomputed_and_much_is_computed_at_a_time() -> None:
    assert fastest_fit(question()).choice == Choice(8192, False, "resident")


def test_the_less_room_the_slower_the_setting() -> None:
    found = [fastest_fit(question(device=f"{size}GB")).choice for size in (80, 24, 16, 10, 6)]
    speeds = [(not choice.gradient_checkpointing, choice.micro_batch_tokens) for choice in found]
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(speeds)) >= 4


def test_one_byte_less_than_is_needed_changes_the_verdict() -> None:
    needed = needing_least(question())
    assert fastest_fit(with_free(question(), needed)).fits
    refused = fastest_fit(with_free(question(), needed - 1))
    assert not refused.fits
    assert (refused.choice, refused.needed_bytes) == (LEAST, needed)


def test_a_factor_makes_the_job_need_more() -> None:
    needed = needing_least(question())
    tight = with_free(question(), needed)
    assert not fastest_fit(replace(tight, factor=1.01)).fits
    assert fastest_fit(replace(with_free(question(), int(needed * 1.01)), factor=1.01)).fits


def test_the_optimizers_state_stays_on_the_device_where_it_can() -> None:
    spec = {"adapter": {"r": 256}, "training": {"gradient_checkpointing": True, "micro_batch_tokens": 1024}}
    asked = question(**spec)
    memory = asked.estimated(1024, True)
    assert memory.host > GIB
    resident, paged = memory.reserved + memory.host, memory.reserved
    assert fastest_fit(with_free(asked, int(resident * 1.1))).choice.optimizer == "resident"
    assert fastest_fit(with_free(asked, int(paged * 1.1))).choice.optimizer == "paged"
    unpaged = question(adapter={"r": 256}, training=spec["training"] | {"optim": "adamw_torch"})
    assert not fastest_fit(with_free(unpaged, int(paged * 1.1))).fits


@pytest.mark.parametrize(
    ("training", "settings"),
    [
        ({"micro_batch_tokens": 3000}, {(3000, False), (3000, True)}),
        ({"gradient_checkpointing": False}, {(tokens, False) for tokens in BUDGETS if tokens >= 1024}),
        ({"gradient_checkpointing": True, "micro_batch_tokens": 64}, {(64, True)}),
    ],
)
def test_what_the_user_set_is_not_changed(training: dict[str, Any], settings: set[tuple[int, bool]]) -> None:
    assert set(question(training=training).settings()) == settings


def test_prefix_tuning_is_never_recomputed() -> None:
    assert not any(recomputed for _, recomputed in question(adapter={"method": "prefix_tuning"}).settings())


@pytest.mark.parametrize(
    ("spec", "budgets"),
    [
        ({"training": {"batch_size": 1}}, [1024]),
        ({"training": {"batch_size": 3}}, [3072, 2048, 1024]),
        ({"objective": {"type": "dpo"}}, [8192, 4096, 2048]),
    ],
)
def test_no_more_is_computed_at_a_time_than_a_step_holds_and_no_less_than_an_example(
    spec: dict[str, Any], budgets: list[int]
) -> None:
    assert [tokens for tokens, recomputed in question(**spec).settings() if not recomputed] == budgets


def test_on_a_cpu_auto_is_what_it_always_was() -> None:
    cpu = Device("x86_64 CPU", 64 * GIB, cuda=False)
    assert list(question(device=cpu).settings()) == [(2048, False), (2048, True)]


class Simulator:
    """Gives each question its answer: so much more than the formula says."""

    def __init__(self, asked: Question, share: float | None) -> None:
        self._asked, self._share = asked, share
        self.calls = 0

    def __call__(self, spec: JobSpec, tokens: int, recomputed: bool) -> Memory | None:
        self.calls += 1
        if self._share is None:
            return None
        estimated = self._asked.estimated(tokens, recomputed)
        return replace(estimated, reserved=int(estimated.reserved * self._share))


@pytest.mark.parametrize(("share", "fits"), [(0.96, True), (1.04, False)])
def test_where_the_formula_cannot_decide_the_simulation_does(share: float, fits: bool) -> None:
    tight = with_free(question(), needing_least(question()))
    simulate = Simulator(tight, share)
    found = fastest_fit(tight, simulate)
    assert (found.fits, found.is_sure) == (fits, True)
    assert simulate.calls
    if fits:
        assert found.source == "simulation"


def test_nothing_is_simulated_where_the_formula_is_sure() -> None:
    for roomy in (question(), question("LLaMA-65B", "24GB")):
        simulate = Simulator(roomy, 1.0)
        assert fastest_fit(roomy, simulate).source == "formula"
        assert simulate.calls == 0


def test_a_verdict_that_nobody_could_check_says_so() -> None:
    tight = with_free(question(), needing_least(question()))
    found = fastest_fit(tight, Simulator(tight, None))
    assert (found.fits, found.source, found.is_sure) == (True, "formula", False)


def test_other_architectures_are_simulated_unless_they_are_far_too_large() -> None:
    asked = question()
    other = replace(asked, shape=replace(asked.shape, model_type="gemma2"))
    simulate = Simulator(other, 1.0)
    assert fastest_fit(other, simulate).source == "simulation"
    assert simulate.calls == 1
    tiny = replace(other, device=named_device("2GB"))
    assert not fastest_fit(tiny, simulate).fits
    assert simulate.calls == 1


def test_a_setting_that_surely_fits_goes_before_a_faster_one_that_may_not() -> None:
    asked = question(training={"gradient_checkpointing": True})
    memory = asked.estimated(8192, True)
    tight = with_free(asked, memory.reserved + memory.host)
    assert fastest_fit(tight).choice.micro_batch_tokens == 4096
    assert [choice.micro_batch_tokens for choice in fitting_choices(tight)] == [4096, 2048, 1024, 8192]


def test_surely_is_with_the_formulas_error_to_spare() -> None:
    needed = needing_least(question())
    assert not surely_fits(with_free(question(), needed))
    assert not surely_fits(with_free(question(), int(needed * 1.05)))
    assert surely_fits(with_free(question(), int(needed * 1.06) + SEGMENTS_BYTES))


def test_a_small_model_that_the_formula_finds_too_large_is_simulated() -> None:
    """What the allocator holds for it comes in segments that are large beside it."""
    asked = []

    def simulate(spec: JobSpec, tokens: int, recomputed: bool) -> Memory | None:
        asked.append((tokens, recomputed))
        return None

    small = question("SmolLM2-135M", longest=512, training={"batch_size": 1, "max_seq_len_tokens": 512})
    fastest_fit(with_free(small, needing_least(small) - 60 * 2**20), simulate)
    assert asked


def test_doing_without_recomputation_is_measured_first() -> None:
    asked: list[int] = []

    def holds(tokens: int) -> bool:
        asked.append(tokens)
        return tokens <= 2048

    assert chosen(question(), holds) == Choice(2048, False)
    assert asked == [8192, 4096, 2048]
    assert chosen(question(), lambda _: False) == Choice(8192, True)
    # What the user forbade is not measured: memory that runs out is seen to when it does.
    assert chosen(question(training={"gradient_checkpointing": False}), lambda _: False) == Choice(8192, False)


def test_a_job_that_was_forced_starts_with_what_needs_least() -> None:
    assert chosen(question(device="4GB"), lambda _: True) == LEAST
