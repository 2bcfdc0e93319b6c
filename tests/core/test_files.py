import json
import os

import pytest

from maskx.core.files import write_json


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"AP": 1.5})
    assert json.loads(path.read_text()) == {"AP": 1.5}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"AP": 2.5})
    assert json.loads(path.read_text()) == {"AP": 1.5}


def test_large_files_can_do_without_white_space(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"AP": [1, 2]}, compact=True)
    assert path.read_text() == '{"AP":[1,2]}\n'
    write_json(path, {"AP": [1]})
    assert path.read_text() == '{\n "AP": [\n  1\n ]\n}\n'


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"AP": float("nan")})
    assert not list(tmp_path.iterdir())
