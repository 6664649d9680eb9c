"""Errors a client may see: HTTP status, OpenAI's type and code. Imports nothing of the server."""

from collections.abc import Mapping


class APIError(Exception):
    """Base of the errors that are answered in OpenAI's error format."""

    status = 500
    type = "server_error"
    headers: Mapping[str, str] = {}  # in addition to those of every response

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, object]:
        """The JSON body, in the format that the openai client reads."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class InvalidRequestError(APIError):
    """The request cannot be served as it is; the message names the remedy."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room for an answer. Prompts are never truncated."""

    def __init__(self, num_prompt_tokens: int, max_context: int, param: str) -> None:
        super().__init__(
            f"This model's maximum context length is {max_context} tokens, but the prompt has "
            f"{num_prompt_tokens} and one more is needed for the answer. Please shorten {param}.",
            param=param,
            code="context_length_exceeded",
        )


class AuthenticationError(APIError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"
    headers: Mapping[str, str] = {"www-authenticate": "Bearer"}


class PermissionDeniedError(APIError):
    """The server does not answer requests of this kind."""

    status = 403
    type = "invalid_request_error"


class NotFoundError(APIError):
    """No such route or model."""

    status = 404
    type = "invalid_request_error"


class MethodNotAllowedError(APIError):
    """The route exists, but not for this method."""

    status = 405
    type = "invalid_request_error"


class BodyTimeoutError(APIError):
    """The client sends its request too slowly."""

    status = 408
    type = "invalid_request_error"
    headers: Mapping[str, str] = {"connection": "close"}


class RequestTooLargeError(APIError):
    """The body is larger than the server allows."""

    status = 413
    type = "invalid_request_error"


class InternalError(APIError):
    """The server failed; the log has the details. A retry would fail in the same way."""

    status = 500
    headers: Mapping[str, str] = {"x-should-retry": "false"}

    def __init__(self) -> None:
        super().__init__("The server failed on this request; see its log.")


class UnavailableError(APIError):
    """The engine has stopped, or is about to."""

    status = 503
    headers: Mapping[str, str] = {"retry-after": "5"}

    def __init__(self) -> None:
        super().__init__("The server is shutting down; try again shortly.")


class ReplicaLostError(APIError):
    """The cluster's replica that worked on the request died. A retry may reach another one."""

    status = 503
    headers: Mapping[str, str] = {"retry-after": "1"}

    def __init__(self) -> None:
        super().__init__(
            "The replica that worked on this request was lost; send the request again.",
            code="replica_lost",
        )


class EngineUnreachableError(APIError):
    """The engine is another server, which does not answer, or stopped during the answer."""

    status = 503
    headers: Mapping[str, str] = {"retry-after": "5"}

    def __init__(self) -> None:
        super().__init__(
            "The engine behind this server does not answer; try again shortly.",
            code="engine_unreachable",
        )


class EngineFailedError(APIError):
    """The engine is another server, which failed. A retry would fail in the same way."""

    status = 502
    headers: Mapping[str, str] = {"x-should-retry": "false"}

    def __init__(self) -> None:
        super().__init__(
            "The engine behind this server failed on this request; see the log.",
            code="engine_failed",
        )


class OverloadedError(APIError):
    """Too many requests are waiting already."""

    status = 429
    type = "rate_limit_error"
    headers: Mapping[str, str] = {"retry-after": "2"}

    def __init__(self, message: str) -> None:
        super().__init__(message, code="queue_full")


class RequestTimeoutError(APIError):
    """The request exceeded its deadline. A retry would double the load."""

    status = 504
    headers: Mapping[str, str] = {"x-should-retry": "false"}

    def __init__(self) -> None:
        super().__init__(
            "The request took longer than this server allows (--request-timeout); ask for fewer "
            "tokens, or try again when it is less busy.",
            code="request_timeout",
        )
