"""Commands that run the service on this machine: serve, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_service.cli.options import DataDir


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: $QLORA_HOST, else 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on, 0 for a free one; default: $QLORA_PORT, else 8080."),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Run the service: the API and the worker together.

    Ctrl-C or SIGTERM stops both. If one of them ends by itself, the other is stopped and the exit code is 1.
    Every request needs a key: the first start prints one, `qlora keys create` creates more. Requests must name a
    loopback address, the --host or a host name of $QLORA_ALLOWED_HOSTS.
    """
    from qlora_service.cli.serving import serve as run_service
    from qlora_service.settings import read_settings

    settings = read_settings(host=host, port=port, data_dir=data_dir)
    code = run_service(host=settings.host, port=settings.port, data_dir=settings.resolved_data_dir, report=typer.echo)
    raise typer.Exit(code)


def demo(
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory of the demo's model and data; a second run reuses the model.")
    ] = Path(".cache/demo"),
    output: Annotated[Path, typer.Option(help="Directory for the adapter.")] = Path("demo-output"),
) -> None:
    """Train a small real model on a made-up notation, from dataset to answers, and show the difference.

    Fetches SmolLM2-135M-Instruct (93 MB) once, and runs its own service on a free port until the end. Takes a few
    minutes on two CPU cores.
    """
    from rich.console import Console

    from qlora_service.cli.demo import run_demo
    from qlora_service.process.logging import configure_logging

    configure_logging("WARNING")
    run_demo(directory.resolve(), output, Console())
