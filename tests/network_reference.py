"""References for the training network: random models from a config, and their step in plain PEFT and transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora_service.models.adapters import attach_adapter
from qlora_service.specs import Adapter, Lora
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.network.network import Network
from tests.tiny_training import gradients

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GAIN = 4.0
"""Factor on random weights: at transformers' own scale attention is nearly uniform, which would hide a wrong mask or
rotation"""


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32, gain: float = GAIN) -> PreTrainedModel:
    """The architecture with frozen random weights; the same config gives the same weights."""
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for parameter in base.parameters():
        parameter.data = parameter.data * gain if parameter.ndim > 1 else parameter.data
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)  # norms and biases with an effect
    base.tie_weights()
    base.config.use_cache = False
    return base.to(dtype).requires_grad_(False)


def adapted(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The base with an adapter that changes its outputs, in training mode; in float64 if the base is."""
    model = attach_adapter(base, adapter, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # PEFT initializes these to zero
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if base.dtype is torch.float64:
        model.double()
    return model.train()


def pair(
    config: PretrainedConfig, adapter: Adapter | None = None, dtype: torch.dtype = torch.float32, fast: bool = True
) -> tuple[Network, PeftModel]:
    """A network, and the same model in plain transformers and PEFT."""
    base = build(config, dtype)
    plain = adapted(copy.deepcopy(base), adapter or Lora(r=4))
    network = Network(adapted(base, adapter or Lora(r=4)), isolate_documents(base), fast=fast)
    if dtype is torch.float64:
        make_norms_exact(plain)
    return network, plain


def make_norms_exact(model: torch.nn.Module) -> None:
    """Patches RMSNorms with the plain formula: transformers' own round to float32, even in a float64 model."""

    def forward(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = lambda x, norm=module: forward(norm, x)


def plain_losses(model: torch.nn.Module, documents: Sequence[TokenRow]) -> torch.Tensor:
    """The float64 cross-entropy of every trained token, from a padded batch, full logits and shifted labels.

    Labels of untrained tokens are -100.
    """
    width = max(len(document.input_ids) for document in documents)
    ids, labels, mask = (torch.zeros(len(documents), width, dtype=torch.long) for _ in range(3))
    labels.fill_(-100)
    for index, document in enumerate(documents):
        length = len(document.input_ids)
        ids[index, :length] = torch.tensor(document.input_ids)
        mask[index, :length] = 1
        labels[index, :length] = torch.where(torch.tensor(document.trained), ids[index, :length], -100)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    shifted = labels[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), shifted, reduction="none")
    return losses[shifted != -100]


def assert_same_step(
    network: Network, plain: PeftModel, documents: Sequence[TokenRow], loss_bound: float, gradient_bound: float
) -> None:
    """Losses within `loss_bound` (relative); gradients within `gradient_bound` of the tensor's largest element."""
    expected = plain_losses(plain, documents)
    expected.mean().backward()
    losses = network.losses(documents).nll
    losses.mean().backward()
    assert ((losses - expected).abs() <= loss_bound * expected.abs()).all()
    assert_close_gradients(gradients(network.model), gradients(plain), gradient_bound)


def assert_close_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Elements within `bound` of the tensor's largest element."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        difference = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= bound, f"{name} is off by {difference:.1e}"


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation in its context returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        """Elements of the largest tensor"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result
