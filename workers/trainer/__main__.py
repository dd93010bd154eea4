"""`python -m workers.trainer DEVICE`: the trainer process. Its stdin is the channel to its supervisor."""

from __future__ import annotations

import os
import signal
import socket
import sys

# Set before the libraries read them: no network, no progress bars, tokenizers with threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "true"  # rendering precedes everything that could fork

from qlora_service.process.logging import configure_logging
from qlora_service.process.startup import end_process
from qlora_service.settings import Settings
from workers.supervisor_channel import SupervisorChannel
from workers.trainer.trainer import Trainer

if __name__ == "__main__":
    _settings = Settings()
    configure_logging(_settings.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor handles it
    _channel = SupervisorChannel(socket.socket(fileno=sys.stdin.fileno()))
    _channel.start()
    try:
        Trainer(sys.argv[1], _settings, _channel).serve()
    except SystemExit as exit_request:
        end_process(int(exit_request.code or 0))
    end_process(0)
