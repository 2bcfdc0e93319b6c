import json
import runpy
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def test_the_tool_measures_steps_with_and_without_kept_features(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ("--backbone", "resnet10t", "--image-size", "64", "--images", "1", "--repeats", "1")
    options = ("features", "--json", str(path), *words, "--device", "cpu")
    monkeypatch.setattr(sys, "argv", [str(TOOL), *options])
    runpy.run_path(str(TOOL), run_name="__main__")
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ways = ["backbone trained", "backbone frozen", "features kept in memory"]
    ways.append("features kept in files")
    assert [row["name"] for row in rows] == 2 * ways
    assert rows[0]["parameters"] > rows[1]["parameters"] == rows[2]["parameters"]
    assert "classifier, resnet10t, training step of 1 images of 64 pixels" in printed
