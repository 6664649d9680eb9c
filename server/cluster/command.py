"""`cluster`: joins or starts a Ray cluster, deploys the server on it and waits to be stopped.

Exit codes: 0 stopped by a signal, after every request has finished or got an error; 1 could not
start, or was stopped at once by a second signal; 2 unknown option.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading

import ray
from ray import serve
from ray.exceptions import RayError

from server.cluster.deployment import build
from server.cluster.settings import ClusterSettings
from server.config import KEEP_ALIVE_S, read_settings
from server.guards import exposure
from server.listener import bind
from server.logs import configure_logs, try_print
from server.reasons import first_line

logger = logging.getLogger(__name__)

APP_NAME = "qwen"
EXIT_FORCED = 1
CONNECT_TIMEOUT_S = 10


def cluster(arguments: list[str]) -> None:
    """Runs the command. If the server cannot start, exits with a one-sentence error."""
    settings = read_settings(ClusterSettings, arguments)
    configure_logs(settings.log_level, settings.log_format)
    # Ray's usage reports are off unless the user turns them on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        # Reads the keys, to fail before the replicas start, which takes a while.
        logger.debug("%d API keys", len(settings.keys))
        settings.check_certificate()
        # Serve would report a port in use after a minute, with a traceback.
        bind(settings.host, settings.port).close()
        # Without an address Ray would look for the last cluster of this machine, which may be gone.
        _start(os.environ.get("RAY_ADDRESS", "local"), settings)
        _deploy(settings)
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # during the deployment
        sys.exit(EXIT_FORCED)
    is_stopped = _stop_signals()
    if warning := exposure(settings):
        try_print(f"\nWARNING: {warning}", sys.stderr)
    try_print(_banner(settings))
    is_stopped.wait()
    _drain()


def _start(address: str, settings: ClusterSettings) -> None:
    """Joins the Ray cluster at the address, or starts one, and starts Serve on it.

    Raises:
        OSError: there is no such cluster, or Serve cannot start; the message has the reason.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        # Ray itself would retry for minutes.
        try:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise OSError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        serve.start(proxy_location="EveryNode", http_options=_http_options(settings))
    except (RuntimeError, RayError) as error:
        raise OSError(f"Ray cannot start: {first_line(error)}") from error


def _http_options(settings: ClusterSettings) -> dict[str, object]:
    options: dict[str, object] = {
        "host": settings.host, "port": settings.port, "keep_alive_timeout_s": KEEP_ALIVE_S
    }  # fmt: skip
    if settings.ssl_certfile:
        options["ssl_certfile"] = str(settings.ssl_certfile)
        options["ssl_keyfile"] = str(settings.ssl_keyfile or settings.ssl_certfile)
    return options


def _deploy(settings: ClusterSettings) -> None:
    """Returns when all replicas run.

    Raises:
        OSError: the replicas cannot start; the message has the reason.
    """
    try:
        serve.run(build(settings), name=APP_NAME)
    except KeyboardInterrupt:
        # On a joined cluster, Serve would continue without this command.
        serve.delete(APP_NAME, _blocking=False)
        raise
    except RuntimeError as error:
        deployments = serve.status().applications[APP_NAME].deployments.values()
        # A message may be a traceback; its last line has the reason.
        reasons = [deployment.message.strip().splitlines()[-1:] for deployment in deployments]
        reason = next((line for lines in reasons for line in lines), str(error))
        serve.delete(APP_NAME, _blocking=False)
        raise OSError(f"the replicas cannot start: {reason}") from error


def _stop_signals() -> threading.Event:
    """Returns an event that the first SIGINT or SIGTERM sets. The second ends the process."""
    is_stopped = threading.Event()

    def stop(*_: object) -> None:
        if is_stopped.is_set():
            os._exit(EXIT_FORCED)
        is_stopped.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return is_stopped


def _drain() -> None:
    """Refuses new requests and returns when the last one has ended."""
    while APP_NAME in serve.status().applications:
        with contextlib.suppress(TimeoutError):  # Serve waits a minute at most
            serve.delete(APP_NAME)


def _banner(settings: ClusterSettings) -> str:
    url = f"{settings.scheme}://{settings.host}:{settings.port}"
    return f"""
Serving {settings.model} on {url}, and on this port of every node

  OpenAI base URL   {url}/v1
  models            {url}/v1/models
  replicas          {url}/health
"""
