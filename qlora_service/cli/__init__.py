"""The command line `qlora`. Needs the base dependencies only: each command imports what it needs."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from qlora_service.cli import chat, datasets, events, jobs, keys, local, models, plan, recipes, submission
from qlora_service.cli.exit_codes import MEANINGS, code_of_error
from qlora_service.cli.options import InvalidFile, print_error
from qlora_service.client.wire import ServiceError
from qlora_service.errors import QLoRAError

app = typer.Typer(
    name="qlora",
    help="Fine-tune language models with QLoRA: submit rows, watch the training, download the adapter.",
    epilog="QLORA_URL is the address of the service, QLORA_API_KEY the key. Exit codes: "
    + "; ".join(f"{code.value} {meaning}" for code, meaning in MEANINGS.items())
    + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(local.serve)
app.command()(plan.plan)
app.command()(submission.submit)
app.command()(jobs.watch)
app.command()(events.logs)
app.command()(jobs.download)
app.command("jobs")(jobs.list_jobs)
app.command()(jobs.pause)
app.command()(jobs.resume)
app.command()(jobs.cancel)
app.command()(chat.chat)
app.add_typer(datasets.app, name="datasets")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.command("recipes")(recipes.show_recipes)
app.command()(local.demo)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits. An expected failure is one message on stderr and a code of `exit_codes`."""
    try:
        app(args=arguments, prog_name="qlora")
    except InvalidFile as error:
        print_error(error.message, error.findings, error.file)
        raise SystemExit(code_of_error(error)) from None
    except (QLoRAError, ServiceError) as error:
        print_error(error.message, error.findings)
        raise SystemExit(code_of_error(error)) from None
