"""TRL's side, in its own process: `python -m tests.benchmarks._trl SETTING WORKLOAD` prints `Run` as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora_service.training.network.micro_batch import TokenRow
from tests.benchmarks._measurement import Run, StepClock, layer_shapes, parameters, peak_rss_bytes
from tests.benchmarks._workload import ADAPTER, SEED, TRAINING, Workload

IGNORED = -100
PACKED_TOKENS = 1024


@dataclass(frozen=True)
class Setting:
    """TRL's batches for a step of 16 examples, about 3,200 tokens: 4 × 4 padded rows, or 2 × 2 packs of up to 1,024."""

    packing: bool
    checkpointing: bool

    @property
    def per_device(self) -> int:
        return 2 if self.packing else 4

    @property
    def accumulation(self) -> int:
        return 2 if self.packing else 4


SETTINGS = {
    "padded, checkpointing": Setting(packing=False, checkpointing=True),
    "padded": Setting(packing=False, checkpointing=False),
    "packed, checkpointing": Setting(packing=True, checkpointing=True),
    "packed": Setting(packing=True, checkpointing=False),
}


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the time of every step, including the collation of its batches, and counts the model's input tokens."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self.tokens: list[int] = []
        self.trained_tokens: list[int] = []
        self._batches: list[tuple[int, int]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.lap()
        self.tokens.append(sum(tokens for tokens, _ in self._batches))
        self.trained_tokens.append(sum(trained for _, trained in self._batches))
        self._batches.clear()

    def count(self, _: torch.nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Forward hook. A batch without a mask is packed and has no padding."""
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self._batches.append((tokens, int((inputs["labels"][:, 1:] != IGNORED).sum())))


def measure(name: str, work: Workload) -> Run:
    """The measurements of a training with `SFTTrainer`."""
    setting = SETTINGS[name]
    model = AutoModelForCausalLM.from_pretrained(
        work.model_dir,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    shapes = layer_shapes(model)
    # Both sides measure the matrix rate at this service's micro-batch size, which shows the drift of the machine.
    clock = StepClock(shapes, TRAINING.resolved_micro_batch_tokens)
    callback = StepCallback(clock)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model,
            _config(setting, output),
            train_dataset=_dataset(work.steps(), setting),
            processing_class=AutoTokenizer.from_pretrained(work.model_dir),
            callbacks=[callback],
            peft_config=LoraConfig(
                r=ADAPTER.r,
                lora_alpha=ADAPTER.lora_alpha,
                lora_dropout=ADAPTER.lora_dropout,
                target_modules=ADAPTER.target_modules,
                task_type="CAUSAL_LM",
            ),
        )
        trainer.model.register_forward_pre_hook(callback.count, with_kwargs=True)
        trainer.train()
    return Run(
        tokens=callback.tokens,
        trained_tokens=callback.trained_tokens,
        seconds=clock.seconds,
        losses=[record["loss"] for record in trainer.state.log_history if "loss" in record],
        matrix_rates=clock.matrix_rates,
        layer_parameters=parameters(shapes),
        head_parameters=model.get_output_embeddings().weight.numel(),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _config(setting: Setting, output: str) -> SFTConfig:
    return SFTConfig(
        output_dir=output,
        use_cpu=True,
        bf16=True,
        seed=SEED,
        num_train_epochs=1,
        per_device_train_batch_size=setting.per_device,
        gradient_accumulation_steps=setting.accumulation,
        gradient_checkpointing=setting.checkpointing,
        packing=setting.packing,
        max_length=PACKED_TOKENS if setting.packing else TRAINING.max_seq_len_tokens,
        optim=TRAINING.optim,
        learning_rate=TRAINING.learning_rate,
        lr_scheduler_type=TRAINING.lr_scheduler_type,
        weight_decay=TRAINING.weight_decay,
        max_grad_norm=TRAINING.max_grad_norm,
        train_sampling_strategy="sequential",
        # The rows are already tokenized, truncated and, with TRL's own function, packed.
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def _dataset(steps: Sequence[Sequence[TokenRow]], setting: Setting) -> datasets.Dataset:
    """The rows in order. With packing, the warm-up is packed separately, so that it is a whole step."""
    warm_up, *measured = ([_columns(row) for row in rows] for rows in steps)
    later = [columns for rows in measured for columns in rows]
    if not setting.packing:
        return datasets.Dataset.from_list(warm_up + later)
    packs = _packed(warm_up)
    step_packs = setting.per_device * setting.accumulation
    return datasets.Dataset.from_list([packs[index % len(packs)] for index in range(step_packs)] + _packed(later))


def _columns(row: TokenRow) -> dict[str, Any]:
    ids = list(row.input_ids)
    return {
        "input_ids": ids,
        "labels": [token if trained else IGNORED for token, trained in zip(ids, row.trained, strict=True)],
    }


def _packed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    packs: list[dict[str, Any]] = pack_dataset(datasets.Dataset.from_list(rows), PACKED_TOKENS, "bfd").to_list()
    return packs


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], Workload(**json.loads(sys.argv[2]))))))
