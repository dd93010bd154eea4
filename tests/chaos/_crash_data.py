"""Data directories in which crash scenarios start, and the product's objects over one."""

from __future__ import annotations

import pickle
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from qlora_service.actions.service import Service, Stores
from qlora_service.artifacts.store import ArtifactStore
from qlora_service.data.rendering.stop_tokens import StopTokens
from qlora_service.domain.jobs import Job
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.queue import Queue
from qlora_service.specs import Training, parse_spec
from qlora_service.store.database import Database
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.state import TrainingState, from_files, to_files
from qlora_service.training.loop import Unattended
from tests.tiny_model import CHATML, build_tiny_model
from tests.tiny_training import Recorder, load, rows, run
from workers.trainer.adapter_files import write_adapter

ROWS = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}."} for n in range(4)]
SPEC = {"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": 64}}
LEASE_S = 600.0
ATTEMPT = 1
"""Token of the disturbed attempt"""


class DataDirectory:
    """The product's objects over one data directory; closes the database at the end of a `with`."""

    def __init__(self, path: Path, prepared: Path) -> None:
        """`prepared` is the directory that `prepare` has filled."""
        self.path, self.prepared = path, prepared
        self.database = Database(f"sqlite:///{path / 'state.db'}")
        self.artifacts = ArtifactStore((path / "artifacts").as_uri())
        self.catalog = Catalog(prepared / "models")
        self.queue = Queue(self.database, lease_s=LEASE_S)
        self.service = Service.of(
            Stores(
                database=self.database,
                artifacts=self.artifacts,
                catalog=self.catalog,
                tmp_dir=path / "tmp",
            )
        )

    def __enter__(self) -> DataDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    @property
    def job(self) -> Job:
        """The only job."""
        (job,) = self.service.jobs.list_jobs()
        return job

    def statuses(self, job: Job) -> list[str]:
        """The job's statuses so far, from its events."""
        events = self.service.jobs.events(job.id)
        return [event.data["status"] for event in events if event.type == "status"]

    def damage(self) -> list[str]:
        """Faults that SQLite reports in the database file."""
        with closing(sqlite3.connect(self.path / "state.db")) as connection:
            faults = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            return faults + [f"a dangling key: {row}" for row in connection.execute("PRAGMA foreign_key_check")]

    def inconsistencies(self, job: Job) -> list[str]:
        """Differences between the status in the job's row and that of its last event."""
        last = self.statuses(job)[-1]
        return [] if last == job.status else [f"the job is {job.status}, its last event has status {last}"]


def prepare(to: Path) -> None:
    """Creates the directories of all scenarios: a catalog, data directories, states and adapter of a real training."""
    source = build_tiny_model(to / "source")
    Catalog(to / "models").import_model("tiny", source)
    for name in ("empty", "queued", "running"):
        database = Database(f"sqlite:///{to / name / 'state.db'}")
        database.migrate()
        database.close()
        with DataDirectory(to / name, to) as data:
            if name != "empty":
                data.service.jobs.submit(parse_spec(SPEC))
            if name == "running":
                data.queue.claim("a worker")
    _train(source, to)
    shutil.copytree(to / "empty", to / "checkpointed")
    with DataDirectory(to / "checkpointed", to) as data:
        for step in (1, 2):
            save_checkpoint(data, ATTEMPT, step)


def states_of(data: DataDirectory) -> dict[int, dict[str, bytes]]:
    """The training's states as checkpoint files, by step."""
    states: dict[int, dict[str, bytes]] = pickle.loads((data.prepared / "states.pickle").read_bytes())
    return states


def checkpoints_of(data: DataDirectory, token: int) -> Checkpoints:
    return Checkpoints(data.path / "checkpoints" / "job", token)


def save_checkpoint(data: DataDirectory, token: int, step: int, metrics: str = "once") -> None:
    """Saves the state of `step` and returns when it is on disk. Raises: OSError."""
    checkpoints = checkpoints_of(data, token)
    checkpoints.save(from_files(states_of(data)[step]), metrics.encode(), {"threads": 1})
    checkpoints.flush()


def _train(source: Path, to: Path) -> None:
    """Trains four steps; writes their states to `states.pickle` and the adapter's files to `adapter`."""
    states: dict[int, dict[str, bytes]] = {}

    class KeepAll(Unattended):
        def checkpoint_is_due(self) -> bool:
            return True

        def save(self, state: TrainingState) -> None:
            states[state.step] = to_files(state)

    model, recorder, training = load(source), Recorder(), Training(batch_size=2, max_seq_len_tokens=64)
    run(model, rows(8), training, steps=4, recorder=recorder, control=KeepAll())
    (to / "states.pickle").write_bytes(pickle.dumps(states))
    (to / "metrics.jsonl").write_bytes(recorder.lines())
    (to / "adapter").mkdir()
    base, stop_tokens = Catalog(to / "models").get("tiny"), StopTokens({}, {}, {}, None)
    write_adapter(model, base, rows(2), CHATML, stop_tokens, to / "metrics.jsonl", to / "adapter")
