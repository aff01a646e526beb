"""Files that somebody changed: ValueError, never anything else."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import FOUND, LARGE, READERS, seed

INSTEAD = [b"", b"\0", b"\xff", b"{", b"[", b'"', b"null", b"-1", b"1e999", b"NaN", b"2" * 400, b"\xed\xa0\x80", b"\n"]
piece = st.binary(max_size=6) | st.sampled_from(INSTEAD)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), piece), min_size=1, max_size=6)


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(name):
    if name == "manifest":
        with pytest.raises(ValueError, match=r"(config|model|optimizer|state|tokenizer)\.\w+: missing"):
            READERS[name](seed(name))
    else:
        READERS[name](seed(name))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=150)
@given(edits=edits)
def test_a_changed_file_is_read_or_refused(name, edits):
    data = seed(name)
    for place, removed, instead in edits:
        at = round(place * len(data))
        data = data[:at] + instead + data[at + removed :]
    with contextlib.suppress(ValueError):
        READERS[name](data)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50)
@given(data=st.binary(max_size=300))
def test_anything_is_read_or_refused(name, data):
    with contextlib.suppress(ValueError):
        READERS[name](data)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("place", range(len(LARGE)))
def test_large_ones_are_read_or_refused(name, place):
    with contextlib.suppress(ValueError):
        READERS[name](LARGE[place])


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in FOUND.items() for data in found])
def test_what_was_found(name, data):
    with contextlib.suppress(ValueError):
        READERS[name](data)


def test_control_a_reader_that_breaks_is_noticed():
    with pytest.raises(IndexError):
        test_anything_is_read_or_refused.hypothesis.inner_test("broken", b"")


@pytest.fixture(autouse=True)
def broken(monkeypatch):
    monkeypatch.setitem(READERS, "broken", lambda data: data[0])
