"""Workload of both sides: the same model, token ids, masks, order of rows and hyperparameters.

SmolLM2-135M-Instruct in NF4 with double quantization, bf16 compute, LoRA r=16 on all linear layers, 16 examples per
optimizer step, rows of alpaca_en_demo truncated to 512 tokens. Rows are rendered once before the measurement, so that
their preparation counts for neither side. The first step of a run is the warm-up, the others are measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qlora_service.cli.demo import ensure_smollm2
from qlora_service.data.batching import step_rows
from qlora_service.data.files.checks import read_examples
from qlora_service.data.rendering.renderer import Renderer, RenderRules
from qlora_service.specs import Lora, Training
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.rows import RenderedRows, store_rendered

ROOT = Path(__file__).parent.parent.parent
DATASET = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
MEASURED_STEPS = 4
SEED = 0
ADAPTER = Lora(r=16, lora_alpha=32.0, lora_dropout=0.0, target_modules="all-linear")
TRAINING = Training(
    batch_size=16,
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    warmup_ratio=0.0,
    weight_decay=0.0,
    max_grad_norm=0.3,
    optim="paged_adamw_32bit",
    max_seq_len_tokens=512,
    too_long="truncate",
    gradient_checkpointing=False,
    seed=SEED,
)


@dataclass(frozen=True)
class Workload:
    """Paths of the model and of the rendered rows, and the number of steps after the warm-up."""

    model_dir: str
    rows_file: str
    measured_steps: int = MEASURED_STEPS

    def steps(self) -> list[list[TokenRow]]:
        """The rows of each step, the warm-up first."""
        rows = self.rows()
        return [self.rows_of_step(rows, step) for step in range(self.total_steps)]

    @property
    def total_steps(self) -> int:
        """Number of steps with the warm-up."""
        return 1 + self.measured_steps

    def rows(self) -> RenderedRows:
        """All rows, read from the file on access, as in a job."""
        return RenderedRows(Path(self.rows_file))

    def rows_of_step(self, rows: RenderedRows, step: int) -> list[TokenRow]:
        """The rows of step `step`, from 0, in the order of a job with this seed."""
        positions = step_rows(step, len(rows), TRAINING.batch_size, 1.0, self.total_steps, SEED)
        examples = (rows[position] for position in positions)
        return [example for example in examples if isinstance(example, TokenRow)]


def prepare(scratch: Path) -> Workload:
    """The workload, with its rows rendered to a file in `scratch`; ends the program if the dataset is missing."""
    if not DATASET.is_file():
        sys.exit(f"the engine benchmark needs {DATASET.name} in {DATASET.parent}: put it there")
    model = ensure_smollm2(ROOT / ".cache" / "tests" / "models", ROOT / ".cache" / "demo", _print_progress)
    rows_file = scratch / "rows.arrow"
    with Renderer(model.path, RenderRules.of(TRAINING), datetime.now(UTC)) as renderer:
        store_rendered(renderer.render(read_examples(DATASET, "json", "alpaca")), rows_file)
    return Workload(str(model.path), str(rows_file))


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr)
