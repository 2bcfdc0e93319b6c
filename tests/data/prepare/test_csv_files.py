import pytest

from maskx.data.prepare.open_images import csv_rows


def test_columns_are_found_by_name_in_the_order_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,name,x\r\n1,"a, ""b""",5\r\n\r\n2,c,6,7\r\n')
    assert list(csv_rows(path, ("x", "name"))) == [(2, ("5", 'a, "b"')), (4, ("6", "c"))]
    assert next(iter(csv_rows(path))) == (1, ["id", "name", "x"])


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        list(csv_rows(path))
    path.write_text("id,name\n1,a\n2\n")
    with pytest.raises(ValueError, match=r"a.csv lacks the column z; its first line is 'id,name'"):
        list(csv_rows(path, ("id", "z")))
    with pytest.raises(ValueError, match="line 3 has fewer fields than its header"):
        list(csv_rows(path, ("id", "name")))
    path.write_bytes(b"id,name\n1,\xff\n")
    with pytest.raises(ValueError, match="is no CSV text"):
        list(csv_rows(path, ("id", "name")))
    path.write_text("")
    with pytest.raises(ValueError, match="lacks the column id, name"):
        list(csv_rows(path, ("id", "name")))
