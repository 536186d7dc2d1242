"""Request traces: files that hold each request's prompt and answer length, in the formats that are published.

A file is CSV, JSON lines or a JSON list, plain or gzipped. Container and format are found out from its content, not
from its name; `--trace_format` names the format.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from paged_dist._errors import bad_value, require
from paged_dist.launch.serving.workload import MOST_TOKENS, Request


class TraceFormat(NamedTuple):
    """A published format of traces.

    Attributes:
      columns: the names of prompt and answer length in a CSV's header or a JSON object; None where there is only text.
      what: whose it is, and in what container.
    """

    columns: tuple[str, str] | None
    what: str


FORMATS = {
    "azure": TraceFormat(("ContextTokens", "GeneratedTokens"), "Azure's LLM inference traces of 2023 and 2024, CSV"),
    "burstgpt": TraceFormat(("Request tokens", "Response tokens"), "BurstGPT, CSV"),
    "mooncake": TraceFormat(("input_length", "output_length"), "Mooncake, JSON lines"),
    "sharegpt": TraceFormat(None, "ShareGPT, JSON list of conversations"),
}
BYTES_A_TOKEN = 4  # of UTF-8: about what byte-pair encodings make of English text

_ANSWERS = frozenset(("gpt", "assistant", "chatgpt", "model", "bing", "bard"))  # who speaks in a ShareGPT conversation
_GZIP = b"\x1f\x8b"


class Trace(NamedTuple):
    """The requests of a trace, in the file's order.

    Attributes:
      requests: with ids 0, 1, ...
      format: one of FORMATS.
      skipped: rows before the last request that were left out, for they have no prompt or no answer.
      file: the file's name.
    """

    requests: list[Request]
    format: str
    skipped: int
    file: str

    @property
    def name(self) -> str:
        """What a report calls it: its file, and what a reader of the numbers must know of the counts."""
        estimated = f", token counts estimated, {BYTES_A_TOKEN} bytes of text each"
        said = f"{self.file} ({self.format}{'' if FORMATS[self.format].columns else estimated})"
        if self.skipped:
            said += f", {self.skipped} without prompt or answer left out"
        return said


class _TracePlace(NamedTuple):
    """A file and a place in it ('line 3', 'item 0'), for errors."""

    flag: str
    path: str
    place: str

    def error(self, rule: str, works: str | None = None) -> ValueError:
        return bad_value(self.flag, self.path, f"{self.place} {rule}", works)


def read_trace(path: str | Path, limit: int | None = None, format: str | None = None, flag: str = "--trace") -> Trace:
    """The first `limit` requests of a trace that have a prompt and an answer; None takes all.

    Args:
      format: one of FORMATS; None finds it out from the columns.
      flag: what gave the path, for errors.

    Lengths are whole numbers of tokens, `10.0` among them. A row of 0 prompt or 0 generated tokens (BurstGPT's failed
    requests) is counted and left out. Other columns, arrival times among them, are ignored; so are a byte order mark
    and lines before the header that start with `#`.

    ShareGPT has no lengths. Its tokens are estimated, one for every BYTES_A_TOKEN bytes of text in UTF-8, rounded up.
    A conversation is one request: its first answer, with all text before that as the prompt.

    Raises:
      ValueError: the file cannot be read, is in none of the formats, holds no request, or has a row without two whole
        numbers; names the file, the line (JSON list: the item, counted from 0) and the column.
    """
    require(format is None or format in FORMATS, "--trace_format", format, f"must be one of {', '.join(FORMATS)}")
    requests: list[Request] = []
    skipped = 0
    try:
        with open(path, "rb") as file:
            zipped = file.peek(2)[:2] == _GZIP
            plain = gzip.GzipFile(fileobj=file) if zipped else file
            with io.TextIOWrapper(plain, encoding="utf-8-sig", newline="") as text:
                found, rows = _rows(text, str(path), format, flag)
                for context, generated in rows:
                    if not (context and generated):
                        skipped += 1
                        continue
                    requests.append(Request(len(requests), context, generated))
                    if len(requests) == limit:
                        break
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise bad_value(flag, str(path), f"is a broken gzip file: {e}") from e
    except UnicodeDecodeError as e:
        raise bad_value(flag, str(path), f"is no text file: {e}", _known()) from e
    except OSError as e:
        raise bad_value(flag, str(path), f"cannot be read: {e.strerror or e}", _known()) from e
    if not requests:
        left_out = f" but {skipped} without prompt or answer" if skipped else ""
        raise bad_value(flag, str(path), f"holds no request{left_out}", _known())
    return Trace(requests, found, skipped, Path(path).name)


def _known() -> str:
    """The formats that can be read, for errors."""
    columns = lambda one: f" ({', '.join(one.columns)})" if one.columns else ""
    return "a trace is one of " + "; ".join(f"{name}: {one.what}{columns(one)}" for name, one in FORMATS.items())


def _rows(text: io.TextIOBase, path: str, format: str | None, flag: str) -> tuple[str, Iterator[tuple[int, int]]]:
    """The format, and an iterator of (prompt tokens, generated tokens), row by row."""
    comments = []
    for first in text:
        if first.strip() and not first.startswith("#"):
            break
        comments.append(first)
    else:
        first = ""
    lines = itertools.chain([first], text)
    start = first.lstrip()[:1]
    if start == "[":
        objects = _objects_of_a_list(lines, path, flag, len(comments))
    elif start == "{":
        objects = _objects_of_lines(lines, path, flag, len(comments))
    else:
        return _csv_rows(lines, path, format, flag, len(comments))
    if format is None:
        where, one = head = next(objects, (None, {}))
        if where is None or isinstance(one.get("conversations"), list):
            format = "sharegpt"  # or an empty list, of nothing
        else:
            format = _format_of(list(one), where)
        objects = itertools.chain([] if where is None else [head], objects)
    return format, _object_rows(objects, format)


def _format_of(names: list[str], where: _TracePlace) -> str:
    """The format whose two columns are among `names`."""
    found = [name for name, one in FORMATS.items() if one.columns and set(one.columns) <= set(names)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(names)[:80]
    if found:
        raise where.error(
            f"has the columns of {' and '.join(found)}: {shown!r}", f"give --trace_format={found[0]}, say"
        )
    half = [(a, b) for one in FORMATS.values() for a, b in itertools.permutations(one.columns or (), 2) if a in names]
    missing = f"no column {half[0][1]}, only {half[0][0]}" if half else "no columns of a known trace"
    raise where.error(f"has {missing}: {shown!r}", _known())


# CSV


def _csv_rows(lines, path: str, format: str | None, flag: str, before: int):
    """As `_rows`, of a CSV: its header is the first of `lines`, `before` which the file has that many other lines."""
    reader = csv.reader(lines, strict=True)
    here = lambda: _TracePlace(flag, path, f"line {before + max(reader.line_num, 1)}")
    require(
        format is None or FORMATS[format].columns is not None,
        "--trace_format",
        format,
        f"{path} is no JSON list: it starts with neither [ nor {{",
        _known(),
    )

    def next_row():
        try:
            return next(reader, None)
        except csv.Error as e:
            raise here().error(f"is no CSV: {e}", _known()) from e

    header = [name.strip() for name in next_row() or ()]
    format = format or _format_of(header, here())
    names = FORMATS[format].columns
    assert names is not None  # refused above, and `_format_of` finds formats with columns
    for name in names:
        if header.count(name) != 1:
            how = f"names column {name} twice" if name in header else f"has no column {name}"
            raise here().error(
                f"{how}: {', '.join(header)[:80]!r}", "each stands there once" if name in header else None
            )

    def rows():
        context, generated = map(header.index, names)
        while (row := next_row()) is not None:
            if not row:
                continue  # a blank line
            if len(row) != len(header):
                raise here().error(f"has {len(row)} fields, the header {len(header)}: {','.join(row)[:80]!r}")
            yield _tokens(row[context], names[0], here), _tokens(row[generated], names[1], here)

    return format, rows()


# JSON


def _objects_of_lines(lines, path: str, flag: str, before: int) -> Iterator[tuple[_TracePlace, dict]]:
    for number, line in enumerate(lines, before + 1):
        where = _TracePlace(flag, path, f"line {number}")
        if line.strip():
            yield where, _as_object(_parsed(line.rstrip(), where), where)


def _objects_of_a_list(lines, path: str, flag: str, before: int) -> Iterator[tuple[_TracePlace, dict]]:
    for i, one in enumerate(_parsed("".join(lines), _TracePlace(flag, path, "an item"), before)):
        where = _TracePlace(flag, path, f"item {i}")
        yield where, _as_object(one, where)


def _parsed(text: str, where: _TracePlace, before: int | None = None):
    """The JSON value of `text`, a line of the file; or of a whole file, after `before` other lines."""

    def unique(pairs):
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise where.error(f"names {next(name for name in names if names.count(name) > 1)} twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as e:
        place = where.place if before is None else f"line {before + e.lineno}"
        raise where._replace(place=place).error(f"column {e.colno} is no JSON: {e.msg}", _known()) from e
    except RecursionError as e:
        raise where.error("is nested too deep", _known()) from e


def _as_object(one, where: _TracePlace) -> dict:
    if not isinstance(one, dict):
        raise where.error(f"is no JSON object: {json.dumps(one)[:80]}", _known())
    return one


def _object_rows(objects: Iterator[tuple[_TracePlace, dict]], format: str) -> Iterator[tuple[int, int]]:
    names = FORMATS[format].columns
    for where, one in objects:
        if names is None:
            yield _conversation(one, where)
            continue
        for name in names:
            if name not in one:
                raise where.error(f"has no column {name}: {', '.join(one)[:80]!r}")
        here = lambda where=where: where
        yield _tokens(one[names[0]], names[0], here), _tokens(one[names[1]], names[1], here)


def _conversation(one: dict, where: _TracePlace) -> tuple[int, int]:
    """Estimated tokens of all text before a conversation's first answer, and of that answer (0: there is none)."""
    turns = one.get("conversations")
    if not isinstance(turns, list):
        raise where.error(f"has no list of conversations: {', '.join(one)[:80]!r}", _known())
    size = 0  # bytes before the answer
    for i, turn in enumerate(turns):
        said = turn if isinstance(turn, dict) else {}
        who, text = said.get("from"), said.get("value")
        if not (isinstance(who, str) and isinstance(text, str)):
            raise where.error(
                f"has conversations[{i}] {json.dumps(turn)[:80]}", "a turn has the strings from and value"
            )
        count = len(text.encode(errors="surrogatepass"))
        if size and who.strip().lower() in _ANSWERS:
            return math.ceil(size / BYTES_A_TOKEN), math.ceil(count / BYTES_A_TOKEN)
        size += count
    return math.ceil(size / BYTES_A_TOKEN), 0


def _tokens(value, column: str, where: Callable[[], _TracePlace]) -> int:
    """The whole number of tokens in a CSV's field or a JSON value."""
    if isinstance(value, str) and len(value) < 10 and value.isascii() and value.isdecimal():
        return int(value)  # nearly all there are
    tokens = None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        text = str(value).strip()
        with contextlib.suppress(ValueError):  # what float takes but underscores and other scripts' digits
            tokens = float(text) if text.isascii() and "_" not in text else None
    if tokens is None or not 0 <= tokens <= MOST_TOKENS or tokens != int(tokens):
        raise where().error(f"has {column} {value!r}", f"it must be a whole number of tokens, 0 to {MOST_TOKENS}")
    return int(tokens)
