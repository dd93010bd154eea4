"""The same questions to the base and to the adapter, side by side; a child process, because it needs torch.

`python -m qlora_service.training.answers` reads one JSON object from stdin: model_dir, adapter_dir, questions,
max_new_tokens. It writes {"base": [...], "adapter": [...]} to stdout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from qlora_service.models.adapters import load_adapter
from qlora_service.models.nf4 import load_base
from qlora_service.specs import Quantization
from qlora_service.training.device import choose_device, has_bf16


@torch.inference_mode()
def answer(model: torch.nn.Module, tokenizer: Any, questions: list[str], max_new_tokens: int) -> list[str]:
    """What the model answers to each question, greedily, one at a time."""
    answers = []
    for question in questions:
        conversation = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(next(model.parameters()).device)
        output = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        prompt_tokens = inputs["input_ids"].shape[1]
        answers.append(tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True).strip())
    return answers


def compare(model_dir: Path, adapter_dir: Path, questions: list[str], max_new_tokens: int) -> dict[str, list[str]]:
    """Answers of the NF4 base without and with the adapter."""
    device = choose_device()
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    model: PeftModel = load_adapter(load_base(model_dir, Quantization(), dtype, device), adapter_dir)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(str(adapter_dir), local_files_only=True)
    with model.disable_adapter():
        base = answer(model, tokenizer, questions, max_new_tokens)
    return {"base": base, "adapter": answer(model, tokenizer, questions, max_new_tokens)}


def main() -> None:
    disable_progress_bar()
    request = json.load(sys.stdin)
    # Libraries print to stdout too; the answer must stand there alone.
    stdout, sys.stdout = sys.stdout, sys.stderr
    result = compare(
        Path(request["model_dir"]), Path(request["adapter_dir"]), request["questions"], request["max_new_tokens"]
    )
    json.dump(result, stdout)


if __name__ == "__main__":
    main()
