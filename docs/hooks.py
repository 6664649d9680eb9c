"""What mkdocs does beyond its configuration.

Pages link to files of the repository outside `docs/`, as GitHub follows them. The site does not
know the repository's address, so such files are copied into it as text. A build that would load
something from elsewhere fails.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDER = "repository"
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")
# What a browser loads by itself. A link that a person follows may lead anywhere.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|@import[^;]*((?:https?:)?//[^\"')\s;]+)|\burl\([\"']?((?:https?:)?//[^\"')\s]+)"
)


def on_files(files: Files, config: Any) -> Files:
    """Adds each linked file once."""
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for page in pages for path in _LINK.findall(page)}):
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to ../{path}, which is not a file of the repository")
        uri, source = f"{FOLDER}/{path}.txt", str(ROOT / path)
        files.append(File.generated(config, uri, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Changes the links to those of the copies."""
    return _LINK.sub(rf"]({FOLDER}/\1.txt)", markdown)


def on_post_build(config: Any) -> None:
    """Ends the build if a page or a style sheet loads something from elsewhere."""
    for path in Path(config.site_dir).rglob("*.*"):
        if path.suffix in (".html", ".css"):
            for found in _LOADED.findall(path.read_text(encoding="utf-8")):
                raise PluginError(f"{path.name} loads {''.join(found)}")
