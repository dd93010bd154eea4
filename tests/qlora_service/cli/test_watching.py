from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qlora_service.cli.watching import watch_job
from qlora_service.client import Client


@pytest.mark.parametrize("is_terminal", [True, False])
def test_warnings_that_were_printed_before_are_not_printed_again(client: Client, rows: Path, is_terminal: bool) -> None:
    with rows.open("a") as file:
        file.write('{"prompt": 1}\n{"prompt"\n')
    job = client.submit({"base_model": "tiny", "training": {"max_seq_len_tokens": 64}}, rows)
    client.cancel(job.id)
    first, second = job.warnings
    output = StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=200)
    assert watch_job(client, job.id, console, [first]).status == "cancelled"
    assert first not in output.getvalue()
    assert f"warning: {second}" in output.getvalue()


def test_control_characters_in_a_warning_are_escaped(client: Client, rows: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "chat_template_kwargs": {"\x1b]0;title\x07": True}}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    job = client.submit({"base_model": "tiny"}, rows)
    client.cancel(job.id)
    assert any("\x1b" in warning for warning in job.warnings)
    output = StringIO()
    watch_job(client, job.id, Console(file=output, width=200))
    assert "\\x1b]0;title" in output.getvalue()
    assert "\x1b" not in output.getvalue()
