"""The chosen settings, and the boundary between fitting and not. Memory is by the formula, which has its own tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_service.planning.cards import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES, Device, named_device
from qlora_service.planning.fit import (
    SEGMENTS_BYTES,
    TOKEN_BUDGETS,
    Choice,
    FitQuestion,
    choose_settings,
    fastest_fit,
    fitting_choices,
    surely_fits,
)
from qlora_service.planning.memory import GIB, Memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec
from tests.planning_models import MODELS

OVERHEAD_BYTES = CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES
SMALLEST = Choice(1024, True, "paged")
"""The setting that needs least memory"""


def make_question(
    model: str = "Llama-2-7B", device: Device | str = "80GB", longest_tokens: int = 1024, **spec: Any
) -> FitQuestion:
    job = JobSpec.model_validate({"base_model": model} | spec)
    card = named_device(device) if isinstance(device, str) else device
    return FitQuestion(ModelShape.from_config(MODELS[model]), job, card, longest_tokens)


def least_needed_bytes(question: FitQuestion) -> int:
    """The needed bytes of the setting that needs least memory."""
    return min(
        question.needed_bytes(question.estimated_memory(tokens, recomputed), Choice(tokens, recomputed, "paged"))
        for tokens, recomputed in question.settings()
    )


def with_usable_bytes(question: FitQuestion, usable_bytes: int) -> FitQuestion:
    """The question for a card with these usable bytes."""
    return replace(question, device=Device("card", 80 * GIB, free_bytes=usable_bytes + OVERHEAD_BYTES))


def test_with_enough_memory_micro_batches_are_large_and_nothing_is_recomputed() -> None:
    assert fastest_fit(make_question()).choice == Choice(8192, False, "resident")


def test_less_memory_gives_slower_settings() -> None:
    choices = [fastest_fit(make_question(device=f"{size}GB")).choice for size in (80, 24, 16, 10, 6)]
    speeds = [(not choice.gradient_checkpointing, choice.micro_batch_tokens) for choice in choices]
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(speeds)) >= 4


def test_one_missing_byte_changes_the_verdict() -> None:
    needed = least_needed_bytes(make_question())
    assert fastest_fit(with_usable_bytes(make_question(), needed)).fits
    refused = fastest_fit(with_usable_bytes(make_question(), needed - 1))
    assert not refused.fits
    assert (refused.choice, refused.needed_bytes) == (SMALLEST, needed)


def test_needed_bytes_are_multiplied_with_the_factor() -> None:
    needed = least_needed_bytes(make_question())
    tight = with_usable_bytes(make_question(), needed)
    assert not fastest_fit(replace(tight, factor=1.01)).fits
    assert fastest_fit(replace(with_usable_bytes(make_question(), int(needed * 1.01)), factor=1.01)).fits


def test_optimizer_state_stays_on_the_device_if_it_fits() -> None:
    spec = {"adapter": {"r": 256}, "training": {"gradient_checkpointing": True, "micro_batch_tokens": 1024}}
    question = make_question(**spec)
    memory = question.estimated_memory(1024, True)
    assert memory.host > GIB
    resident, paged = memory.reserved + memory.host, memory.reserved
    assert fastest_fit(with_usable_bytes(question, int(resident * 1.1))).choice.optimizer == "resident"
    assert fastest_fit(with_usable_bytes(question, int(paged * 1.1))).choice.optimizer == "paged"
    unpaged = make_question(adapter={"r": 256}, training=spec["training"] | {"optim": "adamw_torch"})
    assert not fastest_fit(with_usable_bytes(unpaged, int(paged * 1.1))).fits


@pytest.mark.parametrize(
    ("training", "settings"),
    [
        ({"micro_batch_tokens": 3000}, {(3000, False), (3000, True)}),
        ({"gradient_checkpointing": False}, {(tokens, False) for tokens in TOKEN_BUDGETS if tokens >= 1024}),
        ({"gradient_checkpointing": True, "micro_batch_tokens": 64}, {(64, True)}),
    ],
)
def test_settings_of_the_user_are_fixed(training: dict[str, Any], settings: set[tuple[int, bool]]) -> None:
    assert set(make_question(training=training).settings()) == settings


def test_prefix_tuning_is_never_recomputed() -> None:
    assert not any(recomputed for _, recomputed in make_question(adapter={"method": "prefix_tuning"}).settings())


@pytest.mark.parametrize(
    ("spec", "budgets"),
    [
        ({"training": {"batch_size": 1}}, [1024]),
        ({"training": {"batch_size": 3}}, [3072, 2048, 1024]),
        ({"objective": {"type": "dpo"}}, [8192, 4096, 2048]),
    ],
)
def test_budgets_are_between_one_example_and_a_whole_step(spec: dict[str, Any], budgets: list[int]) -> None:
    assert [tokens for tokens, recomputed in make_question(**spec).settings() if not recomputed] == budgets


def test_budget_on_a_cpu_is_the_default() -> None:
    cpu = Device("x86_64 CPU", 64 * GIB, cuda=False)
    assert list(make_question(device=cpu).settings()) == [(2048, False), (2048, True)]


class ScaledFormula:
    """Simulated memory as a multiple of the formula's; with `share` None, no simulation."""

    def __init__(self, question: FitQuestion, share: float | None) -> None:
        self._question, self._share = question, share
        self.calls = 0

    def __call__(self, spec: JobSpec, tokens: int, recomputed: bool) -> Memory | None:
        self.calls += 1
        if self._share is None:
            return None
        estimated = self._question.estimated_memory(tokens, recomputed)
        return replace(estimated, reserved=int(estimated.reserved * self._share))


