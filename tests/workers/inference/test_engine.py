"""Generated text, compared with that of peft and transformers on the same files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.chat.wire import AdapterRef, ContextTooLong, Finished, GenerationRequest, Sampling
from qlora_service.errors import InvalidRequest, QLoRAError
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.specs import IA3, Lora, PrefixTuning, PromptTuning, Quantization
from tests.published import ATTEMPT, peft_answer, publish_adapter
from tests.tiny_model import MAX_POSITIONS
from workers.inference.engine import MAX_ATTACHED_ADAPTERS, Engine
from workers.warm_base import BaseHolder

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER_TOKENS = 24
GREEDY = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0)
JOBS = tuple(f"job_{number}" for number in range(MAX_ATTACHED_ADAPTERS + 2))


@dataclass(frozen=True)
class AdapterLibrary:
    """A base model, and a store with adapters for it."""

    base: BaseModel
    store: ArtifactStore
    directory: Path

    def engine(self, bases: BaseHolder | None = None) -> Engine:
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        return Engine(self.base, Quantization(), self.store, scratch, bases or BaseHolder(), needs_gpu=False)

    def publish(self, job_id: str, seed: int = 0, **options: Any) -> Path:
        return publish_adapter(self.store, self.base, job_id, self.directory / job_id, seed=seed, **options)


@pytest.fixture(scope="module")
def library(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterLibrary:
    directory = tmp_path_factory.mktemp("library")
    base = Catalog(directory / "models").import_model("tiny", tiny_model)
    library = AdapterLibrary(base, ArtifactStore((directory / "artifacts").as_uri()), directory)
    for seed, job_id in enumerate(JOBS):
        library.publish(job_id, seed)
    return library


@pytest.fixture(scope="module")
def engine(library: AdapterLibrary) -> Iterator[Engine]:
    with library.engine() as engine:
        yield engine


def ask(
    engine: Engine, job_id: str | None = None, sampling: Sampling = GREEDY, **request: Any
) -> tuple[list[str], Finished]:
    """The non-empty pieces of an answer, and its end."""
    pieces: list[str] = []
    adapter = None if job_id is None else AdapterRef(job_id=job_id, attempt=ATTEMPT)
    generation = GenerationRequest(adapter=adapter, sampling=sampling, **(request or {"messages": QUESTION}))
    finished = engine.generate(generation, pieces.append)
    return [piece for piece in pieces if piece], finished


def answer(engine: Engine, job_id: str | None = None, sampling: Sampling = GREEDY, **request: Any) -> str:
    return "".join(ask(engine, job_id, sampling, **request)[0])


def test_base_and_adapter_answer_as_transformers_and_peft_do(library: AdapterLibrary, engine: Engine) -> None:
    base, tuned = answer(engine), answer(engine, JOBS[0])
    assert base == peft_answer(library.base.path, None, QUESTION, ANSWER_TOKENS)
    assert tuned == peft_answer(library.base.path, library.directory / JOBS[0], QUESTION, ANSWER_TOKENS)
    assert base != tuned


def test_switching_adapters_changes_no_answer(engine: Engine) -> None:
    alone = [answer(engine, job_id) for job_id in JOBS]
    assert len(set(alone)) == len(JOBS)
    base = answer(engine)
    # More than stay attached: some are loaded again.
    assert [answer(engine, job_id) for job_id in reversed(JOBS)] == alone[::-1]
    assert answer(engine) == base
    assert len(engine._adapters._attached) == MAX_ATTACHED_ADAPTERS


def test_an_adapter_that_cannot_share_the_base_is_attached_alone(library: AdapterLibrary, engine: Engine) -> None:
    base, tuned = answer(engine), answer(engine, JOBS[0])
    library.publish("job_ia3", adapter=IA3(method="ia3"), noise=3.0)
    scaled = answer(engine, "job_ia3")
    with library.engine() as another:
        assert answer(another, "job_ia3") == scaled
    assert answer(engine) == base
    assert answer(engine, JOBS[0]) == tuned
    assert scaled not in (base, tuned)


ADAPTERS: dict[str, Any] = {
    "lora": None,
    "ia3": IA3(method="ia3"),
    "prefix": PrefixTuning(method="prefix_tuning", num_virtual_tokens=4),
    "tokens": Lora(r=4, trainable_token_indices=[3]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_chats_leave_the_base_as_it_was_loaded(library: AdapterLibrary, kind: str) -> None:
    job_id, bases = f"job_shared_{kind}", BaseHolder()
    library.publish(job_id, adapter=ADAPTERS[kind], noise=3.0)
    answers = []
    for source in ("quantized", "warm", "warm"):
        with library.engine(bases) as engine:
            assert engine.base_source == source
            answers.append((answer(engine), answer(engine, job_id), answer(engine)))
        assert bases.restore()
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == answers[0][2] != answers[0][1]


def test_the_usage_counts_tokens_and_the_length_ends_an_answer(engine: Engine) -> None:
    _, finished = ask(engine, sampling=Sampling(max_tokens=5, temperature=0.0))
    assert (finished.reason, finished.completion_tokens) == ("length", 5)
    assert finished.prompt_tokens > 10


def test_the_template_stop_token_ends_an_answer(library: AdapterLibrary, engine: Engine) -> None:
    # Greedy text of random weights never ends; at a high temperature every token occurs.
    sampled = Sampling(max_tokens=400, temperature=2.0, seed=3)
    pieces, finished = ask(engine, sampling=sampled)
    assert finished.reason == "stop"
    assert finished.completion_tokens < 400
    assert "<|im_end|>" not in "".join(pieces)


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(engine: Engine) -> None:
    text = answer(engine, JOBS[0])
    stop = text[len(text) // 2 :][:3]
    assert text.index(stop) > 0
    pieces, finished = ask(engine, JOBS[0], sampling=GREEDY.model_copy(update={"stop": (stop,)}))
    assert "".join(pieces) == text.partition(stop)[0]
    assert finished.reason == "stop"


def test_a_seed_repeats_an_answer_and_temperature_changes_it(engine: Engine) -> None:
    sampled = Sampling(max_tokens=16, temperature=1.0, seed=7)
    first = answer(engine, JOBS[0], sampled)
    assert answer(engine, JOBS[0], sampled) == first
    assert answer(engine, JOBS[0], sampled.model_copy(update={"seed": 8})) != first
    # With top_p 0 only the likeliest token remains: the greedy text, whatever the seed.
    likeliest = GREEDY.model_copy(update={"temperature": 1.0, "top_p": 0.0})
    assert answer(engine, JOBS[0], likeliest) == answer(engine, JOBS[0])


def test_a_seed_does_not_affect_later_answers(engine: Engine) -> None:
    seeded, unseeded = Sampling(max_tokens=16, temperature=1.0, seed=7), Sampling(max_tokens=16, temperature=1.0)
    after = []
    for _ in range(2):
        answer(engine, JOBS[0], seeded)
        after.append(answer(engine, JOBS[0], unseeded))
    assert after[0] != after[1]


def test_plain_text_is_continued_without_a_template(engine: Engine) -> None:
    _, finished = ask(engine, text="seven days", sampling=Sampling(max_tokens=1))
    assert finished.prompt_tokens < 6


def test_a_request_too_long_for_the_model_is_refused_before_generation(library: AdapterLibrary, engine: Engine) -> None:
    with pytest.raises(ContextTooLong, match=f"room for {MAX_POSITIONS} tokens"):
        ask(engine, sampling=Sampling(max_tokens=MAX_POSITIONS))
    with pytest.raises(ContextTooLong):
        ask(engine, text="one two three " * MAX_POSITIONS, sampling=Sampling())
    # Virtual tokens take positions too.
    library.publish("job_room", adapter=PromptTuning(method="prompt_tuning", num_virtual_tokens=8))
    _, finished = ask(engine, text="one", sampling=Sampling(max_tokens=1))
    most = MAX_POSITIONS - finished.prompt_tokens
    with pytest.raises(ContextTooLong):
        ask(engine, "job_room", text="one", sampling=Sampling(max_tokens=most - 7))


def test_an_error_of_the_callback_ends_the_generation(engine: Engine) -> None:
    class EnoughError(Exception):
        pass

    def refuse(_: str) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        engine.generate(GenerationRequest(messages=QUESTION, sampling=GREEDY), refuse)
    assert answer(engine) == answer(engine)


def test_damaged_files_are_not_loaded(library: AdapterLibrary, engine: Engine) -> None:
    library.publish("job_damaged")
    damaged = library.directory / "damaged"
    damaged.write_bytes(b"{}")
    library.store.put_file(job_key("job_damaged", ATTEMPT, "adapter_config.json"), damaged)
    with pytest.raises(QLoRAError, match="does not have the bytes that were published"):
        ask(engine, "job_damaged")


def test_an_adapter_trained_on_other_weights_is_refused(library: AdapterLibrary, engine: Engine) -> None:
    other = replace(library.base, weights_sha256="0" * 64)
    publish_adapter(library.store, other, "job_other", library.directory / "job_other")
    with pytest.raises(InvalidRequest, match="other weights"):
        ask(engine, "job_other")
