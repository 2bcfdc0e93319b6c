import json
import logging

import numpy as np
import pytest

from maskx.data.tag_lists import read_tag_list, read_vocabulary, tag_list

LINES = [
    {"file_name": "a.jpg", "tags": ["dog", "fire_truck"]},
    {"file_name": "b.jpg", "image_id": 7, "tags": ["fire  truck"]},
    {"image_id": 3, "tags": []},
    {"image_id": 4, "tags": ["dog", "cat"]},
]


@pytest.fixture
def lines_file(tmp_path):
    def write(lines):
        path = tmp_path / "tags.jsonl"
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    return write


def named(tags):
    return [[tags.names[i] for i in tags.tags_of(n)] for n in range(len(tags))]


def test_json_lines(lines_file, caplog):
    tags = read_tag_list(lines_file([*LINES[:2], "", *LINES[2:]]))
    assert tags.names == ("cat", "dog", "fire truck")
    assert tags.image_ids == ("a.jpg", "b.jpg", 3, 4)
    assert named(tags) == [["dog", "fire truck"], ["fire truck"], [], ["cat", "dog"]]
    assert (len(tags), tags.num_tagged) == (4, 3)
    np.testing.assert_array_equal(tags.counts(), [1, 2, 2])
    assert tags.indices.dtype == np.int32
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
        "1 of 4 images have no tag."
    ]


def test_the_vocabulary_gives_the_order(lines_file, caplog):
    tags = read_tag_list(lines_file(LINES), vocabulary=["fire_truck", "dog", "sky", "cat"])
    assert tags.names == ("fire truck", "dog", "sky", "cat")
    assert named(tags) == [["fire truck", "dog"], ["fire truck"], [], ["dog", "cat"]]
    np.testing.assert_array_equal(tags.counts(), [2, 2, 0, 1])
    assert "1 of 4 words of the vocabulary are on no image: 'sky'." in caplog.text


def test_rare_tags_are_left_out_and_reported(lines_file, caplog):
    tags = read_tag_list(lines_file(LINES), min_count=2)
    assert tags.names == ("dog", "fire truck")
    assert named(tags) == [["dog", "fire truck"], ["fire truck"], [], ["dog"]]
    assert "1 of 3 tags are on fewer than 2 images and were left out" in caplog.text
    with pytest.raises(ValueError, match=r"none of its 3 tags is on 3 images or more.*is on 2"):
        read_tag_list(lines_file(LINES), min_count=3)


def test_min_count_does_not_go_with_a_vocabulary(lines_file):
    with pytest.raises(ValueError, match=r"min_count is 2\. Allowed.*only without a vocabulary"):
        read_tag_list(lines_file(LINES), vocabulary=["dog"], min_count=2)
    with pytest.raises(ValueError, match="min_count is 0"):
        read_tag_list(lines_file(LINES), min_count=0)


def test_unknown_tags_are_refused_or_left_out(lines_file, caplog):
    path = lines_file(LINES)
    message = r"line 1 has the tag 'dog'.*2 words of the vocabulary\. Closest: 'dogs'\..*skip-bad"
    with pytest.raises(ValueError, match=message):
        read_tag_list(path, vocabulary=["dogs", "fire truck"])
    tags = read_tag_list(path, vocabulary=["fire truck"], strict=False)
    assert named(tags) == [["fire truck"], ["fire truck"], [], []]
    assert "3 unknown tags (2 words) were left out, most often 'dog' 2x, 'cat' 1x." in caplog.text


def test_repeated_tags_are_refused_or_count_once(lines_file, caplog):
    path = lines_file([{"image_id": 1, "tags": ["a_b", "c", "a b"]}, *LINES])
    with pytest.raises(ValueError, match=r"line 1 has tags twice.*: 'a b'\. Give each once"):
        read_tag_list(path)
    tags = read_tag_list(path, strict=False)
    assert named(tags)[0] == ["a b", "c"]
    assert "1 repeated tags (1 words) were left out, most often 'a b' 1x." in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{nothing"], r"not valid JSON.*As a tag list: allowed: JSON lines such as"),
        ([LINES[0], "{nothing"], r"line 2 is not JSON.*Allowed: JSON lines such as"),
        (['{"tags": ["a", }'], "line 1 is not JSON"),
        ([{"tags": ["a"]}], "line 1 lacks file_name or image_id"),
        ([{"image_id": 1, "tags": "a"}], "line 1 lacks.*a list of tags"),
        ([LINES[0], [1]], "line 2 lacks"),
        ([{"image_id": 1, "tags": ["a", 5]}], r"line 1 has the tag 5\. Allowed: words"),
        ([{"image_id": 1, "tags": [["a"]]}], r"line 1 has the tag \['a'\]"),
        ([{"image_id": 1, "tags": [" "]}], r"line 1 has the tag ' '"),
        ([LINES[0], LINES[0]], r"line 2 is the image 'a.jpg' again"),
        ([LINES[2]], "has 1 images, none with a usable tag"),
        ([], "not valid JSON"),
    ],
)
def test_files_that_cannot_be_used_are_refused(lines_file, lines, message):
    with pytest.raises(ValueError, match=message):
        read_tag_list(lines_file(lines))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "tags.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    path.write_text(text, encoding="utf-8-sig")
    assert len(read_tag_list(path)) == 4


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no tag list"):
        read_tag_list(tmp_path / "tags.jsonl")


