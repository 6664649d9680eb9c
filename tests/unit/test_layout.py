"""Imports point one way. The rules are checked against the source."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "server").rglob("*.py"))

HTTP = ("starlette", "uvicorn", "sse_starlette", "server.routes", "server.app")
# From top to bottom: each layer may import lower ones only.
FLOORS = ("server.core.roles", "server.core.text", "server.core.engine")
ENGINE_ROOM = ("torch", "server.core.engine.model", "server.core.engine.scheduler",
               "server.core.engine.engine", "server.core.engine.local",
               "server.core.engine.thread")  # fmt: skip


def imports_of(source: str, package: str) -> Iterator[str]:
    """All modules that a module in `package` with this source imports, anywhere in the file.

    `from a import b` counts as `a` and as `a.b`, because b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_below(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


@cache
def imported_by(path: Path) -> frozenset[str]:
    """All modules that the file imports."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return frozenset(imports_of(path.read_text(encoding="utf-8"), package))


def forbidden(path: Path, names: tuple[str, ...]) -> set[str]:
    """The file's imports of these modules or of modules in them."""
    return {module for module in imported_by(path) if is_below(module, names)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def below(folder: str) -> list[Path]:
    return [path for path in MODULES if name_of(path).startswith(f"{folder}/")]


# --- finding imports ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "package", "name"),
    [
        ("import torch", "server.core", "torch"),
        ("import os, torch.nn as nn", "server.core", "torch"),
        ("from torch import Tensor", "server.core", "torch"),
        ("from torch.nn import functional", "server.core", "torch"),
        ("from server import app", "server.core", "server.app"),
        ("from server.core.engine import model", "server.routes", "server.core.engine.model"),
        ("from .. import routes", "server.core", "server.routes"),
        ("from ..routes.chat import x", "server.core", "server.routes"),
        ("from .model import runner", "server.core.engine", "server.core.engine.model"),
        ("from . import model", "server.core.engine", "server.core.engine.model"),
        ("def f():\n    if True:\n        import torch", "server.core", "torch"),
        ("try:\n    import torch\nexcept ImportError:\n    pass", "server.core", "torch"),
    ],
)
def test_every_form_of_import_is_found(source: str, package: str, name: str) -> None:
    assert any(is_below(module, (name,)) for module in imports_of(source, package))


@pytest.mark.parametrize(
    "source", ["import torchvision", "from server.apple import x", "x = 'torch'"]
)
def test_a_similar_name_is_not_confused(source: str) -> None:
    assert not any(is_below(m, ("torch", "server.app")) for m in imports_of(source, "server.core"))


def test_the_modules_are_found() -> None:
    names = {name_of(path) for path in MODULES}
    assert {"server/app.py", "server/errors.py", "server/core/engine/engine.py"} <= names
    assert (
        below("server/core/engine/model")
        and below("server/routes")
        and len(below("server/core")) > 8
    )


# --- the rules ------------------------------------------------------------------------


def test_the_core_does_not_import_http() -> None:
    for path in below("server/core"):
        assert not forbidden(path, HTTP), path


def test_torch_is_imported_below_the_model_only() -> None:
    for path in MODULES:
        if path not in below("server/core/engine/model"):
            assert not forbidden(path, ("torch",)), path


def test_the_model_does_import_torch() -> None:
    assert any(forbidden(path, ("torch",)) for path in below("server/core/engine/model"))


def test_routes_never_see_a_tensor_or_the_inside_of_the_engine() -> None:
    for path in below("server/routes"):
        assert not forbidden(path, ENGINE_ROOM), path


def test_errors_import_nothing_of_the_project() -> None:
    assert not forbidden(ROOT / "server/errors.py", ("server", "training", "tests"))


def test_the_server_imports_neither_training_nor_tests() -> None:
    for path in MODULES:
        others = ("training", "tests", "benchmarks", "openai_examples", "pytest")
        assert not forbidden(path, others), path


def test_imports_are_absolute_and_at_the_top() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        everywhere = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        assert all(node in tree.body for node in everywhere), path
        assert not [
            node for node in everywhere if isinstance(node, ast.ImportFrom) and node.level
        ], path


def test_each_layer_of_the_core_imports_only_lower_ones() -> None:
    for path in below("server/core"):
        folder = f"server.core.{path.relative_to(ROOT / 'server/core').parts[0]}"
        above = FLOORS[: FLOORS.index(folder)] if folder in FLOORS else FLOORS
        assert not forbidden(path, above), path


def test_the_core_consists_of_its_layers() -> None:
    folders = {f"server.core.{path.parent.name}" for path in (ROOT / "server/core").glob("*/*.py")}
    assert folders == set(FLOORS)
    assert {path.name for path in (ROOT / "server/core").glob("*.py")} == {
        "__init__.py",
        "concurrency.py",
    }


@pytest.mark.parametrize(
    "name", ["engine", "local", "thread", "scheduler", "admission", "sequence"]
)
def test_the_engine_does_not_know_the_model(name: str) -> None:
    path = ROOT / "server/core/engine" / f"{name}.py"
    assert not forbidden(path, ("server.core.engine.model",))


@pytest.mark.parametrize("name", ["roles/heads", "roles/language", "concurrency"])
def test_general_helpers_import_nothing_of_the_server(
    name: str,
) -> None:
    assert not forbidden(ROOT / "server/core" / f"{name}.py", ("server",))


def test_settings_stop_before_the_core() -> None:
    for path in below("server/core"):
        assert not forbidden(path, ("server.config", "server.services", "server.protocol")), path


def test_no_module_of_the_server_hides_one_of_the_standard_library() -> None:
    assert not {path.stem for path in (ROOT / "server").glob("*.py")} & sys.stdlib_module_names


def test_the_page_only_uses_the_public_api() -> None:
    for path in below("server/ui"):
        inside = {module for module in forbidden(path, ("server",)) if module != "server.ui"}
        more = ["server.middleware"] if path.name == "serving.py" else []
        allowed = ("server.ui", *more)
        assert all(is_below(module, allowed) for module in inside - {"server"}), (path, inside)


def test_only_the_page_needs_gradio() -> None:
    for path in MODULES:
        if path not in below("server/ui"):
            assert not forbidden(path, ("gradio", "openai", "pandas", "server.ui")), path


def test_only_the_cluster_needs_ray() -> None:
    for path in MODULES:
        if path not in below("server/cluster"):
            assert not forbidden(path, ("ray", "server.cluster")), path


def test_only_loading_reads_tokenizers_for_which_torch_is_imported() -> None:
    for path in MODULES:
        if name_of(path) != "server/loading.py":
            assert not forbidden(path, ("server.core.text.tokenizer_files",)), path


def test_unit_tests_need_neither_torch_nor_a_server() -> None:
    heavy = ("torch", "uvicorn", "tests.servers", "tests.processes", "server.loading",
             "server.core.engine.model", "server.core.text.tokenizer_files")  # fmt: skip
    for path in (ROOT / "tests/unit").rglob("*.py"):
        assert not forbidden(path, heavy), path
