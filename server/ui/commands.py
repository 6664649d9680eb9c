"""The curl and Python lines that send the request the page has just sent."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

KEY_VARIABLE = "OPENAI_API_KEY"


def curl_line(url: str, body: Mapping[str, Any], *, has_key: bool) -> str:
    """For a POSIX shell. The key stays in a variable: it is nobody's to show."""
    words = ["curl", "-N", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
    line = shlex.join(words)
    if has_key:
        line += f' -H "authorization: Bearer ${KEY_VARIABLE}"'
    return f"{line} \\\n  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def python_lines(url: str, body: Mapping[str, Any], *, has_key: bool) -> str:
    """For the openai client."""
    known = {key: value for key, value in body.items() if key != "sentiment"}
    arguments = [f"    {key}={value!r}," for key, value in known.items()]
    if "sentiment" in body:
        arguments.append(f"    extra_body={ {'sentiment': body['sentiment']}!r},")
    key = "" if has_key else ', api_key="unused"'
    return "\n".join(
        [
            "from openai import OpenAI",
            "",
            f"client = OpenAI(base_url={f'{url}/v1'!r}{key})",
            "for chunk in client.chat.completions.create(",
            *arguments,
            "):",
            "    for choice in chunk.choices:",
            '        print(choice.delta.content or "", end="", flush=True)',
        ]
    )
