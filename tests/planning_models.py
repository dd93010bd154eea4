"""The config.json of models from 135M to 70B parameters, and jobs to plan on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_service.planning.largest_step import largest_step
from qlora_service.planning.memory import Memory
from qlora_service.planning.memory_formula import estimated_memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.simulation.run import Simulator
from qlora_service.planning.simulation.simulated_step import simulated_memory
from qlora_service.specs import JobSpec


def config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **other: Any
) -> dict[str, Any]:
    """A config.json of a Llama-like model."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    } | other


TIED = {"tie_word_embeddings": True}
MODELS = {
    "SmolLM2-135M": config(576, 1536, 30, 9, 3, 49152, **TIED),
    "Qwen2.5-0.5B": config(896, 4864, 24, 14, 2, 151936, model_type="qwen2", **TIED),
    "Llama-3.2-1B": config(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "Qwen3-4B": config(2560, 9728, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, **TIED),
    "Llama-2-7B": config(4096, 11008, 32, 32, 32, 32000),
    "Mistral-7B": config(4096, 14336, 32, 32, 8, 32000, model_type="mistral", sliding_window=None),
    "Llama-3.1-8B": config(4096, 14336, 32, 32, 8, 128256),
    "Llama-2-13B": config(5120, 13824, 40, 40, 40, 32000),
    "LLaMA-33B": config(6656, 17920, 60, 52, 52, 32000),
    "LLaMA-65B": config(8192, 22016, 80, 64, 64, 32000),
    "Llama-2-70B": config(8192, 28672, 80, 64, 8, 32000),
}


@dataclass(frozen=True)
class Case:
    """A job on a model and a CUDA device."""

    model: str
    micro_batch_tokens: int = 2048
    longest_tokens: int = 1024
    checkpointing: bool = True
    spec: tuple[tuple[str, Any], ...] = ()

    def job(self) -> JobSpec:
        return JobSpec.model_validate({"base_model": self.model} | dict(self.spec))

    def __str__(self) -> str:
        activations = "recomputed" if self.checkpointing else "kept"
        return f"{self.model} {self.longest_tokens}/{self.micro_batch_tokens} {activations} {dict(self.spec)}"

    def simulated(self) -> Memory:
        """The memory by the simulator, in this process."""
        sizes = {"micro_batch_tokens": self.micro_batch_tokens, "longest_tokens": self.longest_tokens}
        return simulated_memory(
            MODELS[self.model],
            self.job(),
            largest_step(self.job(), **sizes),
            compute_dtype="bfloat16",
            checkpointing=self.checkpointing,
            cuda=True,
        )

    def simulated_by_child(self) -> Memory:
        """The memory by the simulator in a child process, as in the service."""
        return Simulator(timeout_s=300).simulate(MODELS[self.model], self.job(), **self._sizes())

    def estimated(self) -> Memory:
        """The memory by the formula."""
        return estimated_memory(ModelShape.from_config(MODELS[self.model]), self.job(), **self._sizes())

    def _sizes(self) -> dict[str, Any]:
        return {
            "micro_batch_tokens": self.micro_batch_tokens,
            "checkpointing": self.checkpointing,
            "longest_tokens": self.longest_tokens,
        }


ONE_ROW = {"batch_size": 1}
SPECS: list[dict[str, Any]] = [
    {},
    {"adapter": {"r": 64, "lora_dropout": 0.1}},
    {"adapter": {"r": 8, "target_modules": ["q_proj", "v_proj"]}},
    {"quantization": {"type": "nf4", "double_quant": False}},
    {"quantization": {"type": "fp4"}},
    {"quantization": {"type": "int8"}},
    {"quantization": {"type": "none"}},
    {"adapter": {"r": 64}, "training": {"optim": "adamw_torch"}},
    {"adapter": {"r": 64}, "training": {"optim": "paged_adamw_8bit"}},
    {"adapter": {"r": 64}, "training": {"optim": "paged_lion_32bit"} | ONE_ROW},
    {"objective": {"type": "dpo"}},
    {"adapter": {"method": "lora", "use_dora": True}},
    {"adapter": {"method": "adalora"}},
    {"adapter": {"method": "ia3"}},
    {"adapter": {"method": "vera"}},
    {"adapter": {"method": "oft"}},
    {"adapter": {"method": "prompt_tuning"}},
]


def cases() -> Iterator[Case]:
    """Every spec on small and medium models, with and without recomputation; then every model, at several lengths."""
    for number, spec in enumerate(SPECS):
        for model in ("SmolLM2-135M", "Llama-2-7B"):
            yield Case(model, checkpointing=number % 2 == 0, spec=tuple(spec.items()))
        yield Case("Qwen2.5-0.5B", checkpointing=number % 2 == 1, spec=tuple(spec.items()))
    one_row = (("training", ONE_ROW),)
    for model in MODELS:
        yield Case(model, 512, 512, spec=one_row)
        yield Case(model, 4096, 4096, spec=one_row)
        yield Case(model, checkpointing=False)
