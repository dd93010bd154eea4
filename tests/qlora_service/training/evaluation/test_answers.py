"""The child process that answers questions with base and adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from qlora_service.models.adapters import save_adapter
from qlora_service.specs import Lora, Training
from qlora_service.training.evaluation.generation import question_ids
from qlora_service.training.network.micro_batch import TokenRow
from tests.tiny_training import load, run


def test_the_child_prints_only_the_answers_of_base_and_adapter(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model), local_files_only=True)
    train_rows = []
    for line, (question, answer) in enumerate([("one", "Paris is the capital"), ("two", "a little house")], start=1):
        prompt, answer_ids = question_ids(tokenizer, question), tokenizer(f"{answer}<|im_end|>")["input_ids"]
        train_rows.append(TokenRow(line, prompt + answer_ids, [False] * len(prompt) + [True] * len(answer_ids)))
    model = load(tiny_model, adapter=Lora(r=16, target_modules=["embed_tokens", "q_proj", "v_proj"]))
    run(model, train_rows, Training(batch_size=2, learning_rate=0.01, max_grad_norm=1.0), steps=40)
    save_adapter(model, tmp_path, "tiny", None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_model / name, tmp_path / name)

    request = {
        "model_dir": str(tiny_model),
        "adapter_dir": str(tmp_path),
        "questions": ["two", "one"],
        "max_new_tokens": 12,
    }
    child = subprocess.run(
        [sys.executable, "-m", "qlora_service.training.evaluation.answers"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )

    assert child.returncode == 0, child.stderr
    answers = json.loads(child.stdout)
    assert answers["adapter"] == ["a little house", "Paris is the capital"]
    assert set(answers) == {"base", "adapter"}
    assert len(answers["base"]) == 2
    assert answers["base"] != answers["adapter"]
