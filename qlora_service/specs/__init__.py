"""The specification of a job: `JobSpec` and its parts. No I/O; frozen; unknown fields are errors.

Field names are those of PEFT and transformers where these have one. "Paper" in a description is QLoRA (Dettmers et al.
2023, arXiv:2305.14314) unless the class names another; defaults follow it where the description says so.
"""

from qlora_service.specs.adapter import (
    IA3,
    AdaLora,
    Adapter,
    LlamaAdapter,
    Lora,
    Oft,
    PrefixTuning,
    PromptMethod,
    PromptTuning,
    PTuning,
    TargetedAdapter,
    Vera,
)
from qlora_service.specs.job import Container, DatasetRef, JobSpec, Quantization, Shape, Validation
from qlora_service.specs.objective import Dpo, Kto, Objective, Orpo, Supervised
from qlora_service.specs.parsing import parse_spec
from qlora_service.specs.recipes import RECIPES, Recipe
from qlora_service.specs.training import Evaluation, Training

__all__ = [
    "IA3", "RECIPES", "AdaLora", "Adapter", "Container", "DatasetRef", "Dpo", "Evaluation", "JobSpec", "Kto",
    "LlamaAdapter", "Lora", "Objective", "Oft", "Orpo", "PTuning", "PrefixTuning", "PromptMethod", "PromptTuning",
    "Quantization", "Recipe", "Shape", "Supervised", "TargetedAdapter", "Training", "Validation", "Vera", "parse_spec",
]  # fmt: skip
