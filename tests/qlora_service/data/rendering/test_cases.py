"""Rows as people send them, from ../shared/cases: text and ids of transformers, and what is trained of them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qlora_service.data.files.checks import check_dataset, read_examples
from qlora_service.data.rendering.message_forms import with_arguments_as
from qlora_service.data.rendering.preview import preview_row
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules
from qlora_service.data.rows.examples import Chat
from tests.benchmarks._rendering import families

CASES = Path(__file__).parents[5] / "shared" / "cases"
CALL = '<tool_call>\n{"name": "ferry", "arguments": {"pier": "%s"}}\n</tool_call><|im_end|>'
LAST = "<think>\n\n</think>\n\nAt 9:40.<|im_end|>"
TRAINED = {
    "legacy-functions-dropped/functions-legacy.jsonl": [CALL % "north", "At 9:40.<|im_end|>"],
    "null-content-becomes-None/agent-null.jsonl": ["At 9:40.<|im_end|>"],
    "parquet-null-arguments/tool-struct.jsonl": [CALL % "north", "Done.<|im_end|>"],
    "parquet-null-arguments/tool-struct.parquet": [CALL % "north", "Done.<|im_end|>"],
    "reasoning-keys-dropped/reasoning-key.jsonl": ["<think>\nStart at 0 and count two more.\n</think>\n\n2.<|im_end|>"],
    "reasoning-keys-dropped/thinking-keys.jsonl": ["<think>\nStart at 0 and count two more.\n</think>\n\n2.<|im_end|>"],
    "thoughts-in-answers-refused/thoughts-single.jsonl": ["The first.<|im_end|>"],
    "thoughts-in-answers-refused/thoughts.jsonl": ["The first.<|im_end|>", "The second.<|im_end|>"],
    "tool-call-not-in-template/agent-empty.jsonl": ["At 9:40.<|im_end|>"],
    "tool-calls-not-trained/agent-empty.jsonl": [CALL % "0", LAST],
    "tool-calls-not-trained/agent-null.jsonl": [CALL % "0", LAST],
    "tool-calls-not-trained/agent.jsonl": [CALL % "north", LAST],
    "train-false-ignored/train-false.jsonl": ["<think>\n\n</think>\n\nThe first.<|im_end|>"],
}
"""What is trained of the first row of each file."""
WARNED = {
    "null-content-becomes-None/agent-null.jsonl": "/messages/1/tool_calls/0/function/name",
    "thoughts-in-answers-refused/thoughts-single.jsonl": "/messages/1/content",
    "thoughts-in-answers-refused/thoughts.jsonl": "/messages/1/content",
    "tool-call-not-in-template/agent-empty.jsonl": "/messages/1/tool_calls/0/function/name",
    "train-false-ignored/chat-kwargs.jsonl": "/documents/0",
}
"""Where the first warning of the first row points to; the other files have no warnings."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer: Tokenizer = families.train_tokenizer()
    return families.build_model("qwen3", tmp_path_factory.mktemp("cases") / "qwen3", tokenizer)


def rendered(model: Path, file: str) -> tuple[list[RenderedRow], list[str], list[Chat]]:
    """The rows of a case under its own template, if it has one; the trained pieces of the first row."""
    path = CASES / file
    if not path.is_file():
        pytest.skip(f"no {file} in ../shared/cases")
    template = path.parent / "chat_template.jinja"
    shutil.copy(template if template.is_file() else CASES / "tool-calls-not-trained" / template.name, model)
    report = check_dataset(path)
    sources = list(read_examples(path, report.container, report.shape))
    with Renderer(model, RenderRules(4096), datetime.now(UTC)) as renderer:
        rows = [row for row in renderer.render(sources) if isinstance(row, RenderedRow)]
        spans = preview_row(renderer, rows[0])["trained_spans"]
    chats = [row.example for row in sources if isinstance(row.example, Chat)]
    assert len(rows) == len(sources) == len(chats)
    return rows, [rows[0].text[start:end].lstrip("\n") for start, end in spans], chats


@pytest.mark.parametrize("file", TRAINED)
def test_answers_calls_and_thoughts_are_trained_with_their_ends(model: Path, file: str) -> None:
    _, trained, _ = rendered(model, file)
    assert trained == TRAINED[file]


@pytest.mark.parametrize("file", {**TRAINED, **WARNED})
def test_what_the_template_leaves_out_is_a_warning(model: Path, file: str) -> None:
    rows, _, _ = rendered(model, file)
    pointers = [warning.pointer for warning in rows[0].warnings]
    assert pointers[:1] == ([WARNED[file]] if file in WARNED else [])


@pytest.mark.parametrize("file", TRAINED)
def test_text_and_ids_are_those_of_transformers(model: Path, file: str) -> None:
    rows, _, chats = rendered(model, file)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    for row, chat in zip(rows, chats, strict=True):
        options = {"tools": list(chat.tools or ()) or None, "documents": list(chat.documents or ()) or None}
        # The cases' templates write arguments with `tojson`, which escapes a text.
        messages = [with_arguments_as("object", message) for message in chat.messages]
        assert row.text == tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        assert list(row.input_ids) == ids
