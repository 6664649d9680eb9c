"""A wheel of this checkout, installed elsewhere, serves from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import httpx
import pytest

from server.core.engine.checkpoint import BUNDLED_FOLDER
from tests.processes import environment, started

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "server", source / "server", ignore=shutil.ignore_patterns("__pycache__")
    )
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True, timeout=300)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and, by a path file, its dependencies only."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    options = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *options], check=True, capture_output=True, timeout=300)
    # Editable installs work through path files, which are not read in a folder named by one.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def run(python: Path, cwd: Path, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_brings_model_and_tasks_and_runs_from_any_folder(
    python: Path, tmp_path: Path
) -> None:
    where = Path(run(python, tmp_path, "-c", "import server; print(server.__file__)"))
    assert where.is_relative_to(python.parents[1])
    assert not where.is_relative_to(ROOT)
    env = environment(tmp_path)
    env.pop("PYTHONPATH", None)
    command = (str(python.parent / "qwen-all-in-one"),)
    with started(env, "--model", "mini", cwd=tmp_path, command=command) as server:
        body = {"model": "qwen-mini", "messages": [{"role": "user", "content": "我很开心"}]}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["sentiment"]["label"] == "positive"
        assert reply["choices"][0]["message"]["content"]
        intent = {"input": "how do I get there?", "task": "intent"}
        response = httpx.post(f"{server.url}/v1/classify", json=intent, timeout=60)
        assert response.json()["data"][0]["label"]


def test_the_console_script_is_installed(python: Path, tmp_path: Path) -> None:
    script = python.parent / "qwen-all-in-one"
    assert "--model" in run(python, tmp_path, str(script), "--help")


def test_the_bundled_weights_stay_within_their_limit() -> None:
    assert sum(p.stat().st_size for p in BUNDLED_FOLDER.iterdir()) < 40 * 1024 * 1024
