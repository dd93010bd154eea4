"""Fields, defaults and limits of each adapter method."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_service.specs import IA3, Adapter, Lora, PTuning

ADAPTER: TypeAdapter[Any] = TypeAdapter(Adapter)


def test_method_defaults_to_lora() -> None:
    assert ADAPTER.validate_python({"r": 4}) == Lora(r=4)
    assert ADAPTER.validate_python({"method": "p_tuning"}) == PTuning(method="p_tuning")


def test_adapter_object_is_accepted_unchanged() -> None:
    adapter = IA3(method="ia3", target_modules=["down_proj"])
    assert ADAPTER.validate_python(adapter) is adapter


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"r": 0}, "greater than or equal to 1"),
        ({"r": 2.0}, "valid integer"),
        ({"lora_alpha": 0}, "greater than 0"),
        ({"init_lora_weights": "pissa"}, "'default', 'gaussian' or 'olora'"),
        ({"target_modules": "q_proj"}, "'all-linear'"),
        ({"target_modules": ["self_attn.q_proj"]}, "match pattern"),
        ({"target_modules": []}, "name at least one module"),
        ({"trainable_token_indices": []}, "at least 1 item"),
        ({"trainable_token_indices": [-1]}, "greater than or equal to 0"),
        ({"trainable_token_indices": [7, 3, 7]}, "names token 7 twice"),
        ({"method": "adalora", "init_r": 8}, "init_r = 8 must be above target_r = 8"),
        ({"method": "adalora", "orth_reg_weight": 0}, "greater than 0"),
        (
            {"method": "ia3", "target_modules": ["q_proj"], "feedforward_modules": ["down_proj"]},
            "feedforward_modules names down_proj, which target_modules does not",
        ),
        ({"method": "vera", "r": 4097}, "less than or equal to 4096"),
        ({"method": "vera", "d_initial": 0}, "greater than 0"),
        ({"method": "oft", "oft_block_size": 1}, "greater than or equal to 2"),
        ({"method": "oft", "module_dropout": 1}, "less than 1"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"method": "prefix_tuning", "num_virtual_tokens": 1001}, "less than or equal to 1000"),
        ({"method": "p_tuning", "encoder_hidden_size": 0}, "greater than or equal to 1"),
        ({"method": "llama_adapter", "adapter_len": 0}, "greater than or equal to 1"),
        ({"method": "llama_adapter", "adapter_layers": 0}, "greater than or equal to 1"),
        ({"method": "prompt_tuning", "target_modules": ["q_proj"]}, "not permitted"),
    ],
)
def test_value_outside_the_limits_of_a_method_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python(values)
    assert reason in str(caught.value)


def test_feedforward_modules_are_accepted_with_all_linear_targets() -> None:
    assert ADAPTER.validate_python({"method": "ia3", "feedforward_modules": ["down_proj"]}).feedforward_modules
