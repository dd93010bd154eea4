"""Losses and gradients are those of a plain loop, whatever the model is and whichever shortcuts it gets."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig

from qlora_service.errors import Interrupted, InvalidSpec
from qlora_service.models.adapters import attach, detach
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.specs import Lora, PromptTuning
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.network.network import Network
from tests.judges import (
    SMALL,
    adapted,
    assert_close_gradients,
    assert_same_step,
    build,
    make_norms_exact,
    pair,
    plain_losses,
)
from tests.tiny_training import CPU, FLOAT64, NF4, gradients, load, network, rows

DOCUMENTS = rows(6)
LONGER = rows(4, low=20, high=60)
"""Longer than the probe and than every window here."""
LAYERS = 2
"""Of the tiny model"""
BOTH_PATHS = pytest.mark.parametrize("fast", [True, False], ids=["llama", "general"])


def config_of(kind: str, **fields: Any) -> PretrainedConfig:
    config: PretrainedConfig = CONFIG_MAPPING[kind](**(SMALL | fields))
    return config


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_float64_a_step_is_that_of_a_plain_loop(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    plain = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05).train()
    plain.get_base_model().set_attn_implementation("sdpa")
    make_norms_exact(plain)
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05).train()
    mine = network(model, fast=fast, checkpointing=checkpointing)
    assert (mine.layers, mine.head, mine.checkpointing) == ("llama" if fast else "general", "fused", checkpointing)
    if not fast:
        # Where the general path leaves a norm to transformers, it has its rounding too.
        assert not any(type(m).__name__.endswith("RMSNorm") and "forward" not in vars(m) for m in model.modules())
    assert_same_step(mine, plain, DOCUMENTS, 1e-9, 1e-9)


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_nf4_a_step_is_that_of_a_plain_loop(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    plain = load(tiny_model, NF4, perturb_b=0.05).train()
    plain.get_base_model().set_attn_implementation("sdpa")
    mine = network(load(tiny_model, NF4, perturb_b=0.05).train(), fast=fast, checkpointing=checkpointing)
    assert mine.layers == ("llama" if fast else "general")
    assert_same_step(mine, plain, DOCUMENTS, 1e-5, 1e-3)


@BOTH_PATHS
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_lose_what_the_lone_ones_do(tiny_model: Path, fast: bool, training: bool) -> None:
    mine = network(load(tiny_model, perturb_b=0.05), fast=fast)
    mine.model.train(training)
    packed = mine.losses(DOCUMENTS)
    alone = [mine.losses([document]) for document in DOCUMENTS]
    assert (packed.nll - torch.cat([one.nll for one in alone])).abs().max() < 1e-5
    assert torch.equal(packed.hits, torch.cat([one.hits for one in alone]))
    assert packed.nll.shape == packed.hits.shape == (sum(document.trained_tokens for document in DOCUMENTS),)


@BOTH_PATHS
def test_gradients_of_a_packed_row_equal_the_sum_of_the_lone_ones(tiny_model: Path, fast: bool) -> None:
    mine = network(load(tiny_model, perturb_b=0.05).train(), fast=fast)
    mine.losses(DOCUMENTS).nll.sum().backward()
    packed = gradients(mine.model)
    mine.model.zero_grad()
    for document in DOCUMENTS:
        mine.losses([document]).nll.sum().backward()
    assert_close_gradients(packed, gradients(mine.model), 1e-4)


MAMBA = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_mambapy": False}
MAMBA_LORA = Lora(r=4, target_modules=["in_proj", "x_proj"])
HEAD_AND_EMBEDDING = Lora(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
TOKENS = Lora(r=4, trainable_token_indices=LONGER[0].input_ids[:2])
GRANITE = {"residual_multiplier": 0.5, "logits_scaling": 8.0, "embedding_multiplier": 2.0}
GEMMA2 = {"head_dim": 8, "sliding_window": 14, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_inner": 64}
OTHERS: dict[str, tuple[PretrainedConfig, Lora, tuple[set[str], str, str]]] = {
    # name: config, adapter, (isolations that will do, layers, head)
    "granite": (config_of("granite", **GRANITE), Lora(r=4), ({"per_document"}, "general", "chunked")),
    "gemma2": (config_of("gemma2", **GEMMA2), Lora(r=4), ({"mask"}, "general", "chunked")),
    "olmo2": (config_of("olmo2"), Lora(r=4), ({"per_document"}, "general", "fused")),
    "phi3": (config_of("phi3"), Lora(r=4), ({"per_document"}, "general", "fused")),
    "gpt2": (config_of("gpt2", **GPT2), Lora(r=4), ({"per_document", "mask"}, "general", "fused")),
    "cohere": (config_of("cohere", logit_scale=0.25), Lora(r=4), ({"per_document"}, "general", "chunked")),
    "gpt-neox": (config_of("gpt_neox"), Lora(r=4), ({"per_document", "mask"}, "general", "fused")),
    "mamba": (CONFIG_MAPPING["mamba"](**MAMBA), MAMBA_LORA, ({"alone"}, "general", "fused")),
    "trained head": (config_of("llama"), HEAD_AND_EMBEDDING, ({"per_document"}, "llama", "chunked")),
    "trained head, tied": (
        config_of("llama", tie_word_embeddings=True), HEAD_AND_EMBEDDING, ({"per_document"}, "llama", "chunked"),
    ),
    "trained embedding, tied": (
        config_of("llama", tie_word_embeddings=True),
        Lora(r=4, target_modules=["q_proj", "embed_tokens"]),
        ({"per_document"}, "llama", "chunked"),
    ),
    "trained embedding": (
        config_of("llama"),
        Lora(r=4, target_modules=["q_proj", "embed_tokens"]),
        ({"per_document"}, "llama", "fused"),
    ),
    "trained tokens": (config_of("llama"), TOKENS, ({"per_document"}, "llama", "fused")),
    "trained tokens, tied": (
        config_of("llama", tie_word_embeddings=True), TOKENS, ({"per_document"}, "llama", "chunked"),
    ),
    "dora": (config_of("llama"), Lora(r=4, use_dora=True), ({"per_document"}, "general", "fused")),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_and_adapters_get_what_fits_them_and_right_numbers(case: str, checkpointing: bool) -> None:
    config, adapter, (isolations, layers, head) = OTHERS[case]
    mine, plain = pair(config, adapter)
    assert mine.isolation in isolations
    assert (mine.layers, mine.head) == (layers, head)
    if checkpointing:
        assert mine.checkpoint()
    assert_same_step(mine, plain, LONGER, 1e-5, 1e-3)


@pytest.mark.parametrize("case", sorted(OTHERS.keys() - {"mamba"}))  # whose head wants its float32 states rounded
def test_bfloat16_chooses_as_float32_does(case: str) -> None:
    """Where rounding hides a scaled or softcapped head, and a leak, from a look at a few losses."""
    config, adapter, (isolations, layers, head) = OTHERS[case]
    mine, _ = pair(config, adapter, torch.bfloat16)
    assert mine.isolation in isolations
    assert (mine.layers, mine.head) == (layers, head)


@BOTH_PATHS
def test_a_head_that_is_trained_itself_gets_its_gradient(fast: bool) -> None:
    """The fused head makes no gradient of its weight."""
    base = build(config_of("llama"))
    plain = adapted(copy.deepcopy(base), Lora(r=4))
    model = adapted(base, Lora(r=4))
    for one in (plain, model):
        one.get_base_model().lm_head.weight.requires_grad_(True)
    mine = Network(model, isolate_documents(base), fast=fast)
    assert mine.head == "chunked"
    assert_same_step(mine, plain, LONGER, 1e-5, 1e-3)
    assert "base_model.model.lm_head.weight" in gradients(model)


def test_virtual_tokens_belong_to_one_document(tiny_model: Path) -> None:
    adapter = PromptTuning(method="prompt_tuning", num_virtual_tokens=5)
    mine = network(load(tiny_model, adapter=adapter))
    assert (mine.isolation, mine.layers, mine.head) == ("alone", "general", "logits")
    alone = torch.cat([mine.losses([document]).nll for document in DOCUMENTS])
    assert torch.equal(mine.losses(DOCUMENTS).nll, alone)
    ids = torch.tensor([DOCUMENTS[0].input_ids])
    learned = torch.tensor(DOCUMENTS[0].trained[1:])
    with torch.no_grad():
        logits = mine.model(input_ids=ids).logits[0, -ids.shape[1] : -1][learned]
    expected = F.cross_entropy(logits, ids[0, 1:][learned], reduction="none")
    assert (mine.losses(DOCUMENTS[:1]).nll - expected).abs().max() < 1e-5


# --- without the adapter


@BOTH_PATHS
@pytest.mark.parametrize("training", [True, False])
def test_without_the_adapter_the_losses_are_the_bases(tiny_model: Path, fast: bool, training: bool) -> None:
    base = load_base(tiny_model, NF4, torch.float32, CPU)
    isolate_documents(base)
    expected = plain_losses(base, DOCUMENTS)
    mine = network(load(tiny_model, perturb_b=0.3, adapter=Lora(r=4, lora_dropout=0.0 if fast else 0.5)), fast=fast)
    mine.model.train(training)
    for compute in (mine.losses, mine.evaluate):
        found = compute(DOCUMENTS, adapter=False).nll
        assert not found.requires_grad
        assert (found - expected).abs().max() < 1e-5
        assert (compute(DOCUMENTS).nll.detach() - expected).abs().max() > 1e-2
    assert mine.model.training is training
    assert all(p.requires_grad is ("lora_" in name) for name, p in mine.model.named_parameters())


def test_gradients_are_the_same_if_the_base_is_asked_in_between(tiny_model: Path) -> None:
    """DPO does this before every backward pass."""
    mine = network(load(tiny_model, perturb_b=0.05).train())
    mine.losses(DOCUMENTS).nll.sum().backward()
    expected = gradients(mine.model)
    mine.model.zero_grad()
    losses = mine.losses(DOCUMENTS)
    mine.losses(DOCUMENTS, adapter=False)
    losses.nll.sum().backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(mine.model).items())


@BOTH_PATHS
def test_a_base_that_lost_its_adapter_computes_what_it_did_before(tiny_model: Path, fast: bool) -> None:
    base = load_base(tiny_model, NF4, torch.bfloat16, CPU)
    isolate_documents(base)
    before = base_fingerprint(base)
    mine = Network(attach(base, Lora(r=4), seed=0), "per_document", fast=fast)
    mine.losses(DOCUMENTS).nll.sum().backward()
    assert base_fingerprint(detach(mine.model)) == before


# --- evaluation


@BOTH_PATHS
def test_an_evaluation_is_what_full_logits_of_each_row_say(tiny_model: Path, fast: bool) -> None:
    """In bfloat16, where packing would move it: the reference is a plain script's, one row at a time."""
    plain = load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05).eval()
    mine = network(load(tiny_model, dtype=torch.bfloat16, perturb_b=0.05), fast=fast)
    with torch.no_grad():
        expected = torch.cat([plain_losses(plain, [document]) for document in DOCUMENTS])
    found = mine.evaluate(DOCUMENTS)
    assert found.nll.dtype is torch.float32
    assert float(found.nll.mean()) == pytest.approx(float(expected.mean()), rel=1e-3)
    assert (found.nll - expected).abs().max() < 0.05


