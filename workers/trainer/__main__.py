"""`python -m workers.trainer DEVICE`: the trainer process. Its stdin is the socket to its supervisor."""

from __future__ import annotations

import os
import signal
import socket
import sys

# Before the libraries read them: no network, no progress bars, no forked tokenizer threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "true"  # rendering comes before anything that could fork

from qlora_service.process.logging import configure_logging
from qlora_service.process.startup import end_process
from qlora_service.settings import Settings
from workers.supervisor_channel import SupervisorLine
from workers.trainer.trainer import Trainer

if __name__ == "__main__":
    _settings = Settings()
    configure_logging(_settings.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    _line = SupervisorLine(socket.socket(fileno=sys.stdin.fileno()))
    _line.start()
    try:
        Trainer(sys.argv[1], _settings, _line).serve()
    except SystemExit as ending:
        end_process(int(ending.code or 0))
    end_process(0)
