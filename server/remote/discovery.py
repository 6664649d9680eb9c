"""Reads once at the start which model the upstream server serves, and checks its tokenizer."""

import json
from dataclasses import dataclass
from typing import Any

import httpx2

from server.core.text.tokenizer import ChatTokenizer
from server.reasons import first_line
from server.remote.upstream import CONNECT_TIMEOUT_S, Address

# Long enough for a busy server.
ANSWER_TIMEOUT_S = 30.0
# A text that the tokenizer of any other model family encodes differently.
_SAMPLE = "Mood 心情：太好了！ 12345 naïve 🙂"


class EngineUnusableError(OSError):
    """The upstream server cannot be the engine; the message is one sentence for the console."""


@dataclass(frozen=True)
class UpstreamModel:
    """The model's name there, and its maximum context length in tokens."""

    name: str
    max_context: int


def discover(address: Address) -> UpstreamModel:
    """The first model that is not an adapter.

    Raises:
        EngineUnusableError: the server does not answer, or not as vLLM does.
    """
    listed = _answer(address, "GET", "/v1/models")
    try:
        model = next(each for each in listed["data"] if each.get("parent") is None)
        max_context = model.get("max_model_len") or model.get("context_length")
        return UpstreamModel(str(model["id"]), int(max_context))
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise EngineUnusableError(
            f"the server at --engine {address.url} lists no model with its context; give the "
            "address of a vLLM, or of another server like this one"
        ) from error


def check_tokenizer(address: Address, model: UpstreamModel, tokenizer: ChatTokenizer) -> None:
    """Checks that both servers use the same token ids.

    Raises:
        EngineUnusableError: they do not.
    """
    answer = _answer(address, "POST", "/tokenize", {"model": model.name, "prompt": _SAMPLE})
    if answer.get("tokens") != tokenizer.encode_text(_SAMPLE):
        raise EngineUnusableError(
            f"the engine at {address.url} serves {model.name!r}, whose tokens are not those of "
            "--model; use the same checkpoint in both"
        )


def _answer(address: Address, method: str, path: str, body: Any = None) -> dict[str, Any]:
    timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        response = httpx2.request(
            method, f"{address.url}{path}", json=body, headers=address.headers, timeout=timeout
        )
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        raise EngineUnusableError(
            f"the engine at {address.url} does not answer "
            f"({first_line(error) or type(error).__name__}); start it first, or correct --engine"
        ) from error
    if response.status_code in (401, 403):
        raise EngineUnusableError(
            f"the engine at {address.url} refuses the key; give its own with --engine-key"
        )
    try:
        answer = json.loads(response.content)
    except ValueError:
        answer = None
    if not response.is_success or not isinstance(answer, dict):
        raise EngineUnusableError(
            f"the engine at {address.url} answers {response.status_code} to {path}; it must be "
            "a vLLM, of version 0.32 or newer, or another server like this one"
        )
    return answer
