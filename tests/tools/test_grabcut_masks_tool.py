import json
import subprocess
import sys
from pathlib import Path

from maskx.data.scenes.generator import generate_scenes

TOOL = Path(__file__).parents[2] / "tools" / "grabcut_masks.py"


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_a_file_and_refuses_to_overwrite_it(tmp_path):
    json_file = generate_scenes(tmp_path, count=2, size=64, num_categories=4, seed=0)
    arguments = ("--json", json_file, "--images", tmp_path, "--output", tmp_path / "out.json")
    arguments = (*arguments, "--workers", 1, "--split", "scenes_half")
    finished = run_tool(*arguments)
    assert finished.returncode == 0, finished.stderr
    info = json.loads((tmp_path / "out.json").read_text())["info"]["grabcut"]
    assert info["split"] == "scenes_half"
    assert f"out.json: {info['num_masks']} masks by GrabCut, of which " in finished.stdout
    assert "0 annotations left out for a bad box" in finished.stdout
    assert "2/2" in finished.stderr  # the progress bar

    again = run_tool(*arguments)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "out.json exists already" in again.stderr
    assert "Traceback" not in again.stderr