@BOTH_PATHS
@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_draws_nothing_and_leaves_the_mode(tiny_model: Path, fast: bool, training: bool) -> None:
    adapter = Lora(r=4, lora_dropout=0.5)
    mine = network(load(tiny_model, adapter=adapter, perturb_b=0.05), fast=fast, neftune_noise_alpha=50.0)
    mine.model.train(training)
    first = mine.evaluate(DOCUMENTS)
    assert not first.nll.requires_grad
    assert torch.equal(first.nll, mine.evaluate(DOCUMENTS).nll)
    assert mine.model.training is training
    with mine.evaluating():
        for _ in range(2):
            assert torch.equal(first.nll, mine.evaluate(DOCUMENTS).nll)
    assert mine.model.training is training
    mine.model.train()
    assert not torch.equal(mine.losses(DOCUMENTS).nll, mine.losses(DOCUMENTS).nll)


def test_hits_are_the_tokens_that_were_most_likely() -> None:
    mine, plain = pair(config_of("llama"))
    document = TokenRow(1, DOCUMENTS[0].input_ids, [True] * len(DOCUMENTS[0].input_ids))
    with torch.no_grad():
        likely = plain(input_ids=torch.tensor([document.input_ids])).logits[0].argmax(-1)
    # Half of the tokens become what the model expects behind the ones before.
    guessed = TokenRow(1, [document.input_ids[0], int(likely[0])], [False, True])
    wrong = TokenRow(2, [document.input_ids[0], int(likely[0]) ^ 1], [False, True])
    assert mine.evaluate([guessed, wrong]).hits.tolist() == [True, False]


