import json

import pytest

from maskx.data.tag_lists import read_tag_list, write_tag_lines


def test_a_tag_list_comes_back(tmp_path):
    path = tmp_path / "new" / "tags.jsonl"
    names = ("dog", 'a "b"', "café")
    assert write_tag_lines(path, [("a/1.jpg", [2, 0]), ('"2".jpg', [1])], names) == 2
    tags = read_tag_list(path)
    assert tags.image_ids == ("a/1.jpg", '"2".jpg')
    assert [[tags.names[t] for t in tags.tags_of(i)] for i in range(2)] == [
        ["café", "dog"],
        ['a "b"'],
    ]
    assert [json.loads(line)["tags"] for line in path.read_text("utf-8").splitlines()] == [
        ["café", "dog"],
        ['a "b"'],
    ]


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted():
        yield "1.jpg", [0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tag_lines(path, interrupted(), ("dog",))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
