import json
import subprocess
import sys
from pathlib import Path

import pytest

from maskx.data.coco import load_coco
from maskx.data.scenes.concepts import generate_concept_scenes
from maskx.systems.concept_mask.concept_sets import (
    concept_sets,
    scene_concept_split,
    write_concept_split,
)
from maskx.systems.concept_mask.overlap import concept_overlap, load_overlap

TOOL = Path(__file__).parents[2] / "tools" / "concept_overlap.py"
SPLIT = scene_concept_split()


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def files(tmp_path):
    json_files = [
        generate_concept_scenes(tmp_path / str(seed), count=20, size=64, seed=seed)
        for seed in (0, 1)
    ]
    write_concept_split(tmp_path / "split.json", SPLIT)
    return json_files, tmp_path / "split.json"


def test_the_command_adds_up_all_files_in_one_pass(files, tmp_path):
    json_files, split_file = files
    output = tmp_path / "overlap.npz"
    finished = run_tool("--json", *json_files, "--split", split_file, "--output", output)
    assert finished.returncode == 0, finished.stderr
    records = [
        record
        for file in json_files
        for record in concept_sets(SPLIT, boxes=load_coco(file, file.parent)).boxed
    ]
    expected = concept_overlap(records, len(SPLIT.vocabulary))
    overlap = load_overlap(output, SPLIT.vocabulary)
    assert overlap.rows.tolist() == expected.rows.tolist()
    assert overlap.columns.tolist() == expected.columns.tolist()
    assert overlap.intersection.tolist() == expected.intersection.tolist()
    assert f"overlap.npz: {len(expected.rows)} ordered pairs of concepts" in finished.stdout
    assert "1.00 of '" in finished.stdout
    assert "boxes of concepts that are not to have any" in finished.stderr
    assert f"overlap: {len(records)}it" in finished.stderr


def test_mistakes_end_with_their_message(files, tmp_path):
    json_files, split_file = files
    lists = json.loads(split_file.read_text())
    split_file.write_text(json.dumps({**lists, "vocabulary": lists["vocabulary"][:-1]}))
    output = tmp_path / "overlap.npz"
    finished = run_tool("--json", json_files[0], "--split", split_file, "--output", output)
    assert finished.returncode == 1
    assert "error: " in finished.stderr
    assert "is labelled with 'sand', which is not among the 65 concepts" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not output.exists()
    finished = run_tool("--json", json_files[0], "--split", split_file, "--output", tmp_path)
    assert "--output is a folder" in finished.stderr
