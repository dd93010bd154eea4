"""Reader of what a row gives the chat template beside the messages: tools, documents, and variables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import Notes, as_list, as_object, json_cell
from qlora_service.data.rows.tools import read_tools

Objects = tuple[dict[str, Any], ...]

OPTION_COLUMNS = frozenset({"tools", "functions", "documents", "chat_template_kwargs"})
# Parameters of transformers' `apply_chat_template` that are set for all rows, or have an own column.
_RESERVED = frozenset(
    {
        *("conversation", "conversations", "messages", "tools", "documents", "chat_template", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    }
)


@dataclass(frozen=True)
class ChatOptions:
    """See the fields of the same names in `examples.Chat`."""

    tools: Objects | None = None
    documents: Objects | None = None
    template_arguments: dict[str, Any] | None = None


NO_OPTIONS = ChatOptions()


def read_options(value: dict[str, Any], notes: Notes, parent: str = "") -> ChatOptions:
    """The options under the keys of `value`, whose pointer is `parent`.

    Raises:
        RowProblem: not lists of objects or an object, or a variable that the service sets itself.
    """
    if OPTION_COLUMNS.isdisjoint(value):
        return NO_OPTIONS
    return ChatOptions(read_tools(value, notes, parent), _documents(value, parent), _template_arguments(value, parent))


def _documents(value: dict[str, Any], parent: str) -> Objects | None:
    documents, pointer = json_cell(value, "documents", parent), f"{parent}/documents"
    if documents is None:
        return None
    return (
        tuple(as_object(item, f"{pointer}/{index}") for index, item in enumerate(as_list(documents, pointer))) or None
    )


def _template_arguments(value: dict[str, Any], parent: str) -> dict[str, Any] | None:
    arguments = json_cell(value, "chat_template_kwargs", parent)
    if arguments is None:
        return None
    pointer = f"{parent}/chat_template_kwargs"
    for name in as_object(arguments, pointer):
        if name in _RESERVED:
            raise RowProblem(
                f"{pointer}/{name}", f"a row cannot set {name}: leave it out, or use the row's own columns"
            )
    return arguments or None
