"""The code blocks of README and docs, and what they show of their output.

- A `json` or `text` block directly behind another block is that block's output.
- `…` stands for anything in a text or a string, and as the last element for the rest.
- A comment before a block may mark it: `<!-- not run: REASON -->`; `<!-- file: NAME -->`, under
  which it is also saved; `<!-- server: OPTIONS -->`, of the server that this block and the next
  ones use.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md")))

_MARK = r"<!-- (?:not run|file|server):[^\n]*-->\n"
_BLOCK = re.compile(rf"^((?:{_MARK})*)```(\w*)\n(.*?)^```$", re.M | re.S)
# Values that differ from one run to the next; only their types are compared.
_VARYING = {"id", "item_id", "call_id", "created", "created_at", "completed_at"}
# A result from the cache has used no tokens.
_VARYING |= {"cached", "cached_tokens", "cache_write_tokens", "hits", "misses"}
_VARYING |= {"prompt_tokens", "input_tokens", "total_tokens"}
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Block:
    """One fenced block.

    reason: why it is not run. file: the name it is saved under. server: options of the server that
    this block and the next ones use; None: those of the block before.
    """

    place: str
    line: int
    language: str
    code: str
    reason: str | None = None
    file: str | None = None
    server: str | None = None
    follows_at_once: bool = False

    @property
    def is_output(self) -> bool:
        """Whether this is output, if the block before it has any."""
        return self.follows_at_once and self.language in ("json", "text")


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    fences = re.findall(r"^ *```", text, re.M)
    assert len(fences) == 2 * len(found), f"{page.name}: a fence is indented, or not closed"
    blocks, end = [], 0
    for match in found:
        blocks.append(_block(page, text, match, not text[end : match.start()].strip()))
        end = match.end()
    return blocks


def _block(page: Path, text: str, match: re.Match[str], follows_at_once: bool) -> Block:
    marks = dict(re.findall(r"<!-- (not run|file|server): *(.*?) *-->", match[1]))
    line = text[: match.start(3)].count("\n") + 1
    place = f"{page.relative_to(ROOT)}:{line}"
    return Block(
        place, line, match[2], match[3],
        marks.get("not run"), marks.get("file"), marks.get("server"), follows_at_once,
    )  # fmt: skip


def load_json(text: str) -> Any:
    """JSON in which a bare `…` stands for the rest of an array or object."""
    written: list[str] = []
    stack: list[str] = []
    for part in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}…]|[^"\[\]{}…]+', text):
        if part in "[{":
            stack.append(part)
        elif part in "]}":
            stack.pop()
        elif part == "…":
            is_field = stack[-1] == "{" and "".join(written).rstrip()[-1] in "{,"
            part = '"…": 0' if is_field else '"…"'
        written.append(part)
    return json.loads("".join(written))


def check_json(shown: Any, actual: Any, path: str = "") -> None:
    """Raises where the shown value is not the actual one, but for what is elided."""
    key = path.rpartition(".")[2]
    if shown == "…":
        return
    if isinstance(shown, dict) and isinstance(actual, dict):
        fields = {name: value for name, value in shown.items() if name != "…"}
        assert "…" in shown or list(fields) == list(actual), f"{path}: fields {list(actual)}"
        for name, value in fields.items():
            assert name in actual, f"{path}: there is no {name!r}"
            check_json(value, actual[name], f"{path}.{name}")
    elif isinstance(shown, list) and isinstance(actual, list):
        is_cut = bool(shown) and shown[-1] == "…"
        items = shown[:-1] if is_cut else shown
        assert len(items) <= len(actual) if is_cut else len(items) == len(actual), path
        for i, item in enumerate(items):
            check_json(item, actual[i], f"{path}[{i}]")
    elif key in _VARYING:
        assert type(shown) is type(actual), f"{path}: {actual!r}"
    elif isinstance(shown, str) and isinstance(actual, str):
        check_text(shown, actual, path)
    elif isinstance(shown, float) or isinstance(actual, float):
        assert abs(shown - actual) < _TOLERANCE, f"{path}: {actual!r}"
    else:
        assert shown == actual, f"{path}: {actual!r}"


def check_text(shown: str, actual: str, path: str = "") -> None:
    """Raises where the text is another one; white space is not compared, `…` is anything."""
    pattern = ".*".join(re.escape(" ".join(part.split())) for part in shown.split("…"))
    pattern = pattern.replace(r"\ ", r"\s*")
    assert re.fullmatch(pattern, " ".join(actual.split()), re.S), f"{path}: {actual!r}"
