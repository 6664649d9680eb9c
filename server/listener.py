"""The socket that the server listens on."""

import socket


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; it does not listen yet. Port 0 takes a free one.

    Raises:
        OSError: the port is in use, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only for sockets of an explicit protocol. With it, every
    # request on a kept connection waits 40 ms for a delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise cannot_listen(host, port, error) from error
    return listener


def cannot_listen(host: str, port: int, error: OSError) -> OSError:
    """The error with the address and the remedy in its message."""
    reason = f"cannot listen on {host}:{port}: {error.strerror}"
    return OSError(f"{reason}; choose another with --port")