@pytest.mark.parametrize(("share", "fits"), [(0.96, True), (1.04, False)])
def test_simulation_decides_within_the_formulas_error(share: float, fits: bool) -> None:
    tight = with_usable_bytes(make_question(), least_needed_bytes(make_question()))
    simulate = ScaledFormula(tight, share)
    fit = fastest_fit(tight, simulate)
    assert (fit.fits, fit.is_sure) == (fits, True)
    assert simulate.calls
    if fits:
        assert fit.source == "simulation"


def test_nothing_is_simulated_outside_the_formulas_error() -> None:
    for roomy in (make_question(), make_question("LLaMA-65B", "24GB")):
        simulate = ScaledFormula(roomy, 1.0)
        assert fastest_fit(roomy, simulate).source == "formula"
        assert simulate.calls == 0


def test_verdict_without_a_simulation_is_unsure() -> None:
    tight = with_usable_bytes(make_question(), least_needed_bytes(make_question()))
    fit = fastest_fit(tight, ScaledFormula(tight, None))
    assert (fit.fits, fit.source, fit.is_sure) == (True, "formula", False)


def test_other_architectures_are_simulated_unless_they_are_far_too_large() -> None:
    question = make_question()
    other = replace(question, shape=replace(question.shape, model_type="gemma2"))
    simulate = ScaledFormula(other, 1.0)
    assert fastest_fit(other, simulate).source == "simulation"
    assert simulate.calls == 1
    tiny = replace(other, device=named_device("2GB"))
    assert not fastest_fit(tiny, simulate).fits
    assert simulate.calls == 1


def test_sure_fit_is_preferred_to_a_faster_unsure_one() -> None:
    question = make_question(training={"gradient_checkpointing": True})
    memory = question.estimated_memory(8192, True)
    tight = with_usable_bytes(question, memory.reserved + memory.host)
    assert fastest_fit(tight).choice.micro_batch_tokens == 4096
    assert [choice.micro_batch_tokens for choice in fitting_choices(tight)] == [4096, 2048, 1024, 8192]


def test_surely_fits_allows_for_the_formulas_error() -> None:
    needed = least_needed_bytes(make_question())
    assert not surely_fits(with_usable_bytes(make_question(), needed))
    assert not surely_fits(with_usable_bytes(make_question(), int(needed * 1.05)))
    assert surely_fits(with_usable_bytes(make_question(), int(needed * 1.06) + SEGMENTS_BYTES))


def test_small_model_just_above_the_limit_is_simulated() -> None:
    """The allocator's segments are large compared with the memory of a small model."""
    simulated = []

    def simulate(spec: JobSpec, tokens: int, recomputed: bool) -> Memory | None:
        simulated.append((tokens, recomputed))
        return None

    small = make_question("SmolLM2-135M", longest_tokens=512, training={"batch_size": 1, "max_seq_len_tokens": 512})
    fastest_fit(with_usable_bytes(small, least_needed_bytes(small) - 60 * 2**20), simulate)
    assert simulated


def test_setting_without_recomputation_is_measured_first() -> None:
    measured: list[int] = []

    def holds(tokens: int) -> bool:
        measured.append(tokens)
        return tokens <= 2048

    assert choose_settings(make_question(), holds) == Choice(2048, False)
    assert measured == [8192, 4096, 2048]
    assert choose_settings(make_question(), lambda _: False) == Choice(8192, True)
    # A forbidden recomputation is not measured; running out of memory is handled when it happens.
    assert choose_settings(make_question(training={"gradient_checkpointing": False}), lambda _: False) == Choice(
        8192, False
    )


def test_forced_job_starts_with_the_settings_that_need_least() -> None:
    assert choose_settings(make_question(device="4GB"), lambda _: True) == SMALLEST
