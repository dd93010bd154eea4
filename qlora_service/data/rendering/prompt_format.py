"""Text prompts with text answers: as turns of a conversation, or as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenizers import Encoding

from qlora_service.data.rows.examples import (
    Chat,
    Completion,
    Example,
    LabeledAnswer,
    Preference,
    SourceRow,
    documents,
)
from qlora_service.errors import Finding

EMPTY_PROMPT = (
    "the prompt is empty, and the answer is trained after an empty user turn: write the prompt, or set "
    "training.prompt_format to plain"
)
CUT_SEAM = (
    "a token straddles the seam between the prompt and the completion, and a piece of the prompt is trained: "
    "end the prompt with a line break, or begin the completion with the space between the two"
)


def with_turns(row: SourceRow) -> SourceRow:
    """The row with its text prompt as a user turn and each text answer as the assistant's turn; others unchanged."""
    example: Example
    match row.example:
        case Completion() as answer:
            example = _turns(answer, "/completion")
        case LabeledAnswer(Completion() as answer, desirable):
            example = LabeledAnswer(_turns(answer, "/completion"), desirable)
        case Preference(Completion() as answer, Completion() as rejected):
            example = Preference(_turns(answer, "/chosen"), _turns(rejected, "/rejected"))
        case _:
            return row
    warnings = () if answer.prompt.strip() else (Finding(EMPTY_PROMPT, "/prompt", row.line, row.byte_offset),)
    return replace(row, example=example, warnings=row.warnings + warnings)


def cut_seams(row: SourceRow, encodings: Sequence[Encoding]) -> tuple[Finding, ...]:
    """A finding if a token has characters of the prompt and of the completion.

    `encodings` are the tokens of the row's documents.
    """
    is_cut = any(
        isinstance(document, Completion) and _is_cut(encoding, len(document.prompt))
        for document, encoding in zip(documents(row.example), encodings, strict=True)
    )
    return (Finding(CUT_SEAM, "/prompt", row.line, row.byte_offset),) if is_cut else ()


def _turns(document: Completion, answer_pointer: str) -> Chat:
    messages = {"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.completion}
    return Chat(messages, (False, True), text_pointers=("/prompt", answer_pointer))


def _is_cut(encoding: Encoding, seam: int) -> bool:
    """Whether the characters before and after the `seam` are parts of one token."""
    before, after = (encoding.char_to_token(seam - 1), encoding.char_to_token(seam)) if seam else (None, None)
    return before is not None and before == after