@pytest.mark.parametrize("indent", [None, 1])
def test_a_coco_file_gives_image_labels_and_annotated_categories(tmp_path, indent):
    image = {"height": 5, "width": 5}
    content = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "image_labels": [9, 4], **image},
            {"id": 2, "file_name": "b.jpg", **image},
        ],
        "categories": [{"id": 4, "name": "fire_truck"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": n, "category_id": 9, "bbox": [0, 0, 1, 1], "iscrowd": 0}
            for i, n in enumerate([1, 2, 2])
        ],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content, indent=indent))
    tags = read_tag_list(path)
    assert tags.image_ids == ("a.jpg", "b.jpg")
    assert named(tags) == [["dog", "fire truck"], ["dog"]]
    with pytest.raises(ValueError, match="image 1 has the tag 'fire truck', which is not among"):
        read_tag_list(path, vocabulary=["dog"])
    content["images"][1]["image_labels"] = [9, 4, 9]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"image 2 has tags twice.*: 'dog'\."):
        read_tag_list(path)
    content["images"][1]["image_labels"] = [5]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"image 2 has image_labels \[5\].*file's 2 categories"):
        read_tag_list(path)


def test_real_annotations_give_tags(shared_data, caplog):
    caplog.set_level(logging.ERROR)
    path = next((shared_data / "coco_mini").rglob("*.json"))
    content = json.loads(path.read_text())
    tags = read_tag_list(path)
    expected = {(a["image_id"], a["category_id"]) for a in content["annotations"]}
    assert tags.counts().sum() == len(expected)
    assert len(tags) == len(content["images"])


def test_tags_that_are_indices_already():
    tags = tag_list([[2, 0, 2], (), {1}], ["a", "b_c", "d"], image_ids=["x", "y", "z"])
    assert named(tags) == [["a", "d"], [], ["b c"]]
    assert tags.image_ids == ("x", "y", "z")
    assert tag_list([[0]], ["a"]).image_ids == (0,)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([[0], [3]], ["a", "b"], r"image 1 has the labels \[3\].*from 0 to 1"),
        ([[-1]], ["a"], "image 0 has the labels"),
        ([[0]], ["a", "b", "a"], r"1 words come twice.*: 'a'\."),
        ([[0]], [], "or there is none"),
    ],
)
def test_indices_that_do_not_fit_are_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        tag_list(labels, names)
    with pytest.raises(ValueError, match="1 images have 2 ids"):
        tag_list([[0]], ["a"], image_ids=[1, 2])


def test_vocabularies_are_text_or_json(tmp_path):
    text, listed = tmp_path / "words.txt", tmp_path / "words.json"
    text.write_text("dog\n\nfire_truck\n")
    listed.write_text('["dog", "fire truck"]')
    assert read_vocabulary(text) == read_vocabulary(listed) == ("dog", "fire truck")
    text.write_text("dog\ncat\ndog\n")
    with pytest.raises(ValueError, match=r"words come twice.*'dog'"):
        read_vocabulary(text)
    text.write_text("\n")
    with pytest.raises(ValueError, match="holds no word"):
        read_vocabulary(text)
    listed.write_text('{"dog": 1}')
    with pytest.raises(ValueError, match="a list of words"):
        read_vocabulary(listed)
    listed.write_text("dog")
    with pytest.raises(ValueError, match=r"is no vocabulary: .*one word per line"):
        read_vocabulary(listed)
    with pytest.raises(FileNotFoundError, match="There is no vocabulary"):
        read_vocabulary(tmp_path / "none.txt")
