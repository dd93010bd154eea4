"""Answers of the base and of the adapter to the same questions; a child process, because it needs torch.

`python -m qlora_service.training.evaluation.answers` reads one JSON object from stdin: model_dir, adapter_dir,
questions, max_new_tokens. It writes {"base": [...], "adapter": [...]} to stdout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from qlora_service.process.startup import end_process, importing_torch

with importing_torch():
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from qlora_service.data.rendering.stop_tokens import directory_stop_ids
    from qlora_service.models.adapters import load_adapter
    from qlora_service.models.base.quantize import load_base
    from qlora_service.specs import Quantization
    from qlora_service.training.device import choose_device, compute_dtype
    from qlora_service.training.evaluation.generation import compare_answers, question_ids


def compare(model_dir: Path, adapter_dir: Path, questions: list[str], max_new_tokens: int) -> dict[str, list[str]]:
    """Answers of the NF4 base without and with the adapter, by "base" and "adapter"."""
    device = choose_device()
    dtype = compute_dtype("auto", device)
    model = load_adapter(load_base(model_dir, Quantization(), dtype, device), adapter_dir)
    tokenizer = AutoTokenizer.from_pretrained(str(adapter_dir), local_files_only=True)
    prompts = [question_ids(tokenizer, question) for question in questions]
    stop_ids = directory_stop_ids(model_dir) | directory_stop_ids(adapter_dir)
    pairs = compare_answers(model, tokenizer, prompts, max_new_tokens, stop_ids, on_answer=lambda: None)
    return {"base": [pair.base for pair in pairs], "adapter": [pair.adapter for pair in pairs]}


def main() -> None:
    disable_progress_bar()
    request = json.load(sys.stdin)
    # Libraries print to stdout too, which may hold nothing but the result.
    stdout, sys.stdout = sys.stdout, sys.stderr
    result = compare(
        Path(request["model_dir"]), Path(request["adapter_dir"]), request["questions"], request["max_new_tokens"]
    )
    json.dump(result, stdout)
    stdout.flush()


if __name__ == "__main__":
    main()
    end_process(0)
