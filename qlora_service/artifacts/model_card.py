"""The model card that is published with an adapter."""

from __future__ import annotations

import json
from typing import Any


def model_card(
    job_id: str,
    base: dict[str, Any],
    dataset: dict[str, Any],
    spec: dict[str, Any],
    compute_dtype: str,
    held_out: dict[str, Any],
    versions: dict[str, str],
) -> str:
    """Markdown with the front matter that model hubs read, the result, and how to load the adapter."""
    name = base["hub_id"] or base["name"]
    front = {"base_model": name, "library_name": "peft", "tags": ["lora", "qlora"]}
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    training, adapter = spec["training"], spec["adapter"]
    revision = f" at revision `{base['revision']}`" if base["revision"] else ""
    quantization = spec["quantization"]
    is_nf4 = quantization["type"] == "nf4"
    bits = "4-bit NF4" + (" with double quantization" if quantization["double_quant"] else "")
    how = bits if is_nf4 else "unquantized"
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    return f"""---
{header}
---

# {spec["name"] or job_id}

A LoRA adapter for `{name}`{revision}, trained over the {how} base.

| | before | after |
|---|---|---|
| loss on {held_out["rows"]} {held_out["source"]} (nats per token) | {held_out["loss_before"]:.4f} | \
{held_out["loss_after"]:.4f} |

Trained on {dataset["trained_on"]} rows (dataset SHA-256 `{dataset["sha256"]}`), {training["batch_size"]} examples a
step, learning rate {training["learning_rate"]}, rank {adapter["r"]}, alpha {adapter["lora_alpha"]}. `manifest.json`
has the whole configuration, every file's SHA-256, and the base weights' SHA-256 `{base["weights_sha256"]}`.
`held_out.jsonl` has the rows behind the table as token ids, so the losses can be measured again.

## Load it

```python
{_load_nf4(quantization["double_quant"], compute_dtype) if is_nf4 else _load_unquantized(compute_dtype)}
model = PeftModel.from_pretrained(base, "DIRECTORY_OF_THIS_FILE")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY_OF_THIS_FILE")
```

{packages}
"""


def _load_nf4(double_quant: bool, dtype: str) -> str:
    return f"""import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={double_quant},
    bnb_4bit_compute_dtype=torch.{dtype},
)
base = AutoModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THE_BASE", quantization_config=nf4, dtype=torch.{dtype})"""


def _load_unquantized(dtype: str) -> str:
    return f"""import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THE_BASE", dtype=torch.{dtype})"""
