"""Fifteen ways training engines get it wrong. Each test says what is right, then puts the mistake in and sees it.

A property is measured twice: it holds for the product, and it does not with the mistake put in.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Encoding, Tokenizer, processors
from transformers import CONFIG_MAPPING, BitsAndBytesConfig

from qlora_service.data.rendering.loss_mask import trained_tokens
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rows.examples import Chat, SourceRow
from qlora_service.errors import JobFailed
from qlora_service.models import adapters
from qlora_service.models.adapters import CONFIG, WEIGHTS, load_adapter, save_adapter, trainable
from qlora_service.models.base.load import load_cached_base
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.specs import Lora, Quantization, Training
from qlora_service.training import optimizer
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.loop import Unattended
from qlora_service.training.network import llama_layers
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import MicroBatch, TokenRow, TrainingExample, collate
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Compute, Share, ShareOf, SupervisedObjective
from qlora_service.training.sizes import HEAD_CHUNK
from qlora_service.training.step import StepGradients, StepLoss
from tests.judges import SMALL, LargestTensor, pair
from tests.tiny_training import CPU, FLOAT64, NF4, load, network, rows, run

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TRAINING = Training(batch_size=8, learning_rate=1e-2, warmup_ratio=0.0, optim="adamw_torch")
CHAT = Chat(
    ({"role": "user", "content": "say yes"}, {"role": "assistant", "content": "say yes"}),
    (False, True),
)
Patch = pytest.MonkeyPatch


def adapter_after(tiny_model: Path, training: Training, steps: int = 2, **options: Any) -> list[torch.Tensor]:
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05)
    run(model, rows(24), training, steps=steps, **options)
    return trainable(model)


def are_close(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in zip(one, other, strict=True))


def render(model_dir: Path) -> RenderedRow | UnusableRow:
    with Renderer(model_dir, RenderRules(512), NOW) as renderer:
        (result,) = renderer.render([SourceRow(CHAT, 1, 0)])
    return result


def trained_text(model_dir: Path, row: RenderedRow | UnusableRow) -> str:
    assert isinstance(row, RenderedRow)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    learned = [token for token, on in zip(row.input_ids, row.trained, strict=True) if on]
    return str(tokenizer.decode(learned, skip_special_tokens=False))


def test_1_loss_averaged_per_micro_batch(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: each micro-batch's loss is its own mean, and the step's the mean of those."""

    def is_independent_of_the_cut() -> bool:
        whole = adapter_after(tiny_model, TRAINING, micro_batch_tokens=10_000)
        return are_close(adapter_after(tiny_model, TRAINING, micro_batch_tokens=96), whole)

    assert is_independent_of_the_cut()

    def averaging(
        self: SupervisedObjective, network: Network, examples: Sequence[TrainingExample], compute: Compute
    ) -> ShareOf:
        def share(members: Sequence[TrainingExample]) -> Share:
            documents = [document for member in members for document in member.documents]
            losses = compute(documents)
            return Share(losses.nll.mean(), torch.zeros(len(members)), losses.hits)

        return share

    monkeypatch.setattr(SupervisedObjective, "of_step", averaging)
    assert not is_independent_of_the_cut()


