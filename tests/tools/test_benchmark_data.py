import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.data import (
    annotation_file,
    average_precision_cases,
    mean_iou_cases,
    reading_cases,
)

from maskx.data.coco import load_coco

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def test_the_made_file_has_nothing_bad(tmp_path):
    content = annotation_file(20)
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = load_coco(tmp_path / "a.json", tmp_path, check_images=False)
    assert sum(len(record["annotations"]) for record in data.records) == 140
    other, ours = reading_cases(20)
    assert ours.step() == 20
    assert other.step() is None
    assert ours.num_bytes == pytest.approx(len(json.dumps(annotation_file(20))))


def test_both_evaluations_give_the_same_precision():
    pytest.importorskip("hotcoco", reason="the extra `fast` is not installed")
    other, ours = average_precision_cases(8)
    precision = other.step()
    expected = 100 * precision[:, :, :, 0, -1][precision[:, :, :, 0, -1] > -1].mean()
    assert ours.step()["segm"]["all"]["AP"] == pytest.approx(expected)
    assert expected > 20


@pytest.mark.parametrize("num_classes", [20, 300])
def test_confusion_matrices_and_ours_count_alike(num_classes):
    *tables, ours = (case.step() for case in mean_iou_cases(num_classes))
    for table in map(np.asarray, tables):
        assert np.array_equal(table.diagonal(), ours.intersections)
        assert np.array_equal(table.sum(axis=1), ours.predicted)
        assert np.array_equal(table.sum(axis=0), ours.true)


def test_without_a_table_only_ours_is_left():
    assert [case.name for case in mean_iou_cases(21841)] == ["MeanIoU"]


def test_the_tool_compares_with_the_last_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "rows.json"
    arguments = ["data", "--section", "mean_iou", "--classes", "20", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments, "--json", str(path)])
    for run in range(2):
        runpy.run_path(str(TOOL), run_name="__main__")
        printed = capsys.readouterr().out
        assert "GB/s copied" in printed
        assert ("since the last stored run" in printed) == (run == 1)
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]][-1] == "MeanIoU"
    for row in written["rows"]:
        assert row["over_floor"] == row["seconds"] / row["floor_seconds"]
        assert row["peak_bytes"] > 0
    assert written["rates"]["bytes_per_second"] > 0
