"""Access: keys on every route, pages of allowed origins, request ids."""

import dataclasses
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from server.__main__ import main
from server.app import create_app
from server.config import Settings
from server.guards import OPEN_PATHS, HostMiddleware, exposure
from server.metrics import Metrics
from server.routes import ROUTES
from tests.live.test_errors import assert_error
from tests.servers import LiveServer

KEY, OTHER_KEY, FILED_KEY = "sk-the-right-one", "sk-another", "sk-from-a-file"
ORIGIN = "https://chat.example"
WRONG = {
    "none": None,
    "no value": "Bearer",
    "no scheme": KEY,
    "another scheme": f"Basic {KEY}",
    "a prefix": f"Bearer {KEY[:-1]}",
    "a longer one": f"Bearer {KEY}1",
    "the other's end": f"Bearer {KEY}{OTHER_KEY}",
    "both": f"Bearer {KEY},{OTHER_KEY}",
    "a part of a line": "Bearer sk-a",
    "another case": f"Bearer {KEY.upper()}",
    "very long": "Bearer " + KEY * 3000,
    "no ASCII": "Bearer schlüssel".encode("latin-1"),
}

Methods = list[tuple[str, str]]


@pytest.fixture(scope="module")
def guarded(
    tiny_checkpoint: Path,
    serve: Callable[[Settings], AbstractContextManager[LiveServer]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveServer]:
    key_file = tmp_path_factory.mktemp("keys") / "keys.txt"
    key_file.write_text(f"\n  {FILED_KEY} \r\nsk-a,b\n")
    settings = Settings(
        model=str(tiny_checkpoint),
        api_key=(SecretStr(KEY), SecretStr(OTHER_KEY)),
        api_key_file=key_file,
        cors_origin=(ORIGIN,),
    )
    with serve(settings) as server:
        yield server


def every_route() -> Methods:
    return [
        (method, route.path.replace("{model_id:path}", "any"))
        for route in ROUTES
        for method in sorted(route.methods or ())
    ]


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_a_wrong_key_opens_no_route_but_health(
    guarded: LiveServer, value: str | bytes | None
) -> None:
    headers: Any = {} if value is None else {"authorization": value}
    with httpx.Client(base_url=guarded.url, headers=headers) as client:
        for method, path in [*every_route(), ("GET", "/nowhere")]:
            response = client.request(method, path)
            if path in OPEN_PATHS:
                assert response.status_code == 200
            elif method == "HEAD":
                assert response.status_code == 401
            else:
                assert_error(response, 401, "authentication_error", None, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
                assert KEY not in response.text


@pytest.mark.parametrize(
    "path", ["/ready", "//health", "/health/", "/HEALTH", "/health%2f", "/v1/models?/health"]
)
def test_paths_that_only_resemble_health_need_a_key(guarded: LiveServer, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 401


@pytest.mark.parametrize(
    "value",
    [f"Bearer {KEY}", f"bearer  {OTHER_KEY}", f"Bearer {FILED_KEY}", "Bearer sk-a,b"],
)
def test_any_key_opens_every_route(guarded: LiveServer, value: str) -> None:
    with httpx.Client(base_url=guarded.url, headers={"authorization": value}) as client:
        for method, path in every_route():
            assert client.request(method, path).status_code in (200, 400, 404)


def test_a_body_is_not_read_for_a_wrong_key(guarded: LiveServer) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        # The body that is announced never comes.
        connection.sendall(
            b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n"
        )
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 401 ")


# --- names of the server --------------------------------------------------------------


@pytest.fixture(scope="module")
def proxied(
    tiny_checkpoint: Path, serve: Callable[[Settings], AbstractContextManager[LiveServer]]
) -> Iterator[LiveServer]:
    settings = Settings(model=str(tiny_checkpoint), allowed_host="chat.example, Mood.example")  # type: ignore[arg-type]
    with serve(settings) as server:
        yield server


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "192.168.1.2",
        "[::2]:80",
        "0.0.0.0",
        "localhost:80:80",
        "chat.example",
        "::1 evil.example",
    ],
)
def test_a_name_that_leads_here_by_rebinding_is_refused_everywhere(
    tiny: LiveServer, host: str
) -> None:  # fmt: skip
    with httpx.Client(base_url=tiny.url, headers={"host": host}) as client:
        for method, path in [*every_route(), ("GET", "/"), ("POST", "/gradio_api/queue/join")]:
            response = client.request(method, path)
            assert response.status_code == 403, (method, path)
            if method != "HEAD":
                said = assert_error(
                    response, 403, "invalid_request_error", None, "host_not_allowed"
                )
                assert "'Host: " in said and "--allowed-host" in said and "--api-key" in said


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:9", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8000"],
)
def test_every_name_of_this_machine_is_answered(tiny: LiveServer, host: str) -> None:
    for path in ("/health", "/", "/v1/models"):
        assert httpx.get(tiny.url + path, headers={"host": host}).status_code == 200


