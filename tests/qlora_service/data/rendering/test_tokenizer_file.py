from __future__ import annotations

from pathlib import Path

import pytest

from qlora_service.data.rendering.tokenizer_file import load_tokenizer, token_text
from qlora_service.errors import InvalidModel


def test_every_byte_that_is_no_character_is_written_in_hexadecimal(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model / "tokenizer.json")
    for byte in range(0x80, 0x100):
        (token_id,) = (
            token_id
            for token_id in range(tokenizer.get_vocab_size())
            if token_text(tokenizer, token_id) == f"<0x{byte:02X}>"
        )
        assert tokenizer.decode([token_id]) == "\ufffd"


def test_token_that_is_text_is_its_text(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model / "tokenizer.json")
    for text in ("<|im_end|>", " the", "\n"):
        (token_id,) = tokenizer.encode(text, add_special_tokens=False).ids
        assert token_text(tokenizer, token_id) == text


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.json")
