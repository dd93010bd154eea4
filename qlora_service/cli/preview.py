"""The command `datasets preview`: rows as a job trains them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora_service.cli.options import AsJson, DatasetId, MaxSeqLen, Url, connect, print_json, printable

if TYPE_CHECKING:
    from qlora_service.client import PreviewRow
    from qlora_service.client.wire import PreviewDocument


def preview(  # noqa: PLR0913 - an argument per option of the command
    dataset: DatasetId,
    base_model: Annotated[str, typer.Option(help="Base model, as in `qlora models list`.")],
    max_seq_len_tokens: MaxSeqLen = None,
    too_long: Annotated[
        Literal["refuse", "truncate", "drop"], typer.Option(help="As in a job's training.too_long.")
    ] = "refuse",
    train_on: Annotated[
        Literal["assistant", "all"], typer.Option(help="As in a job's training.train_on.")
    ] = "assistant",
    prompt_format: Annotated[
        Literal["auto", "chat", "plain"], typer.Option(help="As in a job's training.prompt_format.")
    ] = "auto",
    skip: Annotated[int, typer.Option(min=0, help="Usable rows to skip.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=50, help="Maximum number of rows.")] = 5,
    tokens: Annotated[bool, typer.Option("--tokens", help="Print one token per line, after its id.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print rows as a job trains them, with the chat template applied. Trained text is in ⟦ ⟧."""
    with connect(url) as client:
        rows = client.preview(
            dataset,
            base_model,
            max_seq_len_tokens=max_seq_len_tokens,
            too_long=too_long,
            train_on=train_on,
            prompt_format=prompt_format,
            skip=skip,
            limit=limit,
        )
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    for row in rows:
        _print_row(row, tokens)


def _print_row(row: PreviewRow, tokens: bool) -> None:
    if row.problem is not None:
        typer.echo(f"--- line {row.line}: left out: {printable(row.problem)}")
        return
    shown = _token_lines if tokens else _marked_text
    typer.echo(f"--- line {row.line}: {_counts(row)}\n{shown(row)}")
    if row.rejected is not None:
        typer.echo(f"--- line {row.line}, rejected: {_counts(row.rejected)}\n{shown(row.rejected)}")


def _counts(document: PreviewRow | PreviewDocument) -> str:
    trained = sum(token.trained for token in document.tokens)
    cut = f", {document.cut_tokens} cut off" if document.cut_tokens else ""
    return f"{len(document.tokens)} tokens, {trained} trained{cut}"


def _marked_text(document: PreviewRow | PreviewDocument) -> str:
    """The text with each trained span in brackets, and the appended stop token as the end of what is trained."""
    text = document.text + (document.appended_stop or "")
    spans = list(document.trained_spans)
    if document.appended_stop is not None:
        is_continued = bool(spans) and spans[-1][1] == len(document.text)
        spans.append((spans.pop()[0] if is_continued else len(document.text), len(text)))
    pieces, shown = [], 0
    for start, end in spans:
        pieces += [printable(text[shown:start]), "⟦", printable(text[start:end]), "⟧"]
        shown = end
    return "".join(pieces) + printable(text[shown:])


def _token_lines(document: PreviewRow | PreviewDocument) -> str:
    """A line per token: its id and its text, in brackets if it is trained."""
    return "\n".join(
        f"{token.id:>7}  " + ("⟦{}⟧" if token.trained else "{}").format(printable(token.text, in_line=True))
        for token in document.tokens
    )
