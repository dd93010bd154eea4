"""The command `chat`: one question to a model, or a conversation."""

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
    typer.Argument(
        metavar="MODEL_OR_JOB", help="Name of a base model or a fine-tuned model, or id of a succeeded job."
    ),
]
PROMPT = "> "
MODEL_NOT_FOUND = "model_not_found"


def chat(
    model: Model,
    message: Annotated[
        str | None, typer.Argument(help="The question; default: standard input if piped, else a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message at the start.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens per answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=2.0, help="0 always takes the most likely token; default: 1.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Chat with a base model, or with the adapter of a job.

    Prints the answer as it is generated. Ctrl-C ends an answer, Ctrl-D a conversation. The first question waits until
    the base model is loaded; while a job occupies the slot, questions are refused.
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
            messages = [*opening, {"role": "user", "content": message}]
            _, complete = _answer(client, model, messages, options, as_json)
            if not complete:
                raise typer.Exit(ExitCode.INTERRUPTED)


def _converse(
    client: Client, model: str, opening: list[dict[str, str]], options: dict[str, Any], as_json: bool
) -> None:
    """Answers questions until Ctrl-D; each request contains the whole conversation."""
    history = list(opening)
    print_note(f"Chatting with {model}. Ctrl-C ends an answer, Ctrl-D the conversation.")
    while True:
        try:
            question = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            print_note("")
            return
        if not question.strip():
            continue
        messages = [*history, {"role": "user", "content": question}]
        try:
            answer, _ = _answer(client, model, messages, options, as_json)
        except ServiceError as error:
            if error.code == MODEL_NOT_FOUND:
                raise
            # Any other refusal, such as of a job that occupies the slot, does not end the conversation.
            print_error(error.message, error.findings)
            continue
        history = [*messages, {"role": "assistant", "content": answer}]


def _answer(
    client: Client, model: str, messages: list[dict[str, str]], options: dict[str, Any], as_json: bool
) -> tuple[str, bool]:
    """Prints the answer; its text, and whether it is complete, not ended by Ctrl-C."""
    pieces: list[str] = []
    complete = True
    with closing(client.chat(model, messages, **options)) as answer:
        try:
            for piece in answer:
                pieces.append(piece)
                if not as_json:
                    typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            complete = False
    text = "".join(pieces)
    if as_json:
        print_json({"model": model, "content": text, "complete": complete})
    else:
        typer.echo()
    return text, complete
