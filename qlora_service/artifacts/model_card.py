"""The model card of a published adapter."""

from __future__ import annotations

import json
import math
from typing import Any

_METHODS = {
    "lora": "A LoRA adapter",
    "adalora": "An AdaLoRA adapter",
    "ia3": "An (IA)³ adapter",
    "vera": "A VeRA adapter",
    "oft": "An OFT adapter",
    "prompt_tuning": "A soft prompt (prompt tuning)",
    "prefix_tuning": "A prefix (prefix tuning)",
    "p_tuning": "A soft prompt (P-tuning)",
    "llama_adapter": "A LLaMA-Adapter",
}
_SIZES = {
    "r": "rank",
    "target_r": "mean rank",
    "lora_alpha": "alpha",
    "oft_block_size": "block size",
    "num_virtual_tokens": "virtual tokens",
    "adapter_len": "prompt length",
}
"""Labels of the spec fields that determine an adapter's size; a method has some of them."""

_OBJECTIVES = {"dpo": "DPO", "orpo": "ORPO", "kto": "KTO"}


def model_card(
    job_id: str,
    base: dict[str, Any],
    dataset: dict[str, Any],
    spec: dict[str, Any],
    compute_dtype: str,
    held_out: dict[str, Any],
    stop_tokens: dict[str, Any] | None,
    versions: dict[str, str],
) -> str:
    """Markdown: front matter for model hubs, results, and code that loads the adapter.

    `dataset` has `sha256`, `rows`, `trained_on` and `left_out` (numbers of rows), and `warnings` about its rows.
    `held_out` has `rows` (their number), `source` (their description), `loss_before` and `loss_after`, and, if it was
    measured, `accuracy_before` and `accuracy_after`, both from 0 to 1. `stop_tokens` are the fields of
    `stop_tokens.StopTokens`, or None where they are unknown.
    """
    name = base["hub_id"] or base["name"]
    training, adapter, quantization = spec["training"], spec["adapter"], spec["quantization"]
    objective = _OBJECTIVES.get(spec["objective"]["type"])
    front = {"base_model": name, "library_name": "peft", "tags": _tags(spec)}
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    revision = f" at revision `{base['revision']}`" if base["revision"] else ""
    settings = [f"learning rate {training['learning_rate']}"]
    settings += [f"{label} {adapter[field]}" for field, label in _SIZES.items() if field in adapter]
    if objective:
        settings.append(f"{objective} with beta {spec['objective']['beta']}")
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    return f"""---
{header}
---

# {spec["name"] or job_id}

{_method(adapter)} for `{name}`{revision}, trained over the {_storage(quantization)} base.

{_results(held_out, spec["objective"]["type"])}

Trained on {dataset["trained_on"]} rows (dataset SHA-256 `{dataset["sha256"]}`), {training["batch_size"]} examples
per step, {", ".join(settings)}. `manifest.json`
contains the whole configuration and the SHA-256 of every file and of the base weights (`{base["weights_sha256"]}`).
`held_out.jsonl` contains the rows of the table as token ids, so that the losses can be measured again.
{_rows(dataset)}
## Load it

```python
{_load_base(quantization, compute_dtype)}{_stop_setting(stop_tokens)}
model = PeftModel.from_pretrained(base, "DIRECTORY_OF_THIS_FILE")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY_OF_THIS_FILE")
```
{_answer_end(stop_tokens)}
{packages}
"""


def _stop_setting(stop_tokens: dict[str, Any] | None) -> str:
    """The line of code that sets the stop tokens of the base, if answers end with others."""
    if stop_tokens is None or not _new_ends(stop_tokens):
        return ""
    ids = {token_id for tokens in ("trained", "template", "base") for token_id in stop_tokens[tokens].values()}
    return f"\nbase.generation_config.eos_token_id = {sorted(ids)}"


def _answer_end(stop_tokens: dict[str, Any] | None) -> str:
    """The section about the tokens that end an answer, and about runtimes that do not know them."""
    if stop_tokens is None:
        return ""
    trained, new = stop_tokens["trained"], _new_ends(stop_tokens)
    if not trained:
        text = (
            "No token ends an answer: the trained rows end with ordinary text, or were truncated. Limit the length of "
            "an answer, or set a stop string."
        )
    elif not new:
        text = f"{_names(trained)} {_end(trained)} an answer. The base stops there by its own settings."
    else:
        text = (
            f"{_names(trained)} {_end(trained)} an answer. By its own settings the base does not stop at "
            f"{_names(new)}{_base_stops(stop_tokens)}. The code above sets the stop tokens for transformers. For vLLM, "
            "set `--generation-config DIRECTORY_OF_THIS_FILE`: `generation_config.json` lists them. In other runtimes "
            f"add {_names(new)} to the stop tokens or stop strings."
        )
    if stop_tokens["eos"] is not None:
        text += f" The tokenizer's files here name {_code(stop_tokens['eos'])} as eos token, unlike those of the base."
    return f"\n## End of an answer\n\n{text}\n"