def test_2_double_bos(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: a template that writes the BOS is tokenized with special tokens added."""
    model = shutil.copytree(tiny_model, tmp_path / "bos")
    (model / "chat_template.jinja").unlink()  # the plain template, which writes it
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.save(str(model / "tokenizer.json"))

    def bos_tokens() -> int:
        row = render(model)
        assert isinstance(row, RenderedRow)
        assert row.input_ids[0] == bos
        return row.input_ids.count(bos)

    assert bos_tokens() == 1
    encodings = Renderer._encodings
    monkeypatch.setattr(
        Renderer, "_encodings", lambda self, texts, add_special_tokens=True: encodings(self, texts, True)
    )
    assert bos_tokens() == 2


def test_3_pad_is_eos_and_masks_the_stop_token(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: labels are ignored wherever the id is the pad token's."""
    model = shutil.copytree(tiny_model, tmp_path / "pad-is-eos")
    config = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(config.replace("<|endoftext|>", "<|im_end|>"))
    stop = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_end|>")

    def learns_to_stop() -> bool:
        row = render(model)
        assert isinstance(row, RenderedRow)
        return stop in collate([TokenRow(1, row.input_ids, row.trained)], CPU).targets.tolist()

    assert learns_to_stop()
    assert trained_text(model, render(model)) == "say yes<|im_end|>"

    def by_pad_id(encoding: Encoding, *arguments: Any, **options: Any) -> list[bool]:
        learned = trained_tokens(encoding, *arguments, **options)
        return [on and token != stop for token, on in zip(encoding.ids, learned, strict=True)]

    monkeypatch.setattr("qlora_service.data.rendering.renderer.trained_tokens", by_pad_id)
    assert not learns_to_stop()


def test_4_masks_by_string_matching(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: an answer is what stands behind a literal; another template has another, and nothing is learned.

    Right: spans come from the template itself, and a row without a learned token is refused, never trained on.
    """
    model = shutil.copytree(tiny_model, tmp_path / "other-words")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    # The question has the same words, and is not learned.
    assert trained_text(model, render(model)).strip() == "say yes<|im_end|>"

    def by_literal(encoding: Encoding, text: str, *_: Any, **__: Any) -> list[bool]:
        start = text.find("<|im_start|>assistant\n")
        return [start >= 0 and begin >= start for begin, _ in encoding.offsets]

    monkeypatch.setattr("qlora_service.data.rendering.renderer.trained_tokens", by_literal)
    row = render(model)
    assert isinstance(row, UnusableRow)
    assert "nothing to train" in row.finding.reason


def test_5_a_merge_that_is_quantized_again(tiny_model: Path, tmp_path: Path) -> None:
    """The mistake: the adapter is merged into 4-bit weights, which rounds most of it away.

    The product does not merge: what is published are A and B, bit for bit as they were trained. What merging would do
    stands below.
    """
    model = load(tiny_model, NF4)
    run(model, rows(16), TRAINING, steps=2)
    losses = network(model).evaluate(rows(4)).nll
    save_adapter(model, tmp_path, "tiny", None)
    saved = load_file(tmp_path / WEIGHTS)
    learned = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == learned.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in learned.items())
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG}

    def reloaded() -> PeftModel:
        base = load_base(tiny_model, NF4, torch.float32, CPU)
        isolate_documents(base)
        return load_adapter(base, tmp_path)

    assert torch.equal(network(reloaded()).evaluate(rows(4)).nll, losses)
    merged = reloaded()
    with pytest.warns(UserWarning, match="rounding errors"):
        merged.merge_adapter()
    assert (network(merged, fast=False).evaluate(rows(4)).nll - losses).abs().max() > 1e-3


def test_6_packed_documents_see_each_other(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: one causal attention over the whole row."""

    def largest_leak(fast: bool) -> float:
        mine = network(load(tiny_model, perturb_b=0.05), fast=fast)
        with torch.no_grad():
            packed = mine.losses(rows(5)).nll
            alone = torch.cat([mine.losses([row]).nll for row in rows(5)])
        return float((packed - alone).abs().max())

    assert max(largest_leak(True), largest_leak(False)) < 1e-5

    def as_one_document(documents: Sequence[TokenRow], device: torch.device) -> MicroBatch:
        batch = collate(documents, device)
        return replace(batch, lengths=(sum(batch.lengths),))

    monkeypatch.setattr("qlora_service.training.network.network.collate", as_one_document)
    assert min(largest_leak(True), largest_leak(False)) > 1e-3


def test_7_random_numbers_that_depend_on_what_ran_before(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: a resumed job fetches its batches, which draws random numbers, before it restores them.

    Right: masks and noise of a step follow (seed, step) alone, so that step 3 is the same whatever ran before it.
    """
    training = Training(batch_size=4, learning_rate=1e-2, optim="adamw_torch", neftune_noise_alpha=5.0)

    class Fetching(list[TokenRow]):
        """Rows whose every access draws a random number."""

        def __getitem__(self, index: Any) -> Any:
            torch.rand(index + 1)
            return super().__getitem__(index)

    class AfterStep3(Unattended):
        """Keeps the state after the third step."""

        state: TrainingState | None = None

        def checkpoint_is_due(self) -> bool:
            return self.state is None or self.state.step < 3

        def save(self, state: TrainingState) -> None:
            if state.step <= 3:
                self.state = state

    def of_a_job(train_rows: list[TokenRow], control: Unattended, start: TrainingState | None = None) -> float:
        """The loss of the last of four steps."""
        model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.5), perturb_b=0.05)
        torch.manual_seed(123)
        return run(model, train_rows, training, steps=4, control=control, start=start)[1].steps[-1].loss

    def whole_and_resumed() -> tuple[float, float]:
        control = AfterStep3()
        whole = of_a_job(rows(4), control)
        assert control.state is not None
        assert control.state.step == 3
        return whole, of_a_job(Fetching(rows(4)), Unattended(), control.state)

    whole, resumed = whole_and_resumed()
    assert resumed == whole
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    whole, resumed = whole_and_resumed()
    assert resumed != whole


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["frozen head", "trained head"])
def test_8_evaluation_makes_full_logits(targets: Any, fast: bool) -> None:
    """The mistake: the model's own forward, whose logits are (tokens, vocabulary), judges the held-out rows."""
    vocabulary, length = 8_000, 2 * HEAD_CHUNK
    config = CONFIG_MAPPING["llama"](**(SMALL | {"vocab_size": vocabulary}))
    mine, _ = pair(config, Lora(r=4, target_modules=targets), fast=fast)
    (document,) = rows(1, low=length, high=length)
    document = replace(document, trained=[True] * length)

    def largest() -> int:
        with LargestTensor() as tensor:
            mine.evaluate([document])
        return tensor.elements

    assert largest() <= HEAD_CHUNK * vocabulary
    mine.paths = replace(mine.paths, head="logits")
    assert largest() == (length - 1) * vocabulary


def test_9_new_tokens_lost_or_the_whole_embedding_saved(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistakes: the file has no rows of trained tokens; or it has the matrix, a gigabyte for a large vocabulary."""
    tokens, vocabulary, hidden = [5, 17], 512, 64
    model = load(tiny_model, adapter=Lora(r=4, trainable_token_indices=tokens))
    train_rows = [TokenRow(row.line, [*tokens, *row.input_ids], [True, True, *row.trained]) for row in rows(8)]
    run(model, train_rows, TRAINING, steps=2)
    losses = network(model).evaluate(train_rows).nll

    def saved(directory: str) -> dict[str, torch.Tensor]:
        save_adapter(model, tmp_path / directory, "tiny", None)
        weights: dict[str, torch.Tensor] = load_file(tmp_path / directory / WEIGHTS)
        return weights

    def matrices(weights: dict[str, torch.Tensor]) -> list[str]:
        return [name for name, weight in weights.items() if weight.shape[0] == vocabulary]

    right = saved("right")
    assert matrices(right) == []
    rows_of_tokens = [weight for name, weight in right.items() if "trainable_tokens" in name]
    assert [weight.shape for weight in rows_of_tokens] == [(len(tokens), hidden)]

    def reloaded(directory: str) -> torch.Tensor:
        base = load_base(tiny_model, NF4, torch.float32, CPU)
        isolate_documents(base)
        return network(load_adapter(base, tmp_path / directory)).evaluate(train_rows).nll

    assert torch.equal(reloaded("right"), losses)

    whole = adapters.get_peft_model_state_dict
    without = {
        name: tensor for name, tensor in whole(model, save_embedding_layers=False).items() if "tokens" not in name
    }
    matrix = {"base_model.model.model.embed_tokens.weight": model.get_input_embeddings().weight}
    monkeypatch.setattr(adapters, "get_peft_model_state_dict", lambda model, **_: whole(model) | matrix)
    assert len(matrices(saved("whole"))) == 1
    monkeypatch.setattr(adapters, "get_peft_model_state_dict", lambda model, **_: without)
    saved("lost")
    with pytest.raises(KeyError, match="trainable_tokens"):
        reloaded("lost")


@pytest.mark.parametrize("fast", [True, False])
def test_10_recomputed_layers_without_gradients(tiny_model: Path, fast: bool, monkeypatch: Patch) -> None:
    """The mistake: reentrant checkpointing of layers whose input, a frozen embedding, has no gradient."""

    def moved() -> list[bool]:
        model = load(tiny_model, dtype=torch.bfloat16)
        run(model, rows(8), TRAINING, steps=2, checkpointing=True, fast=fast)
        return [bool(p.abs().max() > 0) for name, p in model.named_parameters() if "lora_B" in name]

    assert moved() == [True] * 14

    def reentrant(model: PeftModel) -> bool:
        base = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": True})
        base.disable_input_require_grads()
        return True

    recompute = llama_layers.checkpoint
    monkeypatch.setattr(llama_layers, "checkpoint", lambda *a, **k: recompute(*a, **(k | {"use_reentrant": True})))
    monkeypatch.setattr("qlora_service.training.network.network.checkpoint_activations", reentrant)
    with pytest.raises((JobFailed, RuntimeError, UserWarning), match="grad"):
        moved()


def test_11_dora_magnitudes_frozen_by_bfloat16(tiny_model: Path) -> None:
    """The mistake: magnitudes in bfloat16, whose steps near 1 are 0.008: a rate of 1e-4 never moves them."""

    def moved(dtype: torch.dtype) -> list[bool]:
        model = load(tiny_model, dtype=torch.bfloat16, adapter=Lora(r=4, use_dora=True))
        magnitudes = [p for name, p in model.named_parameters() if "lora_magnitude" in name]
        assert {magnitude.dtype for magnitude in magnitudes} == {torch.float32}
        for magnitude in magnitudes:
            magnitude.data = (1.0 + magnitude.data.abs()).to(dtype)
        before = [magnitude.detach().clone() for magnitude in magnitudes]
        run(model, rows(8), TRAINING.model_copy(update={"learning_rate": 1e-4}), steps=2)
        return [not torch.equal(old, new) for old, new in zip(before, magnitudes, strict=True)]

    assert moved(torch.float32) == [True] * 14
    assert moved(torch.bfloat16) == [False] * 14


def test_12_a_retry_with_a_smaller_batch_changes_the_step(tiny_model: Path, monkeypatch: Patch) -> None:
    """The mistake: out of memory halves the examples of a step. Right: it may halve the micro-batch, nothing else."""
    expected = adapter_after(tiny_model, TRAINING, micro_batch_tokens=400)
    losses, failures = Network.losses, []

    def on_a_small_device(self: Network, documents: Sequence[TokenRow], **options: Any) -> Any:
        if torch.is_grad_enabled() and sum(len(document.input_ids) for document in documents) > 150:
            failures.append(len(documents))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, documents, **options)

    monkeypatch.setattr(Network, "losses", on_a_small_device)
    assert are_close(adapter_after(tiny_model, TRAINING, micro_batch_tokens=400), expected)
    assert failures

    def with_fewer_examples(self: StepGradients, step: int, examples: Sequence[TrainingExample]) -> StepLoss:
        try:
            return self._compute(step, examples)
        except torch.OutOfMemoryError:
            self._network.model.zero_grad()
        return with_fewer_examples(self, step, examples[: len(examples) // 2])

    monkeypatch.setattr(StepGradients, "compute", with_fewer_examples)
    assert not are_close(adapter_after(tiny_model, TRAINING, micro_batch_tokens=400), expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_13_memory_that_is_not_freed_between_runs(tiny_model: Path, optim: str, monkeypatch: Patch) -> None:
    """The mistake: something holds a finished job's model, adapter or optimizer state: one reference is enough."""
    held: list[Any] = []

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def left_by_a_run(hold: Callable[[PeftModel], None] = lambda model: None) -> int:
        before = tensors()
        model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.1))
        run(model, rows(8), TRAINING.model_copy(update={"optim": optim}), steps=1, checkpointing=True)
        hold(model)
        del model
        return tensors() - before

    left_by_a_run()  # what the first one leaves, such as masks, serves all
    assert left_by_a_run() == 0
    assert left_by_a_run(lambda model: held.append(model.get_base_model().get_decoder().layers[0])) > 0
    monkeypatch.setattr(optimizer, "release_optimizer", lambda ended: held.append(ended.state))
    assert left_by_a_run() > 0


def test_14_quantized_anew_at_every_load(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: every load quantizes again; and what was quantized once and is again is another base."""
    quantized: list[torch.Tensor] = []
    quantize = bnb.functional.quantize_4bit

    def counting(weight: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        quantized.append(weight)
        return quantize(weight, *arguments, **options)

    def codes(base: torch.nn.Module) -> list[torch.Tensor]:
        found = []
        for module in base.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                state = module.weight.quant_state
                found += [module.weight.data, state.absmax, state.offset, state.state2.absmax]
        return found

    monkeypatch.setattr(bnb.functional, "quantize_4bit", counting)
    model = Catalog(tmp_path / "models").import_model("tiny", tiny_model)
    cache = QuantizedCache(tmp_path / "cache", 2**30)
    first, second = (load_cached_base(cache, model, NF4, torch.bfloat16, CPU).model for _ in range(2))
    assert len(codes(first)) == 14 * 4
    assert len(quantized) == 14
    assert all(torch.equal(one, other) for one, other in zip(codes(first), codes(second), strict=True))
    assert base_fingerprint(first) == base_fingerprint(second)
    for module in second.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            module.weight = bnb.nn.Params4bit(dense, quant_type="nf4", compress_statistics=True).to(CPU)
    assert len(quantized) == 28
    assert not all(torch.equal(one, other) for one, other in zip(codes(first), codes(second), strict=True))
    assert base_fingerprint(first) != base_fingerprint(second)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_15_compute_dtype_left_at_float32(
    tiny_model: Path, dtype: torch.dtype, quant_type: Any, monkeypatch: Patch
) -> None:
    """The mistake: `bnb_4bit_compute_dtype` is not given, and bitsandbytes multiplies in float32, slowly."""

    def compute_dtypes() -> set[tuple[torch.dtype, torch.dtype]]:
        base = load_base(tiny_model, Quantization(type=quant_type), dtype, CPU)
        layers = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert len(layers) == 14
        return {(layer.compute_dtype, layer.weight.quant_state.dtype) for layer in layers}

    assert compute_dtypes() == {(dtype, dtype)}
    forgotten = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    monkeypatch.setattr("qlora_service.models.base.quantize.bitsandbytes_config", lambda *_: forgotten)
    assert compute_dtypes() == {(torch.float32, dtype)}
