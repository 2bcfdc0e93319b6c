import pytest
from benchmarks.mutants import FORMATS, find_bad

PER_FORMAT = 200 // len(FORMATS) + 1


@pytest.mark.parametrize("name", FORMATS)
def test_broken_files_are_read_or_refused_by_name(name):
    assert find_bad(name, range(PER_FORMAT)) == []


def test_bytes_that_are_no_text_in_a_mask_are_named():
    assert find_bad("coco", (1425, 5502)) == []


def test_what_is_lost_or_raised_is_found(monkeypatch):
    form = FORMATS["tags"]
    monkeypatch.setitem(FORMATS, "tags", form._replace(read=lambda path: {}["key"]))
    assert "KeyError at " in find_bad("tags", range(1))[0].what
    monkeypatch.setitem(FORMATS, "tags", form._replace(read=lambda path: int("x")))
    assert "does not name the file" in find_bad("tags", range(1))[0].what
