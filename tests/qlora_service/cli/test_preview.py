"""The command `datasets preview` against a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_service.client import Client
from tests.running_api import write_rows


def test_preview_marks_trained_text(run: Any, client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    command = ["datasets", "preview", dataset.id, "--base-model", "tiny", "--skip", 1, "--limit", 1]
    heading, *text = run(*command).stdout.splitlines()
    assert heading.startswith("--- line 2: ")
    assert text == [
        "<|im_start|>user",
        "1 plus one is<|im_end|>",
        "<|im_start|>assistant",
        "⟦ 2.<|im_end|>⟧",
        "",
    ]
    heading, plain = run(*command, "--prompt-format", "plain").stdout.splitlines()
    assert plain == "1 plus one is⟦ 2.<|im_end|>⟧"
    short = run("datasets", "preview", dataset.id, "--base-model", "tiny", "--limit", 1, "--max-seq-len-tokens", 2)
    assert "--- line 1: left out: " in short.stdout
    (row,) = json.loads(run("datasets", "preview", dataset.id, "--base-model", "tiny", "--limit", 1, "--json").stdout)
    assert row["line"] == 1


def test_preview_shows_both_answers_of_a_pair(run: Any, client: Client, tmp_path: Path) -> None:
    pair = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
    dataset = client.upload(write_rows(tmp_path / "pairs.jsonl", [pair]))
    command = ["datasets", "preview", dataset.id, "--base-model", "tiny", "--prompt-format", "plain"]
    lines = run(*command).stdout.splitlines()
    assert lines[1].startswith("Q:⟦ yes")
    assert lines[2].startswith("--- line 1, rejected: ")
    assert lines[3].startswith("Q:⟦ no")


def test_preview_marks_characters_and_shows_tokens_only_when_asked(run: Any, client: Client, tmp_path: Path) -> None:
    row = {"instruction": "用中文回答 👍🏽", "output": "日本語 مرحبا 👩‍👩‍👧"}
    dataset = client.upload(write_rows(tmp_path / "rows.jsonl", [row]))
    shown = run("datasets", "preview", dataset.id, "--base-model", "tiny").stdout
    assert "user\n用中文回答 👍🏽<|im_end|>" in shown
    assert "assistant\n⟦日本語 مرحبا 👩‍👩‍👧<|im_end|>⟧\n" in shown
    heading, *tokens = run("datasets", "preview", dataset.id, "--base-model", "tiny", "--tokens").stdout.splitlines()
    assert heading == shown.splitlines()[0]
    assert heading.startswith(f"--- line 1: {len(tokens)} tokens, ")
    trained = [token.split("⟦")[1].removesuffix("⟧") for token in tokens if "⟦" in token]
    assert f"{len(trained)} trained" in heading
    assert trained[-1] == "<|im_end|>"
    assert "<0x97>" in "".join(trained)
    assert "\ufffd" not in shown + "".join(tokens)
    assert tokens[-1].split() == [tokens[-1].split()[0], r"\n"]


def test_control_characters_of_a_row_do_not_reach_the_terminal(run: Any, client: Client, tmp_path: Path) -> None:
    text = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc\r\tstays"
    dataset = client.upload(write_rows(tmp_path / "rows.jsonl", [{"text": text}]))
    escaped = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc\r" + "\tstays"
    shown = run("datasets", "preview", dataset.id, "--base-model", "tiny").stdout
    assert f"⟦{escaped}<|im_end|>⟧\n" in shown
    outputs = [
        run("datasets", "preview", dataset.id, "--base-model", "tiny", *options).stdout
        for options in ([], ["--tokens"], ["--json"])
    ]
    assert not {char for output in outputs for char in output} & {*"\x1b\x07\x9b\u202e\r"}
    assert json.loads(outputs[2])[0]["text"] == text
