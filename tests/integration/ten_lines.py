"""A user's check of a downloaded adapter, with transformers, peft and bitsandbytes only, without qlora_service."""

import json
import sys

import torch
from bitsandbytes.functional import has_avx512bf16
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base_dir, adapter_dir, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
base = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=nf4, dtype=dtype)
model = PeftModel.from_pretrained(base, adapter_dir).eval()
# Without, then with the faster CPU kernel of bitsandbytes, whose results differ slightly.
for fast in (False, has_avx512bf16()):
    for module in base.modules():
        module.support_avx512bf16_for_cpu = fast
    loss, tokens = 0.0, 0
    for row in map(json.loads, open(f"{adapter_dir}/held_out.jsonl")):  # noqa: PTH123, SIM115
        ids, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["trained"][1:], dtype=torch.bool)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits[trained], ids[0, 1:][trained], reduction="sum").item()
        tokens += int(trained.sum())
    print(loss / tokens)