# --- NEFTune


def entering(mine: Network, documents: list[TokenRow]) -> torch.Tensor:
    """(tokens, hidden): what enters the first layer; on either path the rotary embedding is shown it."""
    seen: list[torch.Tensor] = []
    rotary = mine.model.get_base_model().get_decoder().rotary_emb
    hook = rotary.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    mine.losses(documents)
    hook.remove()
    (embedded,) = seen
    return embedded.reshape(-1, embedded.shape[-1])


@BOTH_PATHS
def test_noise_is_bounded_by_each_documents_own_length(tiny_model: Path, fast: bool) -> None:
    """NEFTune (arXiv:2310.05914): uniform in ±alpha / √(L d), L the document's length also when it is packed."""
    alpha, width = 5.0, 64
    clean = entering(network(load(tiny_model).train(), fast=fast), DOCUMENTS)
    noisy = entering(network(load(tiny_model).train(), fast=fast, neftune_noise_alpha=alpha), DOCUMENTS)
    lengths = [len(document.input_ids) for document in DOCUMENTS]
    assert max(lengths) > 2 * min(lengths)
    for length, noise in zip(lengths, (noisy - clean).split(lengths), strict=True):
        bound = alpha / math.sqrt(length * width)
        assert 0.95 * bound < noise.abs().max() <= bound * (1 + 1e-5)
        assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(noise.mean()) < 0.1 * bound


