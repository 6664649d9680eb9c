"""The command: `python -m server`, or `qwen-all-in-one`."""

import logging
import socket
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.app import create_app
from server.config import Settings
from server.core.checkpoint import CheckpointError
from server.core.tasks import TaskFileError
from server.loading import load_services

GRACE_PERIOD_S = 5


def main() -> None:
    """Reads the settings, loads the model and serves until told to stop."""
    settings = _read_settings()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(levelname)-8s %(name)s: %(message)s"
    )
    try:
        # First the port: nobody should wait for a model only to learn that it is taken.
        with _bind(settings.host, settings.port) as listener:
            _serve(settings, listener)
    except (CheckpointError, TaskFileError, OSError) as error:
        sys.exit(f"error: {error}")


def _serve(settings: Settings, listener: socket.socket) -> None:
    print(f"loading {settings.model!r} ...", flush=True)
    services = load_services(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    app = create_app(settings, services)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level=settings.log_level,
            timeout_graceful_shutdown=GRACE_PERIOD_S,
        )
    )
    if services.warning:
        print(f"\nWARNING: {services.warning}", file=sys.stderr, flush=True)
    print(_banner(services.model_id, url), flush=True)
    server.run(sockets=[listener])


def _read_settings() -> Settings:
    try:
        return CliApp.run(Settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        sys.exit(f"error: {option} {first['input']!r}: {first['msg']}")


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is spelt out; with it, every
    # request on a kept connection waits 40 ms for a delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port"
        ) from error
    return listener


def _banner(model_id: str, url: str) -> str:
    return f"""
Serving {model_id} on {url}

  OpenAI base URL   {url}/v1
  model             {model_id}    (without sentiment: {model_id}:plain)

Try it:

  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model_id}", "messages": [{{"role": "user", "content": "我今天考试通过了！"}}]}}'
"""


if __name__ == "__main__":
    main()
