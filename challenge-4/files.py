"""NDJSON and CSV files, read line by line and written whole or not at all."""

import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from sources import LazyError

MAX_LINE_BYTES = 16 * 1024 * 1024  # of a line, and of a CSV record over several lines


class BadLineError(LazyError, ValueError):
    """A line of a file is not what the file should hold; the message names it."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}, line {line:,}: {reason}")
        self.file, self.line, self.reason = file, line, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return BadLineError, (self.file, self.line, self.reason)


class _LineFile:
    """A file that can be read again and again; each reading opens it anew."""

    kind = ""

    def __init__(self, path: str | PathLike[str], bad_lines: str) -> None:
        if bad_lines not in ("raise", "skip"):
            raise ValueError(f'bad_lines is "raise" or "skip", not {bad_lines!r}.')
        self.path = Path(path)
        self.bad_lines = bad_lines

    def __iter__(self) -> Iterator[Any]:
        with _open_bytes(self.path) as file:
            try:
                yield from self.read(file)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise LazyError(f"{self.path.name} is not a whole gzip file.") from error

    def read(self, file: Any) -> Iterator[Any]:
        raise NotImplementedError

    def bad(self, line: int, reason: str, error: Exception | None = None) -> None:
        if self.bad_lines == "raise":
            raise BadLineError(self.path.name, line, reason) from error

    def __repr__(self) -> str:
        return f"{self.kind} {self.path.name}"


class NdjsonFile(_LineFile):
    """One JSON value per line; empty lines are passed over."""

    kind = "NDJSON"
    line = 0  # the one read last

    def read(self, file: Any) -> Iterator[Any]:
        """The values; lines end with a line feed only, as the format says."""
        loads = _DECODER.decode
        for number, line in enumerate(_lines(file), 1):
            self.line = number
            if not line.strip():
                continue
            if len(line) > MAX_LINE_BYTES:
                self.bad(number, f"longer than {MAX_LINE_BYTES:,} bytes.")
                continue
            try:
                value = loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except (ValueError, RecursionError) as error:
                self.bad(number, f"not a JSON value ({_reason(error)}).", error)
                continue
            yield value


def _lines(file: Any) -> Iterator[bytes]:
    """Lines; of one that is too long only the beginning, so that memory stays small."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
        yield line


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start + 1}"
    if isinstance(error, RecursionError):
        return "too deep"
    text = str(error)
    return "a number with too many digits" if "integer string conversion" in text else text[:100]


class CsvFile(_LineFile):
    """Records under a header line, as dicts of texts; a record may span lines within quotes."""

    kind = "CSV"

    def __init__(self, path: str | PathLike[str], bad_lines: str, delimiter: str) -> None:
        super().__init__(path, bad_lines)
        self.delimiter = delimiter

    def read(self, file: Any) -> Iterator[dict[str, str]]:
        """The records; one with too few or too many fields, or not in UTF-8, is a bad line."""
        texts = _Texts(file, self.path.name)
        reader = csv.reader(texts, delimiter=self.delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise BadLineError(self.path.name, 1, f"not a CSV record ({error}).") from error
        self.check_header(header)
        while True:
            started = reader.line_num + 1
            texts.size = 0
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.bad(started, f"not a CSV record ({error}).", error)
                continue
            if not fields:
                continue
            if len(fields) != len(header):
                self.bad(started, f"{len(fields)} fields, where the header names {len(header)}.")
            elif any(_is_undecoded(field) for field in fields):
                self.bad(started, "not UTF-8.")
            else:
                yield dict(zip(header, fields, strict=True))

    def check_header(self, header: list[str]) -> None:
        """Without a right header nothing below it means anything."""
        if len(set(header)) != len(header):
            raise BadLineError(self.path.name, 1, "the header names a field twice.")
        if any(_is_undecoded(name) for name in header):
            raise BadLineError(self.path.name, 1, "not UTF-8.")


def _is_undecoded(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


class _Texts:
    """Lines as text; bytes that are not UTF-8 become lone surrogates, to be found later."""

    def __init__(self, file: Any, name: str) -> None:
        self.lines = enumerate(_lines(file), 1)
        self.name = name
        self.size = 0  # of the record that is being read

    def __iter__(self) -> Iterator[str]:
        for number, line in self.lines:
            self.size += len(line)
            if self.size > MAX_LINE_BYTES:
                raise BadLineError(self.name, number, f"a record of over {MAX_LINE_BYTES:,} bytes.")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")


def _open_bytes(path: Path) -> Any:
    file = path.open("rb", buffering=256 * 1024)
    try:
        packed = file.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
    except OSError:
        file.close()
        raise
    return gzip.open(file, "rb") if packed else file


# --- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole_file(path: str | PathLike[str]) -> Iterator[TextIO]:
    """A file that takes its name when all is written, and is gone when that fails."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as raw:
            packed = target.suffix == ".gz"
            binary = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) if packed else raw
            with io.TextIOWrapper(binary, encoding="utf-8", newline="") as text:
                yield text
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_ndjson(path: str | PathLike[str], elements: Iterable[Any]) -> int:
    """One compact JSON value per line; NaN and what JSON cannot say are errors."""
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                              default=_plain).encode  # fmt: skip
    number = 0
    with _whole_file(path) as file:
        for number, element in enumerate(elements, 1):
            try:
                file.write(f"{encode(element)}\n")
            except (TypeError, ValueError) as error:
                error.add_note(f"in to_ndjson, element {number:,}")
                raise
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form; map it to one first.")


def write_csv(path: str | PathLike[str], elements: Iterable[Any]) -> int:
    """Records under the first one's fields; anything else as rows without a header."""
    number = 0
    header: list[str] | None = None
    with _whole_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, element in enumerate(elements, 1):
            if not isinstance(element, Mapping):
                is_row = isinstance(element, list | tuple)
                writer.writerow(element if is_row else [element])
                continue
            if header is None:
                header = list(element)
                writer.writerow(header)
            if element.keys() != set(header):
                odd = sorted(map(str, set(header) ^ element.keys()))
                raise ValueError(
                    f"to_csv, record {number:,}: fields differ from the first record's: "
                    f"{', '.join(odd[:5])}. Use select() to give all records the same fields."
                )
            writer.writerow([element[name] for name in header])
    return number
