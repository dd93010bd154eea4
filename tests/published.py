"""Published adapters without a training: real files and a manifest in an artifact store; PEFT's answer as reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_service.artifacts.manifest import MANIFEST_NAME, Manifest, describe_file
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.models.adapters import attach_adapter, detach, save_adapter
from qlora_service.models.base.quantize import load_base
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Adapter, Lora, Quantization
from tests.tiny_model import CHATML

ATTEMPT = 1


def publish_adapter(
    store: ArtifactStore,
    base: BaseModel,
    job_id: str,
    directory: Path,
    *,
    seed: int = 0,
    adapter: Adapter | None = None,
    noise: float = 0.3,
) -> Path:
    """The directory with the published files; `noise` is large enough to change the model's answers."""
    model = attach_adapter(
        load_base(base.path, Quantization(), torch.float32, torch.device("cpu")), adapter or Lora(r=4), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * noise)
    save_adapter(model, directory, base.reference, base.revision)
    detach(model)
    (directory / "chat_template.jinja").write_text(CHATML)
    files = sorted(directory.iterdir())
    manifest = Manifest(
        job_id=job_id,
        attempt=ATTEMPT,
        base_model={"name": base.name, "weights_sha256": base.weights_sha256},
        dataset={},
        spec={},
        plan={},
        versions={},
        held_out={},
        files=tuple(describe_file(path) for path in files),
    )
    for path in files:
        store.put_file(job_key(job_id, ATTEMPT, path.name), path)
    store.create(job_key(job_id, ATTEMPT, MANIFEST_NAME), manifest.model_dump_json().encode())
    return directory


def peft_answer(base: Path, adapter: Path | None, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """The greedy answer of plain transformers and PEFT on an NF4 base, in the service's compute dtype."""
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
