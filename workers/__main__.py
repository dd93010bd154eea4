"""`python -m workers`: runs queued jobs on this machine until SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import signal

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.planning.hardware import gpus
from qlora_service.process.logging import configure_logging
from qlora_service.process.signals import stop_signals
from qlora_service.queue.queue import Queue
from qlora_service.settings import read_settings
from qlora_service.store.database import Database
from workers.supervisor.chat_turns import ChatRules
from workers.supervisor.housekeeping import Housekeeping
from workers.supervisor.supervisor import Slot, Supervisor, SupervisorSettings


def main() -> None:
    settings = read_settings()
    configure_logging(settings.log_level)
    database = Database(settings.resolved_database_url)
    database.migrate()
    queue = Queue(
        database, lease_s=settings.lease_s, max_running=settings.max_running_jobs, max_deaths=settings.max_deaths
    )
    supervisor = Supervisor(
        database=database,
        queue=queue,
        slots=make_slots(settings.slots, [gpu.uuid for gpu in gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))]),
        housekeeping=Housekeeping(
            database=database,
            queue=queue,
            artifacts=ArtifactStore(settings.resolved_artifact_url),
            tmp_dir=settings.tmp_dir,
            checkpoint_dir=settings.checkpoint_dir,
        ),
        chat_rules=ChatRules(
            idle_s=settings.chat_idle_s,
            hold_s=settings.chat_hold_s,
            preempts=settings.chat_preempts,
            hang_s=settings.hang_s,
            max_running=settings.max_running_jobs,
        ),
        catalog=Catalog(settings.models_dir),
        settings=SupervisorSettings(
            socket_dir=settings.inference_dir,
            lock_dir=settings.resolved_lock_dir,
            log_dir=settings.resolved_data_dir / "logs",
            cancel_grace_s=settings.cancel_grace_s,
            lease_s=settings.lease_s,
            warm_s=settings.warm_s,
        ),
    )
    for number in stop_signals():
        signal.signal(number, lambda *_: supervisor.stop())
    supervisor.run()
    database.close()


def make_slots(count: int | None, gpus: list[str]) -> list[Slot]:
    """One slot per GPU, at most `count`; without a GPU, `count` (default: one) slots on the CPU.

    `gpus` are UUIDs.
    """
    if not gpus:
        return [Slot(index, None) for index in range(count or 1)]
    return [Slot(index, gpu) for index, gpu in enumerate(gpus[:count])]


if __name__ == "__main__":
    main()
