"""Values of Arrow's types as the JSON values that they hold, so that a row in Parquet reads as the same row in JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qlora_service.data.json.strict import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

Converter = Callable[[Any, str], Any]
"""Takes a value as `to_pylist` gives it, and its JSON pointer."""


def converters(schema: pa.Schema) -> dict[str, Converter]:
    """The converter of each column whose values are not JSON values already. Converters raise RowProblem.

    The fields that a struct has for other rows are null; they are left out, at every depth. A map becomes an object,
    with its nulls. Text that is marked as JSON is read. Dates, times and decimals become text, as does binary text.
    """
    found = {field.name: _converter(field.type) for field in schema}
    return {name: converter for name, converter in found.items() if converter is not None}


def _converter(type_: pa.DataType) -> Converter | None:
    import pyarrow as pa
    from pyarrow import types

    while isinstance(type_, pa.BaseExtensionType) or types.is_dictionary(type_):
        if types.is_dictionary(type_):
            type_ = type_.value_type
        elif type_.extension_name == "arrow.json":
            return _json
        else:
            type_ = type_.storage_type
    converter: Converter | None = None
    if types.is_struct(type_):
        converter = partial(_object, {field.name: _converter(field.type) for field in type_})
    elif types.is_map(type_):
        converter = partial(_mapping, _converter(type_.item_type))
    elif types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        item = _converter(type_.value_type)
        converter = None if item is None else partial(_list, item)
    elif types.is_temporal(type_) or types.is_decimal(type_) or types.is_binary(type_) or types.is_large_binary(type_):
        converter = _text
    return converter


def _object(fields: dict[str, Converter | None], value: Any, pointer: str) -> Any:
    if value is None:
        return None
    return {
        name: item if convert is None else convert(item, f"{pointer}/{name}")
        for name, convert in fields.items()
        if (item := value[name]) is not None
    }


def _mapping(convert: Converter | None, value: Any, pointer: str) -> Any:
    """The object for Arrow's pairs of a key and a value."""
    if value is None or convert is None:
        return value if value is None else dict(value)
    return {name: convert(item, f"{pointer}/{name}") for name, item in value}


def _list(convert: Converter, value: Any, pointer: str) -> Any:
    return None if value is None else [convert(item, f"{pointer}/{index}") for index, item in enumerate(value)]


def _json(value: Any, pointer: str) -> Any:
    return None if value is None else parse_json(value, pointer)


def _text(value: Any, _: str) -> Any:
    """Binary data that is not text is null."""
    if not isinstance(value, bytes):
        return None if value is None else str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
