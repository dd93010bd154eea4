"""Known mistakes of training engines in token ids and in files, numbered as in test_fifteen_mistakes.

Each test measures a property twice: it holds for the product, and fails with the mistake put in.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Encoding, Tokenizer, processors

from qlora_service.data.rendering.loss_mask import trained_tokens
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rows.examples import Chat, SourceRow
from qlora_service.models import adapters
from qlora_service.models.adapters import CONFIG, WEIGHTS, load_adapter, save_adapter
from qlora_service.models.base.load import load_cached_base
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.specs import Lora
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import TokenRow, collate
from tests.tiny_training import CPU, NF4, TRAINING, load, network, rows, run

NOW = datetime(2026, 3, 1, tzinfo=UTC)
CHAT = Chat(
    ({"role": "user", "content": "say yes"}, {"role": "assistant", "content": "say yes"}),
    (False, True),
)
Patch = pytest.MonkeyPatch


def render(model_dir: Path) -> RenderedRow | UnusableRow:
    with Renderer(model_dir, RenderRules(512), NOW) as renderer:
        (result,) = renderer.render([SourceRow(CHAT, 1, 0)])
    return result


def trained_text(model_dir: Path, row: RenderedRow | UnusableRow) -> str:
    assert isinstance(row, RenderedRow)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    trained = [token for token, is_trained in zip(row.input_ids, row.trained, strict=True) if is_trained]
    return str(tokenizer.decode(trained, skip_special_tokens=False))


def test_2_double_bos(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: a template that writes the BOS is tokenized with special tokens added."""
    model = shutil.copytree(tiny_model, tmp_path / "bos")
    (model / "chat_template.jinja").unlink()  # the default template writes the BOS
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
    """The mistake: no label where the id is that of the pad token, which is the stop token here."""
    model = shutil.copytree(tiny_model, tmp_path / "pad-is-eos")
    config = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(config.replace("<|endoftext|>", "<|im_end|>"))
    stop = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_end|>")

    def trains_the_stop_token() -> bool:
        row = render(model)
        assert isinstance(row, RenderedRow)
        return stop in collate([TokenRow(1, row.input_ids, row.trained)], CPU).targets.tolist()

    assert trains_the_stop_token()
    assert trained_text(model, render(model)) == "say yes<|im_end|>"

    def by_pad_id(encoding: Encoding, *arguments: Any, **options: Any) -> list[bool]:
        flags = trained_tokens(encoding, *arguments, **options)
        return [is_trained and token != stop for token, is_trained in zip(encoding.ids, flags, strict=True)]

    monkeypatch.setattr("qlora_service.data.rendering.renderer.trained_tokens", by_pad_id)
    assert not trains_the_stop_token()


def test_4_masks_by_string_matching(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: answers are found by a literal; another template has another literal, and no token is trained.

    Right: spans come from the template itself, and a row without a trained token is refused.
    """
    model = shutil.copytree(tiny_model, tmp_path / "other-words")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    # The question has the same words, and is not trained.
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

    Right: A and B are published, bit for bit as trained. The last lines measure the effect of merging.
    """
    model = load(tiny_model, NF4)
    run(model, rows(16), TRAINING, steps=2)
    losses = network(model).evaluate(rows(4)).nll
    save_adapter(model, tmp_path, "tiny", None)
    saved = load_file(tmp_path / WEIGHTS)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
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


def test_9_new_tokens_lost_or_the_whole_embedding_saved(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistakes: the file lacks the rows of trained tokens, or has the whole matrix, up to a gigabyte."""
    tokens, vocabulary, hidden = [5, 17], 512, 64
    model = load(tiny_model, adapter=Lora(r=4, trainable_token_indices=tokens))
    train_rows = [TokenRow(row.line, [*tokens, *row.input_ids], [True, True, *row.trained]) for row in rows(8)]
    run(model, train_rows, TRAINING, steps=2)
    losses = network(model).evaluate(train_rows).nll

    def saved(directory: str) -> dict[str, torch.Tensor]:
        save_adapter(model, tmp_path / directory, "tiny", None)
        tensors: dict[str, torch.Tensor] = load_file(tmp_path / directory / WEIGHTS)
        return tensors

    def matrices(tensors: dict[str, torch.Tensor]) -> list[str]:
        return [name for name, weight in tensors.items() if weight.shape[0] == vocabulary]

    weights = saved("right")
    assert matrices(weights) == []
    rows_of_tokens = [weight for name, weight in weights.items() if "trainable_tokens" in name]
    assert [weight.shape for weight in rows_of_tokens] == [(len(tokens), hidden)]

    def reloaded(directory: str) -> torch.Tensor:
        base = load_base(tiny_model, NF4, torch.float32, CPU)
        isolate_documents(base)
        return network(load_adapter(base, tmp_path / directory)).evaluate(train_rows).nll

    assert torch.equal(reloaded("right"), losses)

    state_dict = adapters.get_peft_model_state_dict
    without_tokens = {
        name: tensor for name, tensor in state_dict(model, save_embedding_layers=False).items() if "tokens" not in name
    }
    matrix = {"base_model.model.model.embed_tokens.weight": model.get_input_embeddings().weight}
    monkeypatch.setattr(adapters, "get_peft_model_state_dict", lambda model, **_: state_dict(model) | matrix)
    assert len(matrices(saved("whole"))) == 1
    monkeypatch.setattr(adapters, "get_peft_model_state_dict", lambda model, **_: without_tokens)
    saved("lost")
    with pytest.raises(KeyError, match="trainable_tokens"):
        reloaded("lost")


def test_14_quantized_again_at_every_load(tiny_model: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """The mistake: every load quantizes again; quantizing quantized weights again gives another base."""
    quantized: list[torch.Tensor] = []
    quantize = bnb.functional.quantize_4bit

    def counting(weight: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        quantized.append(weight)
        return quantize(weight, *arguments, **options)

    def codes(base: torch.nn.Module) -> list[torch.Tensor]:
        tensors = []
        for module in base.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                state = module.weight.quant_state
                tensors += [module.weight.data, state.absmax, state.offset, state.state2.absmax]
        return tensors

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
