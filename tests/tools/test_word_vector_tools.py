import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from maskx.core.word_table import explained_spectrum, load_word_table
from maskx.data.tag_lists import read_tag_list
from maskx.systems.concept_mask.query import read_unseen_words
from maskx.systems.concept_mask.tag_vectors import fold_in_words

TOOLS = Path(__file__).parents[2] / "tools"
TOPICS = (("dog", "cat", "sofa"), ("sea", "boat", "fire_truck"))


@pytest.fixture
def run_tool(monkeypatch):
    def run(name, *arguments):
        path = TOOLS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.fixture
def tags_file(tmp_path):
    path = tmp_path / "tags.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for image in range(60):
            tags = rng.choice(TOPICS[image % 2], 2, replace=False).tolist()
            tags += ["light"] if image % 3 == 0 else []
            file.write(json.dumps({"file_name": f"{image}.jpg", "tags": tags}) + "\n")
    return path


def test_a_table_is_learned_and_looked_at(tags_file, tmp_path, run_tool, capsys):
    table_file, plot = tmp_path / "words.safetensors", tmp_path / "plots" / "spectrum.png"
    run_tool("learn_word_vectors", "--tags", tags_file, "--output", table_file, "--dim", 4)
    assert "7 words, vectors of length 4" in capsys.readouterr().out
    table = load_word_table(table_file)
    assert table.pmi.num_images == 60
    assert (table.pmi.positive, table.pmi.smoothing) == (True, 1.0)

    run_tool("inspect_word_vectors", table_file, "--words", "dog", "fire truck", "--count", 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7 words, vectors of length 4, from: PPMI of the tags of 60 images")
    rows = [line.split() for line in lines[3:6]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert float(rows[0][1]) == pytest.approx(table.eigenvalues[0], rel=1e-3)
    _, shares = explained_spectrum(table)
    shown = [float(row[2].rstrip("%")) for row in rows]
    assert shown == pytest.approx(100 * shares[[0, 1, 3]], abs=0.051)
    neighbours = dict(
        line.split(": ") for line in lines if line.startswith(("dog:", "fire truck:"))
    )
    assert {word.split()[0] for word in neighbours["dog"].split(", ")} == {"cat", "sofa"}
    assert {word.split()[0] for word in neighbours["fire truck"].split(", ")} == {"sea", "boat"}

    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    run_tool("inspect_word_vectors", table_file, "--plot", plot)
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_options_reach_the_matrix(tags_file, tmp_path, run_tool):
    table_file, words = tmp_path / "words.safetensors", tmp_path / "words.txt"
    words.write_text("sofa\ndog\nsea\nboat\n")
    common = ("--tags", tags_file, "--vocabulary", words, "--output", table_file)
    with pytest.raises(SystemExit, match=r"^error: .*has the tag '.*', which is not among the 4"):
        run_tool("learn_word_vectors", *common)
    run_tool("learn_word_vectors", *common, "--skip-bad", "--plain-pmi", "--smoothing", 0)
    table = load_word_table(table_file)
    assert table.names == ("sofa", "dog", "sea", "boat")
    assert (table.pmi.positive, table.pmi.smoothing) == (False, 0.0)


def test_published_vectors_become_a_table(tags_file, tmp_path, run_tool, capsys):
    vectors, words = tmp_path / "glove.txt", tmp_path / "words.json"
    vectors.write_text("dog 1 2\ncat 2 1\nfire 0 1\ntruck 0 3\n")
    words.write_text('["fire truck", "dog"]')
    output = tmp_path / "words.safetensors"
    common = ("--vectors", vectors, "--vocabulary", words, "--output", output)
    run_tool("learn_word_vectors", *common)
    table = load_word_table(output)
    np.testing.assert_array_equal(table.vectors, [[0, 2], [1, 2]])
    np.testing.assert_array_equal(table.idf, [1, 1])
    run_tool("learn_word_vectors", *common, "--tags", tags_file, "--skip-bad")
    assert (load_word_table(output).idf != 1).all()
    capsys.readouterr()
    run_tool("inspect_word_vectors", output, "--words", "dog")
    assert "dog: fire truck 0.894" in capsys.readouterr().out


def test_new_words_are_folded_in(tags_file, tmp_path, run_tool, capsys):
    table_file, more = tmp_path / "words.safetensors", tmp_path / "more.jsonl"
    run_tool("learn_word_vectors", "--tags", tags_file, "--output", table_file, "--dim", 4)
    rows = [
        ["puppy", "dog", "cat"],
        ["puppy", "dog"],
        ["sea", "boat"],
        ["sea"],
        ["tug boat", "sea"],
    ]
    lines = [json.dumps({"image_id": n, "tags": row}) + "\n" for n, row in enumerate(rows)]
    more.write_text("".join(lines))
    file = tmp_path / "new" / "new.safetensors"
    common = ("--table", table_file, "--tags", more, "--output", file)
    run_tool("learn_word_vectors", *common, "--fold-in", "puppy", "tug_boat")
    table = load_word_table(table_file)
    found = read_unseen_words(file, table)
    expected = fold_in_words(table, read_tag_list(more), ["puppy", "tug boat"]).table
    assert found.hash == expected.hash
    assert table.names[table.nearest(found.vectors[0])[0][0]] in ("dog", "cat", "sofa")
    with pytest.raises(SystemExit, match=r"^error: .*'kitten': .* has no image with it"):
        run_tool("learn_word_vectors", *common, "--fold-in", "kitten")
    capsys.readouterr()
    run_tool("learn_word_vectors", *common, "--fold-in", "kitten", "puppy", "dog")
    printed = capsys.readouterr().out
    assert "Without a vector: 'kitten'" in printed
    assert "'dog': the word table has it already" in printed
    assert load_word_table(file).names == ("puppy",)


def test_a_broken_off_fold_in_leaves_the_words_and_vectors_of_before(
    tags_file, tmp_path, run_tool, monkeypatch
):
    """Words and vectors are one file, so that no reader can meet those of two writings."""
    table_file, file = tmp_path / "words.safetensors", tmp_path / "new" / "new.safetensors"
    run_tool("learn_word_vectors", "--tags", tags_file, "--output", table_file, "--dim", 4)
    more = tmp_path / "more.jsonl"
    rows = [["puppy", "dog"], ["tug boat", "sea"], ["dog", "cat"], ["sea"]]
    lines = [json.dumps({"image_id": n, "tags": row}) for n, row in enumerate(rows)]
    more.write_text("\n".join(lines))
    common = ("--table", table_file, "--tags", more, "--output", file, "--fold-in")
    run_tool("learn_word_vectors", *common, "puppy")
    before = load_word_table(file).hash
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(SystemExit, match=r"^interrupted"):
        run_tool("learn_word_vectors", *common, "tug boat")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert load_word_table(file).hash == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --tags, or --vectors"),
        (["--tags", "x", "--output", "."], "--output is a folder"),
        (["--vectors", "v.txt"], "--vectors needs --vocabulary"),
        (["--vectors", "v.txt", "--vocabulary", "v", "--dim", "8"], "from tags only"),
        (["--table", "t", "--fold-in", "a", "--tags", "x", "--plain-pmi"], "from tags only"),
        (["--table", "t"], "--table and --fold-in belong together"),
        (["--table", "t", "--fold-in", "a", "--vocabulary", "v"], "do not go with it"),
        (["--tags", "x", "--output", "words.npy"], "end it with .safetensors"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, run_tool, capsys):
    with pytest.raises(SystemExit):
        run_tool("learn_word_vectors", "--output", "out", *arguments)
    assert message in capsys.readouterr().err


def test_user_errors_end_with_their_message(tmp_path, tags_file, run_tool):
    table_file = tmp_path / "words.safetensors"
    with pytest.raises(SystemExit, match=r"^error: There is no word table"):
        run_tool("inspect_word_vectors", table_file)
    with pytest.raises(SystemExit, match=r"^error: There is no tag list"):
        run_tool("learn_word_vectors", "--tags", tmp_path / "none", "--output", table_file)
    run_tool("learn_word_vectors", "--tags", tags_file, "--output", table_file)
    with pytest.raises(SystemExit, match=r"^error: 'dogs' is not among.*Closest: 'dog'"):
        run_tool("inspect_word_vectors", table_file, "--words", "dogs")
    with pytest.raises(SystemExit, match=r"^error: 0 neighbours were asked for"):
        run_tool("inspect_word_vectors", table_file, "--words", "dog", "--count", 0)


def test_the_benchmark_writes_what_it_measured(tmp_path, run_tool, capsys):
    sizes = {"--images": 200, "--words": 60, "--tags": 5, "--topics": 4, "--dim": 8}
    options = [str(value) for pair in sizes.items() for value in pair]
    run_tool("benchmark", "word_vectors", *options, "--json", tmp_path / "cost.json")
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["settings"]["num_words"] == 60
    assert found["learn_seconds"] > 0
    assert "learning" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: 9 words are too few"):
        run_tool("benchmark", "word_vectors", "--words", "9")
