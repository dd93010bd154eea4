import ast
from typing import Any

import pytest
import yaml

from qlora_service.artifacts.model_card import model_card
from qlora_service.specs import parse_spec

LOCAL_BASE = {"name": "tiny", "hub_id": None, "revision": None, "weights_sha256": "b" * 64}
HUB_BASE = {"name": "t", "hub_id": "org/tiny", "revision": "c0ffee", "weights_sha256": "b" * 64}
HELD_OUT = {"rows": 12, "source": "held-out rows", "loss_before": 3.14159, "loss_after": 1.5}


def card(base: dict[str, Any] = LOCAL_BASE, **groups: Any) -> str:
    spec = parse_spec({"base_model": "tiny", **groups}).model_dump(mode="json")
    dataset = {"sha256": "d" * 64, "trained_on": 345}
    return model_card("job_1", base, dataset, spec, "bfloat16", HELD_OUT, {"torch": "2.13.0"})


def example(text: str) -> str:
    """The code that loads the adapter."""
    return text.split("```python\n")[1].split("```", maxsplit=1)[0]


@pytest.mark.parametrize(("base", "name"), [(LOCAL_BASE, "tiny"), (HUB_BASE, "org/tiny")])
def test_front_matter_names_the_base_and_the_library(base: dict[str, Any], name: str) -> None:
    front = yaml.safe_load(card(base).split("---\n")[1])
    assert front == {"base_model": name, "library_name": "peft", "tags": ["lora", "qlora"]}


def test_card_tells_the_losses_and_what_they_were_measured_on() -> None:
    assert "| loss on 12 held-out rows (nats per token) | 3.1416 | 1.5000 |" in card()


def test_card_tells_where_the_adapter_comes_from() -> None:
    text = card(HUB_BASE, name="Waves", training={"learning_rate": 1e-3}, adapter={"r": 4, "lora_alpha": 8})
    assert "# Waves\n" in text
    assert "at revision `c0ffee`" in text
    assert "345 rows" in text
    assert "learning rate 0.001, rank 4, alpha 8.0" in text
    assert {"d" * 64, "b" * 64} <= set(text.replace("`", " ").split())
    assert text.endswith("torch 2.13.0\n")


def test_card_without_a_name_is_headed_by_the_job() -> None:
    assert "# job_1\n" in card()
    assert "revision" not in card().split("## Load it")[0].split("---\n")[2]


@pytest.mark.parametrize("double_quant", [True, False])
def test_example_quantizes_as_the_job_did(double_quant: bool) -> None:
    text = card(quantization={"double_quant": double_quant})
    ast.parse(example(text))
    assert f"bnb_4bit_use_double_quant={double_quant}," in example(text)
    assert ("with double quantization base" in text) is double_quant


def test_example_for_an_unquantized_base_does_not_quantize() -> None:
    text = card(quantization={"type": "none"})
    ast.parse(example(text))
    assert "BitsAndBytes" not in example(text)
    assert "trained over the unquantized base" in text
