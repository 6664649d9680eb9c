"""The curl and Python lines that repeat the page's last request."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

KEY_VARIABLE = "OPENAI_API_KEY"
# Fields of a chat request that are not OpenAI's.
OWN_FIELDS = ("sentiment", "tasks")


def arguments_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat request as arguments of the openai client."""
    arguments = {name: value for name, value in body.items() if name not in OWN_FIELDS}
    own = {name: body[name] for name in OWN_FIELDS if name in body}
    return {**arguments, **({"extra_body": own} if own else {})}


def curl_line(url: str, body: Mapping[str, Any], *, has_key: bool) -> str:
    """For a POSIX shell. Names the variable of the key, not the key."""
    words = ["curl", "-N", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
    line = shlex.join(words)
    if has_key:
        line += f' -H "authorization: Bearer ${KEY_VARIABLE}"'
    return f"{line} \\\n  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def python_lines(url: str, body: Mapping[str, Any], *, has_key: bool) -> str:
    """For the openai client."""
    arguments = [f"    {name}={value!r}," for name, value in arguments_of(body).items()]
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
