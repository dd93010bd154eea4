"""Tokenizers as their models come with them, and the text of single tokens."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, processors

from qlora_service.errors import InvalidModel


def load_tokenizer(path: Path) -> Tokenizer:
    """The file's tokenizer, which must not be modified. The last one is cached: reading takes longer than most uses.

    Raises:
        InvalidModel: the file is not a tokenizer's.
    """
    try:
        status = path.stat()
        return _read(path, (status.st_ino, status.st_mtime_ns))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise InvalidModel(f"the base model's tokenizer.json cannot be read: {error}") from None


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of a token by itself; bytes that are only a part of a character are written as <0xE4>."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False)
    if text and "\ufffd" not in text:
        return text
    token: str = tokenizer.id_to_token(token_id) or ""
    if not all(map(_BYTES.__contains__, token)):
        return token
    decoded = bytes(_BYTES[char] for char in token).decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", decoded)


@lru_cache(maxsize=1)
def _read(path: Path, version: tuple[int, int]) -> Tokenizer:  # noqa: ARG001 - part of the cache key
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    is_sequence = isinstance(tokenizer.post_processor, processors.Sequence)
    for processor in tokenizer.post_processor if is_sequence else [tokenizer.post_processor]:
        if hasattr(processor, "trim_offsets"):
            # The space at a token's beginning belongs to the token: it is trained, and it may straddle a seam.
            processor.trim_offsets = False
    return tokenizer


def _byte_of_char() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for.

    Printable characters of Latin-1 stand for themselves, the characters from U+0100 on for the other bytes, in order.
    Source: bytes_to_unicode in OpenAI's GPT-2.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {char: ord(char) if ord(char) < 256 else next(others) for char in sorted(alphabet)}


_BYTES = _byte_of_char()
