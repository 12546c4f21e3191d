"""The members of a large JSON object one after another, in the memory of one item.

Python's own decoder reads every item, from a window that moves through the file: it takes NaN and Infinity, which
annotation files made by Python hold, and which the streaming parsers (ijson's) refuse.
"""
from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from json.decoder import JSONDecodeError
from typing import Any, BinaryIO

CHUNK = 2**20  # bytes
LARGEST = 2**26  # characters of an item
LONGEST = 16  # characters of what cannot be told when cut: -Infinity, an escaped pair
_SPACE = re.compile(r"[ \t\n\r]*")


class NotAnObject(ValueError):
    """JSON of another kind; value is one of that kind."""

    def __init__(self, value: Any):
        super().__init__("not a JSON object")
        self.value = value


class JsonObject:
    """A JSON object in a binary file.

    After `members` came to its end, `sha256` is the hex digest of the file's bytes. Raises JSONDecodeError, with line
    and column in the file, for what is not JSON that can be read.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._hash = file, hashlib.sha256()
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # of the window's first character; columns from 0
        self._decoder = json.JSONDecoder()
        start = file.read(max(4, CHUNK))
        # as json.loads does, but for a byte order mark, which it refuses in UTF-8
        encoding = json.detect_encoding(start)
        self._decode = codecs.getincrementaldecoder(encoding)("surrogatepass" if encoding != "utf-8-sig" else "strict")
        self._add(start)
        self.empty = self._ended or not self._peek()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def members(self) -> Iterator[tuple[str, Any]]:
        """(key, value) of every member; the value of a list is an iterator over its items, to be used before the next
        member is asked for (what is left of it is passed over). Raises NotAnObject."""
        if self._peek() != "{":
            raise NotAnObject([] if self._peek() == "[" else self._value())
        self._at += 1
        if self._peek() == "}":
            self._at += 1
        else:
            while True:
                if self._peek() != '"':
                    self._fail("Expecting property name enclosed in double quotes")
                key = self._value()
                if self._peek() != ":":
                    self._fail("Expecting ':' delimiter")
                self._at += 1
                if self._peek() == "[":
                    items = self._items()
                    yield key, items
                    for _ in items:
                        pass
                else:
                    yield key, self._value()
                if not self._another("}"):
                    break
        if self._peek():
            self._fail("Extra data")

    def _items(self) -> Iterator[Any]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            self._peek()
            yield self._value()
            if not self._another("]"):
                return

    def _another(self, closing: str) -> bool:
        """Whether a comma follows, or the end; both are passed."""
        found = self._peek()
        if found not in (",", closing) or not found:
            self._fail("Expecting ',' delimiter")
        self._at += 1
        return found == ","

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if len(self._text) - end >= 3 or self._ended:  # else a number may go on: 12|34, 12.|34, 12e+|34
                    self._at = end
                    return value
            except JSONDecodeError as error:
                final = error.pos < len(self._text) - LONGEST and not error.msg.startswith("Unterminated")
                if final:  # more of the file would change nothing
                    self._fail(error.msg, error.pos)
                if len(self._text) - self._at > LARGEST and not self._ended:
                    self._fail(f"An item of more than {LARGEST // 2**20} Mi characters", error.pos)
                if self._ended:
                    self._fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; too deep
                self._fail(str(error).partition(";")[0])
            self._more()

    def _peek(self) -> str:
        """The next character that is no space, or nothing at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def _more(self) -> None:
        """Move the window: what was read goes, as much again as is left (and no less than a chunk) comes."""
        gone = self._text[: self._at]
        lines = gone.count("\n")
        self._line += lines
        self._column = len(gone) - gone.rfind("\n") - 1 if lines else self._column + len(gone)
        self._text, self._at = self._text[self._at :], 0
        self._add(self._file.read(max(CHUNK, len(self._text))))

    def _add(self, data: bytes) -> None:
        self._hash.update(data)
        self._ended = not data
        try:
            self._text += self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            self._fail(f"Not {error.encoding.upper()} ({error.reason})", len(self._text))

    def _fail(self, message: str, position: int | None = None) -> None:
        position = self._at if position is None else position
        error = JSONDecodeError(message, self._text, position)
        error.colno += self._column if error.lineno == 1 else 0
        error.lineno += self._line - 1
        raise error
