from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.http.multipart import Form, FormWriter, boundary_of, is_multipart
from qlora_service.errors import InvalidRequest, QLoRAError, TooLarge

BODY = (
    b'--xx\r\nContent-Disposition: form-data; name="file"; filename="Gr\xc3\xbc\xc3\x9fe.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n"
    b"line 1\r\nline 2 --x\r\n\r\n--xx\r\n"
    b'content-disposition: form-data; name="shape"\r\n\r\n'
    b"messages\r\n--xx--\r\n"
)


def receive(directory: Path, pieces: Iterable[bytes]) -> Form:
    with FormWriter(b"xx", directory, ["file"], ["shape"], max_field_bytes=100) as writer:
        for piece in pieces:
            writer.write(piece)
        return writer.finish()


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_parts_do_not_depend_on_how_the_body_is_split(tmp_path: Path, piece: int) -> None:
    form = receive(tmp_path, (BODY[start : start + piece] for start in range(0, len(BODY), piece)))
    assert form.files["file"].filename == "Grüße.jsonl"
    assert form.files["file"].path.read_bytes() == b"line 1\r\nline 2 --x\r\n"
    assert form.fields == {"shape": b"messages"}


@pytest.mark.parametrize(
    ("body", "error", "reason"),
    [
        (BODY[:-8], InvalidRequest, "ends before its last boundary"),
        (BODY[:150], InvalidRequest, "ends before its last boundary"),
        (b"", InvalidRequest, "ends before its last boundary"),
        (b"no boundary at all", InvalidRequest, "cannot be read"),
        (BODY.replace(b'"shape"', b'"shap"'), InvalidRequest, "unknown part 'shap': this form has the parts file"),
        (BODY.replace(b'"shape"', b'"file"'), InvalidRequest, "'file' is sent twice"),
        (BODY.replace(b"messages", b"m" * 101), TooLarge, "larger than 100 bytes"),
    ],
)
def test_invalid_form_is_refused(tmp_path: Path, body: bytes, error: type[QLoRAError], reason: str) -> None:
    with pytest.raises(error, match=reason):
        receive(tmp_path, [body])


def test_field_is_decoded_as_text() -> None:
    form = Form(fields={"a": bytearray("Grüße".encode()), "b": bytearray(b"ab\xff"), "c": bytearray(b"\0")})
    assert form.text("a") == "Grüße"
    assert form.text("missing") is None
    with pytest.raises(InvalidRequest, match="byte 0xff at offset 2") as caught:
        form.text("b")
    assert caught.value.location == "b"
    with pytest.raises(InvalidRequest, match="NUL"):
        form.text("c")


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(BODY)),
            st.integers(0, 40),
            st.sampled_from([b"", b"\0", b"\xff", b"\r\n", b"--xx", b";", b'"']),
        ),
        max_size=4,
    ),
    st.integers(1, len(BODY)),
)
def test_damaged_body_is_parsed_or_refused(tmp_path: Path, damages: list[tuple[int, int, bytes]], piece: int) -> None:
    body = bytearray(BODY)
    for position, length, replacement in damages:
        body[position : position + length] = replacement
    try:
        form = receive(tmp_path, (bytes(body[start : start + piece]) for start in range(0, len(body), piece)))
    except (InvalidRequest, TooLarge) as error:
        json.dumps(error.as_dict(), ensure_ascii=False).encode()
    else:
        assert form.files.keys() <= {"file"}
        assert form.fields.keys() <= {"shape"}


def test_content_type_identifies_a_form_and_its_boundary() -> None:
    assert is_multipart("Multipart/Form-Data; boundary=xx")
    assert not is_multipart("application/json")
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    with pytest.raises(InvalidRequest, match="no boundary"):
        boundary_of("multipart/form-data")
