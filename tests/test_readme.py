"""The README agrees with the code."""

import re
from pathlib import Path
from types import ModuleType

from pydantic_core import PydanticUndefined

from server.config import Settings
from server.protocol import completions, responses
from server.protocol.base import RequestBody
from server.protocol.chat import UNSUPPORTED, WITHOUT_EFFECT, ChatCompletionRequest
from server.protocol.sampling import SamplingRequest
from server.routes import ROUTES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


OTHER_ROUTES = README.split("The other routes that write know these:")[1].split("\n\n")[1]


def settings_table() -> str:
    """The table the README must hold."""
    lines = ["| option | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        option = f"`--{name.replace('_', '-')}`"
        default = field.default
        assert default is not PydanticUndefined
        shown = f"`{default}`" if default not in (None, ()) else "–"
        lines.append(f"| {option} | {shown} | {field.description} |")
    return "\n".join(lines)


def test_the_settings_table_is_complete_and_true() -> None:
    assert settings_table() in README, f"README.md should contain\n\n{settings_table()}"


def test_the_parameter_table_says_what_happens_to_each() -> None:
    names_by_effect: dict[str, list[str]] = {"honoured": [], "refused": [], "without effect": []}
    for names, what in re.findall(
        r"^\| (`.*`) \| (honoured|refused|without effect) \|", README, re.M
    ):
        names_by_effect[what] += re.findall(r"`(\w+)`", names)
    assert sorted(names_by_effect["honoured"]) == sorted(ChatCompletionRequest.model_fields)
    assert sorted(names_by_effect["refused"]) == sorted(UNSUPPORTED)
    assert sorted(names_by_effect["without effect"]) == sorted(WITHOUT_EFFECT)


def test_the_table_of_the_other_routes_says_what_happens_to_each() -> None:
    rows = {
        what: [re.findall(r"`(\w+)`", cell) for cell in cells]
        for what, *cells in re.findall(r"^\| ([a-z ,]+) \| (.*) \| (.*) \|$", OTHER_ROUTES, re.M)
    }
    assert rows["honoured by both"] == [list(SamplingRequest.model_fields), []]
    stored = "previous_response_id"  # a field, so that its refusal can say why
    routes: list[tuple[ModuleType, type[RequestBody], set[str]]] = [
        (completions, completions.CompletionRequest, set()),
        (responses, responses.ResponsesRequest, {stored}),
    ]
    for i, (route, kind, never) in enumerate(routes):
        own = fields_of(kind) - fields_of(SamplingRequest)
        assert sorted(rows["honoured"][i]) == sorted(own - never)
        assert sorted(rows["refused, unless off"][i]) == sorted({*route.UNSUPPORTED, *never})
        assert sorted(rows["without effect"][i]) == sorted(route.WITHOUT_EFFECT)


def fields_of(kind: type[RequestBody]) -> set[str]:
    return {info.alias or name for name, info in kind.model_fields.items()}


def test_every_route_is_named() -> None:
    for route in ROUTES:
        assert route.path.replace("{model_id:path}", "{id}") in README


def test_every_source_file_is_in_the_tree() -> None:
    tree = README.split("```\nserver/\n")[1].split("```")[0]
    for path in (ROOT / "server").rglob("*.py"):
        if path.name != "__init__.py" and not {"routes", "protocol"} & set(path.parts):
            assert re.search(rf"\b{re.escape(path.name)}", tree), path


def test_every_link_to_a_file_resolves() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_example_is_reachable_from_the_readme() -> None:
    assert "python -m openai_examples.repl" in README
    assert (ROOT / "openai_examples" / "repl.py").exists()


def test_every_promise_names_a_test_there_is() -> None:
    promises = README.split("## What is promised")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+)` \|$", promises, re.M)
    written = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 10
    for name in named:
        assert re.search(rf"^(async )?def {name}\(", written, re.M), name
