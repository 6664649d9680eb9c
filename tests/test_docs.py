"""What README and docs say is what the code does."""

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from server.protocol import completions, responses
from server.protocol.base import RequestBody
from server.protocol.chat import UNSUPPORTED, WITHOUT_EFFECT, ChatCompletionRequest
from server.protocol.sampling import SamplingRequest
from server.routes import ROUTES
from tests.markdown import PAGES, ROOT, blocks_of
from tests.processes import closed_port, self_signed
from tests.settings_table import settings_table

README, README_ZH = ROOT / "README.md", ROOT / "README.zh.md"
DOCS = ROOT / "docs"
MAX_README_LINES = 160


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


API = text_of(DOCS / "api.md")


def test_the_settings_table_is_complete_and_true() -> None:
    table = settings_table()
    assert table in text_of(DOCS / "configuration.md"), (
        f"`python -m tests.settings_table` writes this table into the page:\n\n{table}"
    )


def test_the_parameter_table_says_what_happens_to_each() -> None:
    found: dict[str, list[str]] = {"honoured": [], "refused": [], "without effect": []}
    for names, what in re.findall(r"^\| (`.*`) \| (honoured|refused|without effect) \|", API, re.M):
        found[what] += re.findall(r"`(\w+)`", names)
    assert sorted(found["honoured"]) == sorted(ChatCompletionRequest.model_fields)
    assert sorted(found["refused"]) == sorted(UNSUPPORTED)
    assert sorted(found["without effect"]) == sorted(WITHOUT_EFFECT)


def test_the_table_of_the_other_routes_says_what_happens_to_each() -> None:
    table = API.split("The parameters of `/v1/completions` and `/v1/responses`:")[1].split("\n\n")[
        1
    ]
    rows = {
        what: [re.findall(r"`(\w+)`", cell) for cell in cells]
        for what, *cells in re.findall(r"^\| ([a-z ,]+) \| (.*) \| (.*) \|$", table, re.M)
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
        assert route.path.replace("{model_id:path}", "{id}") in API


def test_every_source_file_is_in_the_tree() -> None:
    tree = text_of(DOCS / "architecture.md").split("\nserver/\n")[1].split("```")[0]
    for path in (ROOT / "server").rglob("*.py"):
        if path.name != "__init__.py" and not {"routes", "protocol"} & set(path.parts):
            assert re.search(rf"\b{re.escape(path.name)}", tree), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", text_of(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_heading_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*\.md)?#([^)]+)\)", text_of(page)):
        path = page.parent / target if target else page
        headings = re.findall(r"^#+ (.*)$", text_of(path), re.M)
        assert anchor in map(anchor_of, headings), f"{target}#{anchor}"


def anchor_of(heading: str) -> str:
    """As GitHub and mkdocs name headings in English."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_example_is_reachable_from_the_readme() -> None:
    assert "python -m openai_examples.repl" in text_of(README)
    assert (ROOT / "openai_examples" / "repl.py").exists()


def test_the_readme_is_short() -> None:
    for path in (README, README_ZH):
        assert len(text_of(path).splitlines()) <= MAX_README_LINES, path.name


def test_both_readmes_have_the_same_blocks_tables_and_figures() -> None:
    english, chinese = text_of(README), text_of(README_ZH)
    for pattern in (
        r"^```\w*$",
        r"^\|[-|]+\|$",
        r"(?<![\w.])\d[\d.,]*\d|(?<![\w.-])\d(?![\w.])",  # figures
        r"\]\(((?!README)[^)#]+)",  # links, but those to each other
        r"`(--?[a-z-]+|/v1/[a-z]+)`",
    ):
        found = [
            sorted(re.findall(pattern, text, re.M))
            for text in (without_code(english), without_code(chinese))
        ]
        assert found[0] == found[1]
    assert code_of(english) == code_of(chinese)


def without_code(text: str) -> str:
    return re.sub(r"^```(\w+)\n.*?^```$", r"```\1", text, flags=re.M | re.S)


def code_of(text: str) -> list[str]:
    """The blocks without their comments, which are in the language of the page."""
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.M | re.S)
    return [re.sub(r"\s+# .*", "", block) for block in blocks]


def test_every_promise_names_a_test_there_is() -> None:
    promises = text_of(DOCS / "operations.md").split("## What is promised")[1].split("\n## ")[0]
    named = re.findall(r"`(test_\w+)` \|$", promises, re.M)
    written = "\n".join(text_of(path) for path in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 10
    for name in named:
        assert re.search(rf"^(async )?def {name}\(", written, re.M), name


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_nginx_accepts_the_blocks_for_it(tmp_path: Path) -> None:
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language == "nginx"]
    assert blocks
    certificate, (*_, key) = self_signed(tmp_path)
    for block in blocks:
        servers = re.sub(r"listen \d+", f"listen 127.0.0.1:{closed_port()}", block.code)
        servers = re.sub(r"(ssl_certificate) [^;]+", rf"\1 {certificate}", servers)
        servers = re.sub(r"(ssl_certificate_key) [^;]+", rf"\1 {key}", servers)
        config = tmp_path / "nginx.conf"
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
        config.write_text(
            f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {temporary} {servers} }}",
            encoding="utf-8",
        )
        command = ["nginx", "-t", "-p", str(tmp_path), "-e", "stderr", "-c", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