def _new_ends(stop_tokens: dict[str, Any]) -> dict[str, int]:
    """The tokens that end trained answers and do not stop the base."""
    return {token: token_id for token, token_id in stop_tokens["trained"].items() if token not in stop_tokens["base"]}


def _base_stops(stop_tokens: dict[str, Any]) -> str:
    return f", but at {_names(stop_tokens['base'])}" if stop_tokens["base"] else ""


def _names(tokens: dict[str, int]) -> str:
    """The tokens with their ids, as a phrase."""
    names = [f"{_code(token)} (id {token_id})" for token, token_id in tokens.items()]
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _end(tokens: dict[str, int]) -> str:
    return "ends" if len(tokens) == 1 else "end"


def _code(token: str) -> str:
    """The token as Markdown code, in one line."""
    return f"`{json.dumps(token, ensure_ascii=False)[1:-1]}`"


def _tags(spec: dict[str, Any]) -> list[str]:
    method, objective = spec["adapter"]["method"], spec["objective"]["type"]
    tags = [method.replace("_", "-")]
    if method == "lora" and spec["quantization"]["type"] in ("nf4", "fp4"):
        tags.append("qlora")
    return tags if objective == "supervised" else [*tags, objective]


def _method(adapter: dict[str, Any]) -> str:
    """The kind of the adapter, as the beginning of a sentence."""
    if adapter.get("use_dora"):
        return "A rank-stabilized DoRA adapter" if adapter["use_rslora"] else "A DoRA adapter"
    if adapter.get("use_rslora"):
        return "An rsLoRA adapter"
    return _METHODS[adapter["method"]]


def _storage(quantization: dict[str, Any]) -> str:
    """The storage format of the base weights, as an adjective."""
    match quantization["type"]:
        case "nf4" | "fp4" as kind:
            suffix = " with double quantization" if quantization["double_quant"] else ""
            return f"4-bit {kind.upper()}{suffix}"
        case "int8":
            return "8-bit"
        case _:
            return "unquantized"


def _results(held_out: dict[str, Any], objective: str) -> str:
    """The table of losses and accuracies before and after the training."""
    before, after = held_out["loss_before"], held_out["loss_after"]
    unit, accuracy_label = {
        "supervised": ("nats per token", "token accuracy"),
        "kto": ("KTO, per example", "answers classified correctly"),
    }.get(objective, (f"{_OBJECTIVES.get(objective)}, per pair", "pairs ranked correctly"))
    rows = [
        ("", "before", "after"),
        ("---", "---", "---"),
        (f"loss on {held_out['rows']} {held_out['source']} ({unit})", f"{before:.4f}", f"{after:.4f}"),
    ]
    if objective == "supervised":
        rows.append(("perplexity", _perplexity(before), _perplexity(after)))
    if held_out.get("accuracy_after") is not None:
        rows.append((accuracy_label, f"{held_out['accuracy_before']:.1%}", f"{held_out['accuracy_after']:.1%}"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _rows(dataset: dict[str, Any]) -> str:
    """The section about rows that are left out or not trained as one would expect; empty without any."""
    if not dataset["warnings"]:
        return ""
    lines = "\n".join(" ".join(warning.split()) for warning in dataset["warnings"])
    return f"""
## Rows

{dataset["left_out"]} of the dataset's {dataset["rows"]} rows were left out. Rows left out, or not trained as one would
expect:

```text
{lines}
```
"""


def _perplexity(loss: float) -> str:
    # exp(loss) overflows float64 at 709.8.
    return f"{math.exp(loss):.4g}" if loss < 700 else "over 1e304"


def _load_base(quantization: dict[str, Any], dtype: str) -> str:
    """The lines of code that load the base in the format of the job."""
    kind, options = quantization["type"], []
    if kind in ("nf4", "fp4"):
        options = [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{kind}"',
            f"bnb_4bit_use_double_quant={quantization['double_quant']}",
            f"bnb_4bit_compute_dtype=torch.{dtype}",
        ]
    elif kind == "int8":
        # With a threshold, the outlier columns of a batch would make the logits of a row depend on the other rows.
        options = ["load_in_8bit=True", "llm_int8_threshold=0.0"]
    bits = ", BitsAndBytesConfig" if options else ""
    lines = [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{bits}",
        "",
    ]
    if options:
        lines += ["quantization = BitsAndBytesConfig(", *(f"    {option}," for option in options), ")"]
    quantized = "quantization_config=quantization, " if options else ""
    base = f'AutoModelForCausalLM.from_pretrained("PATH_OR_ID_OF_THE_BASE", {quantized}dtype=torch.{dtype})'
    return "\n".join([*lines, f"base = {base}"])
