"""Conversion of GGUF files and slow tokenizers to the form that the catalog stores.

    python -m qlora_service.models.catalog.gguf_import gguf FILE DIRECTORY
    python -m qlora_service.models.catalog.gguf_import tokenizer DIRECTORY

Runs in a child process, because it imports torch and because the kernel may kill it when memory runs out.
A failure is a traceback on stderr and exit code 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_service.process.startup import end_process, importing_torch


def convert_gguf(file: Path, directory: Path) -> None:
    """Writes the model, dequantized to bf16, and its fast tokenizer into `directory`."""
    with importing_torch():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # In a directory of its own: transformers would read a config.json beside the file.
    with TemporaryDirectory() as isolated:
        Path(isolated, "model.gguf").symlink_to(file.resolve())
        tokenizer = AutoTokenizer.from_pretrained(isolated, gguf_file="model.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            isolated,
            gguf_file="model.gguf",
            # Otherwise transformers keeps the weights packed, and packed weights cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def convert_tokenizer(directory: Path) -> None:
    """Adds tokenizer.json, built from the slow tokenizer's files in the same directory."""
    with importing_torch():
        from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory, use_fast=True).save_pretrained(directory)


def main(arguments: list[str]) -> None:
    # The libraries read these when they are imported: no network, no progress bars, errors only.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    match arguments:
        case ["gguf", file, directory]:
            convert_gguf(Path(file), Path(directory))
        case ["tokenizer", directory]:
            convert_tokenizer(Path(directory))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process(0)
