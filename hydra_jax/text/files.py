"""Files of prompts as records: JSON, JSON lines, CSV and Parquet, bounded in size."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path
from typing import Any

from hydra_jax.errors import UserError, reason
from hydra_jax.text.records import check_columns

MOST_BYTES = 1 << 27
"""Most bytes of a prompt file, unpacked: three times ROME's counterfact.json."""


ROW_BYTES = 64
"""A row of a Parquet file counts for this and its texts: empty ones are stored in no space, but not kept in none."""


def records(path: Path) -> list[tuple[str, Any]]:
    """Read a file's records, each with its place for error messages; the name's end says which format it is.

    Raises:
      UserError: if the file cannot be read, or is not of its format.
    """
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if suffix == ".csv":
        return _csv(text, path)
    return _array(text, path) if text.lstrip().startswith("[") else _lines(text, path)


def read_text(path: Path) -> str:
    """Read a UTF-8 file's text, unpacked if its name ends in .gz.

    Raises:
      UserError: if it cannot be read, is a damaged gzip file, has more than MOST_BYTES, or is not UTF-8.
    """
    data = _bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); save it as UTF-8") from error


def _bytes(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from error
    except ValueError as error:  # of a path with a NUL byte
        raise UserError(f"{str(path)!r}: is not a path ({error}); give a file that can be read") from error
    if len(data) > MOST_BYTES:
        raise _too_long(path)
    return data


def _too_long(path: Path) -> UserError:
    return UserError(f"{path}: has more than {MOST_BYTES >> 20} MiB of text; give a part of it")


def _array(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: is not JSON ({getattr(error, 'msg', error)}); mend the line") from error
    return [(f"{path}: record {number}", record) for number, record in enumerate(found, 1)]


def _lines(text: str, path: Path) -> list[tuple[str, Any]]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            said = getattr(error, "msg", error)
            raise UserError(f'{where}: is not JSON ({said}); a line is {{"prompt": "..."}}') from error
    return found


def _csv(text: str, path: Path) -> list[tuple[str, Any]]:
    """Return the rows of a CSV file, with what is not empty in them."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    found: list[tuple[str, Any]] = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                check_columns(header, where)
            elif len(row) != len(header):
                raise UserError(
                    f"{where}: has {len(row)} fields, the header {len(header)}; put texts with commas into double"
                    " quotes"
                )
            else:
                values = {name: value for name, value in zip(header, row, strict=True) if value}
                found.append((where, {"prompt": ""} | values | _position(values)))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: is not CSV ({error}); mend the line") from error
    return found


def _position(values: dict[str, str]) -> dict[str, int]:
    """Return a position that is a number, which CSV can write as text alone."""
    position = values.get("position", "")
    return {"position": int(position)} if re.fullmatch("-?[0-9]{1,9}", position) else {}


def _parquet(path: Path) -> list[tuple[str, Any]]:
    """Return the rows of a Parquet file, as many texts as MOST_BYTES allows."""
    import pyarrow.parquet  # type: ignore[import-untyped]  # takes a while, and other formats do without

    data = io.BytesIO(_bytes(path))
    try:
        schema = pyarrow.parquet.read_schema(data)
        # pandas keeps an index that is not just numbers in a column of this name; it is none of the prompt's.
        names = [name for name in schema.names if not name.startswith("__index_level_")]
        check_columns(names, str(path))
        for name in names:
            _check_type(name, schema.field(name).type, path)
        # What repeats in a column is kept once, so that a small file cannot fill memory before it is counted.
        texts = [name for name in names if not pyarrow.types.is_primitive(schema.field(name).type)]
        file = pyarrow.parquet.ParquetFile(data, read_dictionary=texts)
        if sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups)) > MOST_BYTES:
            raise _too_long(path)
        found: list[tuple[str, Any]] = []
        length = 0
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for row in range(batch.num_rows):
                values = {name: batch.column(name)[row].as_py() for name in names}
                length += sum(len(value) for value in values.values() if isinstance(value, str)) + ROW_BYTES
                if length > MOST_BYTES:
                    raise _too_long(path)
                given = {name: value for name, value in values.items() if value is not None}
                found.append((f"{path}: record {len(found) + 1}", {"prompt": ""} | given))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a whole Parquet file ({reason(error)}); write it again") from error
    return found


def _check_type(name: str, type: Any, path: Path) -> None:
    import pyarrow.types as known  # type: ignore[import-untyped]  # as above: only Parquet files want it

    value = type.value_type if known.is_dictionary(type) else type
    text = known.is_string(value) or known.is_large_string(value) or known.is_string_view(value) or known.is_null(value)
    # Whole numbers with gaps between them are written as floats.
    number = name in ("id", "position") and (known.is_integer(value) or known.is_floating(value))
    if not (text or number):
        wanted = "strings or whole numbers" if name in ("id", "position") else "strings"
        raise UserError(f"{path}: column {name} is of type {type}, not of {wanted}; write it so")
