"""Large JSON objects, read through a window: the same values and the same faults as json.loads finds."""
from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import json_stream
from pipelines.json_stream import JsonObject, NotAnObject

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner:
    st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@pytest.fixture(autouse=True, params=[1, 7, 2**20])
def window(request, monkeypatch):
    """Of a single byte, of a few, and as large as it is."""
    monkeypatch.setattr(json_stream, "CHUNK", request.param)


def read(data: bytes | io.BytesIO):
    content = JsonObject(io.BytesIO(data) if isinstance(data, bytes) else data)
    found = {key: list(value) if isinstance(value, Iterator) else value for key, value in content.members()}
    if isinstance(data, bytes):
        assert content.sha256 == hashlib.sha256(data).hexdigest()
    return found


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.sampled_from([None, 1]), st.booleans())
def test_what_json_loads_reads_is_read_alike(value, indent, ascii):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    data = text.encode("utf-8", "surrogatepass")
    assert read(b" \n" + data + b"\r\n") == value == json.loads(data)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=3), st.data())
def test_damage_is_found_where_json_loads_finds_it(value, data):
    text = list(json.dumps(value, indent=1))
    place = data.draw(st.integers(1, len(text) - 1))
    damage = data.draw(st.sampled_from(["", "]", "}", ",", '"', "x", "\\", ":"]))
    text[place : place + data.draw(st.integers(0, 1))] = damage
    text = "".join(text)
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(json.JSONDecodeError) as found:
            read(text.encode())
        assert abs(found.value.lineno - error.lineno) <= 1  # between two lines either is named
    else:
        assert read(text.encode()) == expected


@pytest.mark.parametrize("value", [[], [1, {"a": []}], "text", 12, None, True])
def test_what_is_no_object_says_what_it_is(value):
    with pytest.raises(NotAnObject) as error:
        read(json.dumps(value).encode())
    assert type(error.value.value) is type(value)


def test_nan_numbers_in_parts_and_other_encodings_are_read():
    found = read(b'{"a": [NaN, -Infinity, 1234567890123456789012, 1.5e-300], "b": 12345.678}')
    assert str(found["a"][:2]) == "[nan, -inf]" and found["a"][2:] == [1234567890123456789012, 1.5e-300]
    assert found["b"] == 12345.678
    for encoding in ("utf-8-sig", "utf-16", "utf-32-le"):
        assert read('{"ü": ["日本"]}'.encode(encoding)) == {"ü": ["日本"]}


def test_a_list_may_be_left_before_its_end():
    content = JsonObject(io.BytesIO(b'{"a": [1, 2, 3], "b": [4], "c": 5}'))
    seen = []
    for key, value in content.members():
        seen.append((key, next(value) if isinstance(value, Iterator) else value))
    assert seen == [("a", 1), ("b", 4), ("c", 5)]


def test_a_fault_is_told_without_reading_on_and_however_much_follows(monkeypatch):
    monkeypatch.setattr(json_stream, "LARGEST", 1000)
    file = io.BytesIO(b'{"a": [{"id": 1 "x": 2}, ' + b"1, " * 2**21 + b"1]}")
    with pytest.raises(json.JSONDecodeError, match="Expecting ',' delimiter") as error:
        read(file)
    assert (error.value.lineno, error.value.colno) == (1, 17)
    assert file.tell() <= 2 * json_stream.CHUNK + 100


def test_an_item_beyond_all_measure_is_refused_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(json_stream, "LARGEST", 1000)
    with pytest.raises(json.JSONDecodeError):
        read(b'{"a": ["' + b"x" * 3_000_000 + b'"]}')
