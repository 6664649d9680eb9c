"""The command `python -m server`, or `qwen-all-in-one`. Its subcommand `fit` fits a task;
`cluster` serves on many machines.

Exit codes: 0 stopped by a signal, every request finished or answered with an error; 1 could not
start, or was stopped at once by a second signal; 2 unknown option; 3 the engine broke down, or
the application failed to start (uvicorn's own code).
"""

import asyncio
import gc
import importlib
import importlib.util
import logging
import os
import socket
import sys
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from server.app import create_app, has_page_extra
from server.config import KEEP_ALIVE_S, Settings, read_settings
from server.core.engine.checkpoint import CheckpointError
from server.core.engine.engine import Engine
from server.core.engine.heap import share_one_heap
from server.core.engine.sequence import SamplingParams
from server.core.roles.task_files import TaskFileError
from server.fit.command import fit
from server.gate import Gate
from server.guards import exposure
from server.listener import bind, cannot_listen
from server.loading import load_services
from server.logs import configure_logs, try_print
from server.services import Services

logger = logging.getLogger(__name__)

# Time to send the last events of streams that were cut off, and to close connections.
CLOSING_S = 3
EXIT_FORCED, EXIT_BROKEN = 1, 3


def main() -> None:
    """Reads the settings, loads the model and serves until stopped; or runs a subcommand."""
    share_one_heap()
    if sys.argv[1:2] == ["fit"]:
        fit(sys.argv[2:])
        return
    if sys.argv[1:2] == ["cluster"]:
        _cluster(sys.argv[2:])
        return
    settings = read_settings(Settings, sys.argv[1:])
    configure_logs(settings.log_level, settings.log_format)
    try:
        logger.debug("%d API keys", len(settings.keys))  # reads their file before the model
        if settings.check:
            _check(settings)
            return
        settings.check_certificate()
        # Before the model is loaded, so that a port in use is reported at once.
        with bind(settings.host, settings.port) as listener:
            _serve(settings, listener)
    except (CheckpointError, TaskFileError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while the model is loaded
        sys.exit(EXIT_FORCED)


def _cluster(arguments: list[str]) -> None:
    """Serves on many machines. Imports Ray only here, if it is installed."""
    if importlib.util.find_spec("ray") is None:
        sys.exit("error: 'cluster' needs Ray; pip install 'qwen-all-in-one[cluster]'")
    importlib.import_module("server.cluster.command").cluster(arguments)


def _check(settings: Settings) -> None:
    """Loads the model and answers once."""
    services = _load(settings)
    _warn(services.warning)
    messages = [{"role": "user", "content": "你好！"}]
    params = SamplingParams(max_tokens=16, stop_token_ids=services.defaults.eos_token_ids)

    async def answer() -> tuple[str, str]:
        reply = await services.replier.reply(messages, params, (), with_sentiment=True)
        [pieces] = await reply.read()
        sentiment = reply.sentiment.label.value if reply.sentiment else "none"
        return sentiment, "".join(piece.text for piece in pieces)

    try:
        sentiment, text = asyncio.run(answer())
    finally:
        services.engine.close()
    print(f"{services.model_id} works: sentiment {sentiment}, answer {text!r}")


def _load(settings: Settings) -> Services:
    try_print(f"loading {settings.model!r} ...")
    return load_services(settings)


def _serve(settings: Settings, listener: socket.socket) -> None:
    services = _load(settings)
    host, port = listener.getsockname()[:2]
    url = f"{settings.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    app = create_app(settings, services)
    config = uvicorn.Config(
        app,
        log_level=settings.log_level,
        log_config=None,  # our configuration is used
        # As tested. uvicorn's defaults change if a package, such as Ray, installs alternatives.
        loop="asyncio",
        http="h11",
        access_log=False,  # our access log has the request's id
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSING_S,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )
    server = Server(config, app, services.engine, settings.grace_period)
    _warn(services.warning, exposure(settings))
    # Before the banner, so that clients can connect as soon as it is printed.
    try:
        listener.listen(config.backlog)
    except OSError as error:
        # Another server has bound the port, too, and listened first.
        services.engine.close()
        raise cannot_listen(host, port, error) from error
    try_print(_banner(services.model_id, url, _page_line(settings, url)))
    server.run(sockets=[listener])
    sys.exit(server.exit_code)


class Server(uvicorn.Server):
    """On a signal, refuses new requests, finishes the running ones, then exits.

    The port stays open meanwhile, and new requests get a 503. A second signal ends the process at
    once.
    """

    def __init__(
        self, config: uvicorn.Config, app: Starlette, engine: Engine, grace_period_s: float
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._gate: Gate = app.state.gate
        self._page, self._engine, self._grace_period_s = app.state.page, engine, grace_period_s
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, before the first request."""
        await super().startup(sockets)
        # Loaded objects stay. A full collection over them blocks the event loop for 0.25 s.
        gc.collect()
        gc.freeze()
        # The engine's thread yields to the event loop sooner; the default is 5 ms.
        sys.setswitchinterval(0.001)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called on SIGINT and SIGTERM, between two steps of the event loop."""
        if self._gate.is_closed:
            # Not by Python's own shutdown, which waits for a step and fails on open streams.
            os._exit(EXIT_FORCED)
        self._gate.is_closed = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; returns whether to exit."""
        if self._engine.breakdown is not None:
            # Its requests have got an error. A supervisor may start a new process.
            self.exit_code, self._gate.is_closed = EXIT_BROKEN, True
        if self._gate.is_closed and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        if self._gate.num_requests:
            logger.info(
                "finishing %d requests, in %g s at most; a second signal ends them now",
                self._gate.num_requests,
                self._grace_period_s,
            )
        try:
            await asyncio.wait_for(self._gate.wait_until_empty(), self._grace_period_s)
        except TimeoutError:
            logger.warning("%d requests were cut off", self._gate.num_requests)
            # Aborts the running sequences, so that their requests get an error.
            await asyncio.to_thread(self._engine.close)
        if self._page is not None:
            self._page.close()
        self.should_exit = True


def _warn(*warnings: str | None) -> None:
    for warning in filter(None, warnings):
        try_print(f"\nWARNING: {warning}", sys.stderr)


def _page_line(settings: Settings, url: str) -> str:
    if not settings.ui:
        return "off (--no-ui)"
    return f"{url}/" if has_page_extra() else "pip install 'qwen-all-in-one[ui]' to have one"


def _banner(model_id: str, url: str, page: str) -> str:
    return f"""
Serving {model_id} on {url}

  page              {page}
  OpenAI base URL   {url}/v1
  model             {model_id}    (without sentiment: {model_id}:plain)

Try it:

  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model_id}", "messages": [{{"role": "user", "content": "我今天考试通过了！"}}]}}'
"""


if __name__ == "__main__":
    main()
