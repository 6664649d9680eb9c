"""The table of settings in docs/configuration.md. `python -m tests.settings_table` writes it."""

import re
from collections.abc import Mapping

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from server.config import Settings
from tests.markdown import ROOT

PAGE = ROOT / "docs" / "configuration.md"


def settings_table(fields: Mapping[str, FieldInfo] = Settings.model_fields) -> str:
    """The table of these settings: option, default, help text."""
    lines = ["| option | default | |", "|---|---|---|"]
    for name, field in fields.items():
        option = f"`--{name.replace('_', '-')}`"
        default = field.default
        assert default is not PydanticUndefined
        shown = f"`{default}`" if default not in (None, ()) else "–"
        lines.append(f"| {option} | {shown} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    table = re.compile(r"^\| option \|.*\n(?:\|.*\n)+", re.M)
    PAGE.write_text(table.sub(lambda _: settings_table() + "\n", before, count=1), encoding="utf-8")
