"""Losses and gradients equal those of a plain loop, for every architecture, adapter and kernel path."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig

from qlora_service.errors import InvalidSpec
from qlora_service.specs import Lora, PromptTuning
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.network.network import Network
from tests.judges import adapted, assert_close_gradients, assert_same_step, build, make_norms_exact, pair
from tests.network_cases import BOTH_PATHS, MAMBA, config_of
from tests.tiny_training import FLOAT64, NF4, gradients, load, network, rows

DOCUMENTS = rows(6)
LONGER = rows(4, low=20, high=60)
"""Longer than the probe document and than every attention window of these tests."""
MAMBA_LORA = Lora(r=4, target_modules=["in_proj", "x_proj"])
HEAD_AND_EMBEDDING = Lora(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
TOKENS = Lora(r=4, trainable_token_indices=LONGER[0].input_ids[:2])
GRANITE = {"residual_multiplier": 0.5, "logits_scaling": 8.0, "embedding_multiplier": 2.0}
GEMMA2 = {"head_dim": 8, "sliding_window": 14, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_inner": 64}
OTHERS: dict[str, tuple[PretrainedConfig, Lora, tuple[set[str], str, str]]] = {
    # name: config, adapter, (allowed isolations, layers, head)
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


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_float64_a_step_is_that_of_a_plain_loop(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    plain = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05).train()
    plain.get_base_model().set_attn_implementation("sdpa")
    make_norms_exact(plain)
    model = load(tiny_model, FLOAT64, torch.float64, perturb_b=0.05).train()
    net = network(model, fast=fast, checkpointing=checkpointing)
    assert (net.layers, net.head, net.checkpointing) == ("llama" if fast else "general", "fused", checkpointing)
    if not fast:
        # A norm that the general path leaves to transformers would also have transformers' rounding.
        assert not any(type(m).__name__.endswith("RMSNorm") and "forward" not in vars(m) for m in model.modules())
    assert_same_step(net, plain, DOCUMENTS, 1e-9, 1e-9)


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_nf4_a_step_is_that_of_a_plain_loop(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    plain = load(tiny_model, NF4, perturb_b=0.05).train()
    plain.get_base_model().set_attn_implementation("sdpa")
    net = network(load(tiny_model, NF4, perturb_b=0.05).train(), fast=fast, checkpointing=checkpointing)
    assert net.layers == ("llama" if fast else "general")
    assert_same_step(net, plain, DOCUMENTS, 1e-5, 1e-3)


@BOTH_PATHS
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_have_the_losses_of_separate_ones(tiny_model: Path, fast: bool, training: bool) -> None:
    net = network(load(tiny_model, perturb_b=0.05), fast=fast)
    net.model.train(training)
    packed = net.losses(DOCUMENTS)
    separate = [net.losses([document]) for document in DOCUMENTS]
    assert (packed.nll - torch.cat([losses.nll for losses in separate])).abs().max() < 1e-5
    assert torch.equal(packed.hits, torch.cat([losses.hits for losses in separate]))
    assert packed.nll.shape == packed.hits.shape == (sum(document.trained_tokens for document in DOCUMENTS),)


@BOTH_PATHS
def test_gradients_of_a_packed_row_equal_the_sum_over_separate_documents(tiny_model: Path, fast: bool) -> None:
    net = network(load(tiny_model, perturb_b=0.05).train(), fast=fast)
    net.losses(DOCUMENTS).nll.sum().backward()
    packed = gradients(net.model)
    net.model.zero_grad()
    for document in DOCUMENTS:
        net.losses([document]).nll.sum().backward()
    assert_close_gradients(packed, gradients(net.model), 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_and_adapters_get_their_paths_and_correct_steps(case: str, checkpointing: bool) -> None:
    config, adapter, (isolations, layers, head) = OTHERS[case]
    net, plain = pair(config, adapter)
    assert net.isolation in isolations
    assert (net.layers, net.head) == (layers, head)
    if checkpointing:
        assert net.checkpoint()
    assert_same_step(net, plain, LONGER, 1e-5, 1e-3)


@pytest.mark.parametrize("case", sorted(OTHERS.keys() - {"mamba"}))  # its head needs float32 states rounded
def test_bfloat16_gets_the_paths_of_float32(case: str) -> None:
    """In bfloat16, rounding would hide a scaled or softcapped head, and a leak, if only a few losses were compared."""
    config, adapter, (isolations, layers, head) = OTHERS[case]
    net, _ = pair(config, adapter, torch.bfloat16)
    assert net.isolation in isolations
    assert (net.layers, net.head) == (layers, head)


@BOTH_PATHS
def test_a_head_that_is_trained_itself_gets_its_gradient(fast: bool) -> None:
    """The fused head computes no gradient of its weight."""
    base = build(config_of("llama"))
    plain = adapted(copy.deepcopy(base), Lora(r=4))
    model = adapted(base, Lora(r=4))
    for peft_model in (plain, model):
        peft_model.get_base_model().lm_head.weight.requires_grad_(True)
    net = Network(model, isolate_documents(base), fast=fast)
    assert net.head == "chunked"
    assert_same_step(net, plain, LONGER, 1e-5, 1e-3)
    assert "base_model.model.lm_head.weight" in gradients(model)


def test_virtual_tokens_belong_to_one_document(tiny_model: Path) -> None:
    adapter = PromptTuning(method="prompt_tuning", num_virtual_tokens=5)
    net = network(load(tiny_model, adapter=adapter))
    assert (net.isolation, net.layers, net.head) == ("alone", "general", "logits")
    separate = torch.cat([net.losses([document]).nll for document in DOCUMENTS])
    assert torch.equal(net.losses(DOCUMENTS).nll, separate)
    ids = torch.tensor([DOCUMENTS[0].input_ids])
    trained = torch.tensor(DOCUMENTS[0].trained[1:])
    with torch.no_grad():
        logits = net.model(input_ids=ids).logits[0, -ids.shape[1] : -1][trained]
    expected = F.cross_entropy(logits, ids[0, 1:][trained], reduction="none")
    assert (net.losses(DOCUMENTS[:1]).nll - expected).abs().max() < 1e-5


@BOTH_PATHS
def test_noise_is_bounded_by_each_documents_own_length(tiny_model: Path, fast: bool) -> None:
    """NEFTune (arXiv:2310.05914): uniform in ±alpha / √(L d), L the length of the document, also in a packed row."""
    alpha, width = 5.0, 64
    clean = first_layer_input(network(load(tiny_model).train(), fast=fast), DOCUMENTS)
    noisy = first_layer_input(network(load(tiny_model).train(), fast=fast, neftune_noise_alpha=alpha), DOCUMENTS)
    lengths = [len(document.input_ids) for document in DOCUMENTS]
    assert max(lengths) > 2 * min(lengths)
    for length, noise in zip(lengths, (noisy - clean).split(lengths), strict=True):
        bound = alpha / math.sqrt(length * width)
        assert 0.95 * bound < noise.abs().max() <= bound * (1 + 1e-5)
        assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(noise.mean()) < 0.1 * bound


@BOTH_PATHS
def test_noise_is_drawn_anew_and_only_while_training(tiny_model: Path, fast: bool) -> None:
    net = network(load(tiny_model).train(), fast=fast, neftune_noise_alpha=5.0)
    clean = first_layer_input(network(load(tiny_model), fast=fast), DOCUMENTS)
    assert not torch.equal(first_layer_input(net, DOCUMENTS), first_layer_input(net, DOCUMENTS))
    with torch.no_grad():
        assert torch.equal(first_layer_input(net, DOCUMENTS), clean)
    net.model.eval()
    assert torch.equal(first_layer_input(net, DOCUMENTS), clean)


def test_noise_that_would_not_reach_the_model_is_refused(tiny_model: Path) -> None:
    model = load(tiny_model, adapter=PromptTuning(method="prompt_tuning", num_virtual_tokens=4))
    with pytest.raises(InvalidSpec, match="leave neftune_noise_alpha out"):
        network(model, neftune_noise_alpha=5.0)


def first_layer_input(net: Network, documents: list[TokenRow]) -> torch.Tensor:
    """(tokens, hidden): the first layer's input, which the rotary embedding receives on both paths."""
    seen: list[torch.Tensor] = []
    rotary = net.model.get_base_model().get_decoder().rotary_emb
    hook = rotary.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    net.losses(documents)
    hook.remove()
    (embedded,) = seen
    return embedded.reshape(-1, embedded.shape[-1])
