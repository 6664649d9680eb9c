"""Unit tests: what needs neither torch nor a server. A run of these alone may not load torch."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
is_torch_loaded = pytest.StashKey[bool]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if "torch" in sys.modules and all(FOLDER in item.path.parents for item in session.items):
        session.config.stash[is_torch_loaded] = True
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash.get(is_torch_loaded, False):
        terminalreporter.section("unit tests", red=True)
        terminalreporter.line(
            "These tests loaded torch. Import what needs it elsewhere, or move the test out of "
            "tests/unit; `python -X importtime -m pytest tests/unit` shows the import."
        )
