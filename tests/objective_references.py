"""Reference formulas of the training objectives in float64 over padded batches, and examples for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_service.specs import Dpo, Kto, Objective, Orpo, Supervised
from qlora_service.training.network.cross_entropy import TokenLosses
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TokenRow, TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Share, _with_answer_of, make_objective
from tests.network_reference import make_norms_exact, plain_losses
from tests.tiny_training import FLOAT64, load, rows

ROWS = rows(8, high=40)
PAIRS = [PreferencePair(row, _with_answer_of(row, other)) for row, other in zip(ROWS[::2], ROWS[1::2], strict=True)]
LABELLED = [LabeledRow(row, desirable) for row, desirable in zip(ROWS, [True, False, True, True, False], strict=False)]
SUPERVISED = Supervised()
DPO = Dpo(type="dpo", beta=0.3)
SMOOTHED_DPO = Dpo(type="dpo", beta=0.3, label_smoothing=0.2)
ORPO = Orpo(type="orpo", beta=0.3)
KTO = Kto(type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
CASES: dict[str, tuple[Objective, Sequence[TrainingExample]]] = {
    "supervised": (SUPERVISED, ROWS[:4]),
    "dpo": (DPO, PAIRS),
    "dpo, smoothed": (SMOOTHED_DPO, PAIRS),
    "orpo": (ORPO, PAIRS),
    "kto": (KTO, LABELLED),
    "kto, all desirable": (KTO, LABELLED[2:4]),
    "kto, all undesirable": (KTO, [LABELLED[1], LABELLED[4]]),
    "kto, one example": (KTO, LABELLED[:1]),
}
EACH_CASE = pytest.mark.parametrize("case", CASES)
PERTURBED: dict[str, Any] = {"dtype": torch.float64, "quantization": FLOAT64, "perturb_b": 0.3}


def whole_step(net: Network, spec: Objective, examples: Sequence[TrainingExample]) -> Share:
    """The share of a step in one micro-batch."""
    return make_objective(spec).prepare_step(net, examples, net.losses)(examples)


def fixed_losses(nll: torch.Tensor, base: torch.Tensor) -> Callable[..., TokenLosses]:
    """Computes nothing: `nll` for the policy, `base` for the base."""
    hits = torch.zeros(len(nll), dtype=torch.bool)

    def compute(documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses:
        return TokenLosses(nll if adapter else base, hits)

    return compute


def by_document(losses: torch.Tensor, documents: Sequence[TokenRow]) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = losses.split([sum(document.trained[1:]) for document in documents])
    return parts


def log_ratios(model: PeftModel, documents: Sequence[TokenRow]) -> torch.Tensor:
    """(documents,) log π(y|x) - log π_ref(y|x), summed over the tokens of each answer."""
    policy = torch.stack([-part.sum() for part in by_document(plain_losses(model, documents), documents)])
    with torch.no_grad(), model.disable_adapter():
        base = torch.stack([-part.sum() for part in by_document(plain_losses(model, documents), documents)])
    return policy - base


def mismatched(labelled: Sequence[LabeledRow]) -> list[TokenRow]:
    """The pairs (x1, y2), (x2, y3), … (xm, y1) of arXiv:2402.01306, section 4, cut at the longer of the two rows."""
    result = []
    for index, example in enumerate(labelled):
        row, other = example.answer, labelled[(index + 1) % len(labelled)].answer
        question, answer = row.trained.index(True), other.trained.index(True)
        longest = max(len(row.input_ids), len(other.input_ids))
        ids = [*row.input_ids[:question], *other.input_ids[answer:]][:longest]
        result.append(TokenRow(0, ids, [place >= question for place in range(len(ids))]))
    return result


def reference_losses(model: PeftModel, spec: Objective, examples: Sequence[TrainingExample]) -> torch.Tensor:
    """(examples,) the loss of each. Their mean is the step's loss, except for supervised rows (mean over tokens)."""
    documents = [document for example in examples for document in example.documents]
    match spec:
        case Dpo():  # arXiv:2305.18290, equation 7; smoothed as in its authors' conservative DPO
            ratio = log_ratios(model, documents)
            margin = spec.beta * (ratio[::2] - ratio[1::2])
            return (
                -(1 - spec.label_smoothing) * margin.sigmoid().log() - spec.label_smoothing * (-margin).sigmoid().log()
            )
        case Orpo():  # arXiv:2403.07691, equations 3 (mean), 4 (odds), 6 and 7
            mean = torch.stack([-part.mean() for part in by_document(plain_losses(model, documents), documents)])
            odds = mean.exp() / (1 - mean.exp())
            return -mean[::2] - spec.beta * (odds[::2] / odds[1::2]).log().sigmoid().log()
        case Kto():  # arXiv:2402.01306, equations 7 and 8
            labelled = [example for example in examples if isinstance(example, LabeledRow)]
            others = log_ratios(model, mismatched(labelled)).detach() if len(labelled) > 1 else torch.zeros(1)
            baseline = max(0.0, others.mean().item())
            values = []
            for ratio, example in zip(log_ratios(model, documents), labelled, strict=True):
                if example.desirable:
                    weight, value = spec.desirable_weight, (spec.beta * (ratio - baseline)).sigmoid()
                else:
                    weight, value = spec.undesirable_weight, (spec.beta * (baseline - ratio)).sigmoid()
                values.append(weight - weight * value)
            return torch.stack(values)
    return torch.stack([part.mean() for part in by_document(plain_losses(model, documents), documents)])


def reference_step(model: PeftModel, spec: Objective, examples: Sequence[TrainingExample]) -> torch.Tensor:
    """() the loss of the step."""
    if isinstance(spec, Supervised):
        return plain_losses(model, [document for example in examples for document in example.documents]).mean()
    return reference_losses(model, spec, examples).mean()


def plain_model(directory: Path, **options: Any) -> PeftModel:
    """The model of `load` with transformers' own attention and exact norms."""
    model = load(directory, **options).train()
    model.get_base_model().set_attn_implementation("sdpa")
    make_norms_exact(model)
    return model