def test_a_request_without_a_host_header_is_answered(tiny: LiveServer) -> None:
    host, port = tiny.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("host", "status"),
    [("chat.example", 200), ("mood.EXAMPLE:443", 200), ("127.0.0.1", 200), ("a.chat.example", 403)],
)
def test_a_proxy_on_this_machine_may_use_the_names_it_was_given(
    proxied: LiveServer, host: str, status: int
) -> None:
    assert httpx.get(f"{proxied.url}/health", headers={"host": host}).status_code == status


def test_a_server_with_a_key_accepts_any_host_name(guarded: LiveServer) -> None:
    headers = {"host": "evil.example", "authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{guarded.base_url}/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "keys", "is_checked"),
    [
        ("127.0.0.1", "", True),
        ("localhost", "", True),
        ("::1", "", True),
        ("0.0.0.0", "", False),
        ("::", "", False),
        ("127.0.0.1", KEY, False),
    ],
)
def test_only_a_loopback_server_without_a_key_checks_host_names(
    tiny: LiveServer, host: str, keys: str, is_checked: bool
) -> None:
    settings = Settings(host=host, api_key=keys or (), ui=False)  # type: ignore[arg-type]
    services = dataclasses.replace(tiny.services, metrics=Metrics())
    app = create_app(settings, services)
    kinds: list[object] = [each.cls for each in app.user_middleware]
    assert (HostMiddleware in kinds) == is_checked


# --- pages of other origins -----------------------------------------------------------


def preflight(server: LiveServer, origin: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(f"{server.base_url}/chat/completions", headers=headers)


def test_an_allowed_origin_needs_no_key_for_its_preflight(guarded: LiveServer) -> None:
    response = preflight(guarded, ORIGIN)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in response.headers["access-control-allow-headers"]
    # Even a refusal can be read by the page.
    refused = httpx.get(f"{guarded.base_url}/models", headers={"origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in refused.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", f"{ORIGIN}.evil.example", "http://chat.example", "null"]
)
def test_other_origins_are_not_allowed(guarded: LiveServer, tiny: LiveServer, origin: str) -> None:
    for server in (guarded, tiny):
        response = preflight(server, origin)
        assert response.status_code in (400, 401, 405)
        assert "access-control-allow-origin" not in response.headers
        health = httpx.get(f"{server.url}/health", headers={"origin": origin})
        assert "access-control-allow-origin" not in health.headers


def test_a_request_keeps_its_id_in_every_response(
    guarded: LiveServer, tiny: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.services.tokenizer, "encode_text", lambda text: 1 / 0)
    headers = {"x-request-id": "mine-1"}
    for url, status in [
        (f"{guarded.base_url}/classify", 401),
        (f"{tiny.base_url}/nowhere", 404),
        (f"{tiny.base_url}/classify", 400),
        (f"{tiny.base_url}/completions", 500),
    ]:
        body = {"model": tiny.model, "prompt": "a"}
        response = httpx.post(url, json=body, headers=headers)
        assert response.status_code == status, response.text
        assert response.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("given", [None, "", "a" * 129, "two words", "<b>", "ü".encode()])
def test_an_invalid_id_is_replaced(tiny: LiveServer, given: str | bytes | None) -> None:
    headers: Any = {} if given is None else {"x-request-id": given}
    ids = {
        httpx.get(f"{tiny.url}/health", headers=headers).headers["x-request-id"] for _ in range(2)
    }
    assert len(ids) == 2
    assert all(each.startswith("req_") for each in ids)


@pytest.mark.parametrize(
    ("host", "keys", "is_warned"),
    [
        ("127.0.0.1", "", False),
        ("127.1.2.3", "", False),
        ("::1", "", False),
        ("localhost", "", False),
        ("0.0.0.0", "", True),
        ("::", "", True),
        ("192.168.1.2", "", True),
        ("my-machine", "", True),
        ("0.0.0.0", KEY, False),
    ],
)
def test_a_server_that_is_open_to_other_machines_warns(
    host: str, keys: str, is_warned: bool
) -> None:
    settings = Settings(host=host, api_key=keys or ())  # type: ignore[arg-type]
    assert (exposure(settings) is not None) == is_warned


@pytest.mark.parametrize("keys", ["", " ", ",,"])
def test_an_empty_key_starts_no_server(keys: str) -> None:
    with pytest.raises(ValidationError, match="there is no key in it"):
        Settings(api_key=keys)  # type: ignore[arg-type]


def test_keys_are_never_shown() -> None:
    settings = Settings(api_key=KEY)  # type: ignore[arg-type]
    assert (
        KEY not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    )


def test_a_key_of_a_file_is_not_shown_either(tmp_path: Path) -> None:
    key_file = tmp_path / "keys.txt"
    key_file.write_text(KEY)
    settings = Settings(api_key_file=key_file)
    assert [key.get_secret_value() for key in settings.keys] == [KEY]
    assert KEY not in f"{settings!r} {settings.keys} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    "options",
    [("--help",), ("--port", "many"), ("--api-key", f"{KEY}1", "--dtype", "no"), ("--no-such",)],
    ids=lambda options: " ".join(options[-2:]),
)
def test_no_key_is_shown_by_a_command_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("QWEN_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["qwen-all-in-one", *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capfd.readouterr()
    assert "--api-key" in out or exit_.value.code
    # Python prints the code if it is text.
    assert KEY not in f"{out}{err}{exit_.value.code}"
