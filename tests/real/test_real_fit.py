"""`fit` on a real Qwen. Run with QWEN_REAL=FOLDER."""

import json
import os
from pathlib import Path

import pytest

from tests.fit.test_command import fit

pytestmark = pytest.mark.real

ROWS = Path(__file__).parents[2] / "docs" / "complaints.csv"


def test_labels_that_nobody_can_guess_are_learned_from_few_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--task", "queue", "--model", os.environ["QWEN_REAL"], "--out", tmp_path / "out"]
    instruction = "Which queue does this complaint go to? Answer with its name."
    assert fit(monkeypatch, ROWS, *options, "--instruction", instruction) == ""
    report = json.loads((tmp_path / "out" / "queue-report.json").read_text())
    assert report["before"]["accuracy"] < 0.4 < 0.7 < report["after"]["accuracy"]