@BOTH_PATHS
def test_noise_is_drawn_anew_and_only_while_training(tiny_model: Path, fast: bool) -> None:
    mine = network(load(tiny_model).train(), fast=fast, neftune_noise_alpha=5.0)
    clean = entering(network(load(tiny_model), fast=fast), DOCUMENTS)
    assert not torch.equal(entering(mine, DOCUMENTS), entering(mine, DOCUMENTS))
    with torch.no_grad():
        assert torch.equal(entering(mine, DOCUMENTS), clean)
    mine.model.eval()
    assert torch.equal(entering(mine, DOCUMENTS), clean)


# --- memory


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_computed_for_a_frozen_embedding(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    """It would cost the first layer's products with its frozen weights, for nothing."""
    model = load(tiny_model).train()
    mine = network(model, fast=fast, checkpointing=checkpointing)
    outputs: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: outputs.append(output))
    mine.losses(DOCUMENTS).nll.sum().backward()
    assert not outputs[0].requires_grad


@BOTH_PATHS
def test_recomputing_keeps_less(tiny_model: Path, fast: bool) -> None:
    mine = network(load(tiny_model).train(), fast=fast)
    everything = mine.activation_bytes(64)
    assert mine.activation_bytes(128) == pytest.approx(2 * everything, rel=0.3)
    assert mine.checkpoint()
    assert mine.activation_bytes(64) < everything / 2


def test_the_fast_path_keeps_less_than_the_general_one(tiny_model: Path) -> None:
    fast, general = (network(load(tiny_model).train(), fast=fast).activation_bytes(64) for fast in (True, False))
    assert fast < 0.9 * general


def test_a_micro_batch_fits_if_half_of_the_free_memory_holds_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = network(load(tiny_model).train())
    needed = mine.activation_bytes(64) // 64 * 640
    for free, fits in ((1.9 * needed, False), (2.2 * needed, True)):
        monkeypatch.setattr("qlora_service.training.network.network.free_memory_bytes", lambda device, free=free: free)
        assert mine.fits(640) is fits
    assert not network(load(tiny_model).train()).fits(1 << 40)


def test_the_probe_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    for training in (True, False):
        model = load(tiny_model).train(training)
        mine = network(model)
        assert model.training is training
        assert gradients(model) == {}
        mine.fits(100)
        assert gradients(model) == {}


def test_noise_that_would_not_reach_the_model_is_refused(tiny_model: Path) -> None:
    model = load(tiny_model, adapter=PromptTuning(method="prompt_tuning", num_virtual_tokens=4))
    with pytest.raises(InvalidSpec, match="leave neftune_noise_alpha out"):
        network(model, neftune_noise_alpha=5.0)


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_asks_first_forward_and_backward(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    mine = network(load(tiny_model).train(), fast=fast, checkpointing=checkpointing)
    asked: list[str] = []
    doing = "forward"
    with mine.before_each_layer(lambda: asked.append(doing)):
        loss = mine.losses(DOCUMENTS).nll.sum()
        assert asked == ["forward"] * LAYERS
        doing = "backward"
        loss.backward()
    # Nothing is upstream of the first layer's input that would have a gradient.
    assert asked.count("backward") >= LAYERS - 1
    asked.clear()
    mine.losses(DOCUMENTS).nll.sum().backward()
    assert asked == []


@BOTH_PATHS
def test_a_pass_can_be_left_at_any_layer(tiny_model: Path, fast: bool) -> None:
    """Whatever is raised there arrives as it is, and the next step's gradients are as if nothing had been begun."""
    mine = network(load(tiny_model, perturb_b=0.05).train(), fast=fast)

    def step() -> dict[str, torch.Tensor]:
        mine.losses(DOCUMENTS).nll.sum().backward()
        found = gradients(mine.model)
        mine.model.zero_grad(set_to_none=True)
        return found

    expected = step()
    for last in range(1, 2 * LAYERS):
        calls = count(1)

        def check(last: int = last, calls: Iterator[int] = calls) -> None:
            if next(calls) == last:
                raise Interrupted("here")

        with pytest.raises(Interrupted, match="here"), mine.before_each_layer(check):
            step()
        mine.model.zero_grad(set_to_none=True)
        for name, gradient in step().items():
            assert torch.equal(gradient, expected[name]), name
