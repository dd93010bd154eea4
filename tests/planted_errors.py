"""Unusable rows of a dataset of conversations, for the tests and the benchmark of the dataset check."""

from __future__ import annotations

import json
from typing import NamedTuple

from qlora_service.data.files.splitting import MAX_ROW_BYTES


class Planted(NamedTuple):
    """A line without its line end, a part of its finding's reason, and the finding's pointer."""

    line: bytes
    reason: str
    pointer: str = ""


def chat_line(question: str, answer: str) -> bytes:
    """A usable row of the shape `messages`."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False).encode()


def _with(column: bytes) -> bytes:
    """A usable row with an additional column."""
    return chat_line("Ist es grün?", "Ja")[:-1] + b', "extra": ' + column + b"}"


ANSWER_POINTER = "/messages/1/content"
MALFORMED = (
    Planted(chat_line("a", "b")[:-2], "not valid JSON: Expecting ',' delimiter"),
    Planted(chat_line("a", "b") + b" x", "not valid JSON: Extra data at column"),
    Planted(b'{"messages": [}', "not valid JSON: Expecting value at column 15"),
    Planted(b"\xef\xbb\xbf" + chat_line("a", "b"), "not valid JSON: Expecting value at column 1"),
    Planted(_with(b"'a'"), "not valid JSON: Expecting value"),
    Planted(_with(b'"a\tb"'), "not valid JSON: Invalid control character"),
    Planted(_with(b"NaN"), "NaN is not a JSON number"),
    Planted(_with(b"-Infinity"), "-Infinity is not a JSON number"),
    Planted(_with(b"1e999"), "a number is too large for a 64-bit float"),
    Planted(_with(b"9" * 5000), "a number has too many digits"),
    Planted(_with(b'{"a": 1, "a": 1}'), "the key 'a' is used twice"),
    Planted(_with(b'{"a": 1, "\\u0061": 2}'), "the key 'a' is used twice"),
    # The kept value has two quotation marks more, as many as the dropped key.
    Planted(_with(b'{"a": 1, "a": "\\u0022\\u0022"}'), "the key 'a' is used twice"),
    Planted(chat_line("a", "b")[:-1] + b', "messages": []}', "the key 'messages' is used twice"),
    Planted(chat_line("a", "\\ud83d").replace(b"\\\\", b"\\"), "an unpaired surrogate", ANSWER_POINTER),
    Planted(_with(b'{"\\ude00": 1}'), "an unpaired surrogate", "/extra"),
    Planted(chat_line("a", "b\0"), "contains a NUL character", ANSWER_POINTER),
    Planted(_with(b'"\0"'), "contains a NUL character"),
    Planted(chat_line("a", "caf\xe9").replace("\xe9".encode(), b"\xe9"), "byte 0xe9 at offset"),
    Planted(_with(b'"\xed\xa0\x80"'), "byte 0xed at offset"),
    Planted(_with(b"[" * 64 + b"]" * 64), "nested deeper than 64 levels"),
    Planted(_with(b"[" * 100_000 + b"]" * 100_000), "nested deeper than 64 levels"),
    Planted(_with(b'"' + b"x" * MAX_ROW_BYTES + b'"'), "longer than 16 MiB"),
    Planted(b'["messages"]', "a row must be a JSON object"),
    Planted(b"null", "a row must be a JSON object"),
)
"""Invalid rows of every shape: the line is not a valid JSON object."""
UNUSABLE = (
    Planted(b"{}", "the keys of this row fit no shape"),
    Planted(b'{"text": "a"}', "this row has the shape text, the dataset has the shape messages"),
    Planted(b'{"messages": "a"}', "must be a list, is a string", "/messages"),
    Planted(b'{"messages": []}', "no assistant message to train", "/messages"),
    Planted(chat_line("a", "b").replace(b"assistant", b"user"), "no assistant message to train", "/messages"),
    Planted(chat_line("a", "b").replace(b"user", b"bot"), "must be one of system", "/messages/0/role"),
    Planted(chat_line("a", "b").replace(b'"b"', b"5"), "must be a string, is a number", ANSWER_POINTER),
    Planted(chat_line("a", "b").replace(b'"a"', b"null"), "must be a string, is null", "/messages/0/content"),
    Planted(chat_line("a", ""), "the answer is empty", ANSWER_POINTER),
    Planted(chat_line("a", " \u2003\n"), "the answer is empty", ANSWER_POINTER),
    Planted(chat_line("a", "b").replace(b'"b"', b'"b", "weight": 1.0'), "must be 0 or 1", "/messages/1/weight"),
)
"""Valid JSON objects without a conversation to train on."""
PLANTED = MALFORMED + UNUSABLE
