"""The example of docs/fit.md, exactly as written there, on the bundled model."""

import re
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from server.config import Settings
from server.fit.settings import FitSettings
from tests.fit.test_command import classify, fit
from tests.servers import LiveServer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8")


def test_the_example_fits_a_task_that_is_served(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
) -> None:
    [(fitting, serving)] = re.findall(r"```bash\n(.*)\n(.*)\n```", TEXT)
    program = ["python", "-m", "server", "fit", "docs/complaints.csv"]
    arguments = shlex.split(fitting.replace("DIR", "mini"))
    assert arguments[:5] == program
    monkeypatch.chdir(tmp_path)
    # The bundled model was trained for moods only, so the result may not be better.
    assert fit(monkeypatch, ROOT / "docs" / "complaints.csv", *arguments[5:], "--force") == ""
    assert shlex.split(serving) == ["python", "-m", "server", "--model", "DIR", "--tasks", "fitted"]
    with serve(Settings(model="mini", tasks=Path("fitted"))) as server:
        found = classify(server, "queue", "My parcel has not arrived for two weeks", "闪退")
    assert set(found) <= {f"Q{i}" for i in range(1, 7)}


def test_every_option_in_the_docs_exists() -> None:
    options = {name.replace("_", "-") for name in FitSettings.model_fields}
    named = set(re.findall(r"`--([a-z-]+)", TEXT)) - {"adapter"}  # the server's own
    assert named <= options
    assert {"labels", "encoding", "test-share", "max-rows", "force", "method"} <= named


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))
def test_every_link_to_a_file_resolves(target: str) -> None:
    assert (ROOT / "docs" / target).exists()
