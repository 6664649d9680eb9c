"""CONTRIBUTING.md and the workflow name the make targets there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(MAKEFILE.split(".PHONY:")[1].split("\n")[0].split())


def targets_in(text: str) -> set[str]:
    return set(re.findall(r"\bmake ([a-z]+)", text))


def test_every_make_target_is_explained() -> None:
    table = re.findall(r"^\| .*\|$", CONTRIBUTING, re.M)
    assert targets_in("\n".join(table)) >= TARGETS


def test_the_workflow_calls_what_ci_run_calls() -> None:
    run = (ROOT / ".ci/run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    called = targets_in("\n".join(re.findall(r"^make .*", run, re.M)))
    assert called
    assert called <= targets_in("\n".join(re.findall(r"run: make .*", workflow)))


def test_every_file_that_contributing_names_exists() -> None:
    for name in re.findall(r"`(\w[\w./]*/[\w./]+)`", CONTRIBUTING):
        if "NAME" not in name:
            folders = (ROOT, ROOT / "server", ROOT / "tests", ROOT / "tests/core/engine/model")
            assert any((folder / name).exists() for folder in folders), name
