"""`qlora chat`: ask a model something, or talk with it."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.cli.exit_codes import ExitCode
from qlora_service.cli.options import AsJson, Url, connect, print_error, print_json, print_note
from qlora_service.client.wire import ServiceError

if TYPE_CHECKING:
    from qlora_service.client import Client

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL_OR_JOB", help="A base model's name, a fine-tuned model's, or a succeeded job's id."),
]
PROMPT = "> "
NO_SUCH_MODEL = "model_not_found"


def chat(
    model: Model,
    message: Annotated[
        str | None, typer.Argument(help="What to ask; default: what is piped in, else a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token every time; default: 1.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Try a model: a base model, or what a job made of it.

    Prints the answer as it is generated. Ctrl-C ends an answer, Ctrl-D a conversation. The first question waits for
    the base model to be loaded; while a job has the slot, it is refused.
    """
    options: dict[str, Any] = {"max_completion_tokens": max_tokens, "temperature": temperature}
    options = {name: value for name, value in options.items() if value is not None}
    opening = [] if system is None else [{"role": "system", "content": system}]
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read()
    with connect(url) as client:
        if message is None:
            _converse(client, model, opening, options, as_json)
        else:
            asked = [*opening, {"role": "user", "content": message}]
            _, whole = _answer(client, model, asked, options, as_json)
            if not whole:
                raise typer.Exit(ExitCode.INTERRUPTED)


def _converse(
    client: Client, model: str, opening: list[dict[str, str]], options: dict[str, Any], as_json: bool
) -> None:
    """One question after the other, each with all that was said before."""
    said = list(opening)
    print_note(f"Talking with {model}. Ctrl-C ends an answer, Ctrl-D the conversation.")
    while True:
        try:
            question = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print_note("")
            return
        if not question.strip():
            continue
        asked = [*said, {"role": "user", "content": question}]
        try:
            answer, _ = _answer(client, model, asked, options, as_json)
        except ServiceError as error:
            if error.code == NO_SUCH_MODEL:
                raise
            # Such as a job that has the slot: the conversation is not lost.
            print_error(error.message, error.findings)
            continue
        said = [*asked, {"role": "assistant", "content": answer}]


def _answer(
    client: Client, model: str, asked: list[dict[str, str]], options: dict[str, Any], as_json: bool
) -> tuple[str, bool]:
    """Prints the answer; what was said, and whether that is all of it: Ctrl-C ends it."""
    pieces: list[str] = []
    whole = True
    with closing(client.chat(model, asked, **options)) as answer:
        try:
            for piece in answer:
                pieces.append(piece)
                if not as_json:
                    typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            whole = False
    text = "".join(pieces)
    if as_json:
        print_json({"model": model, "content": text, "complete": whole})
    else:
        typer.echo()
    return text, whole
