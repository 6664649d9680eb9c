"""All settings with their defaults and help texts."""

import os
import re
import ssl
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, CliApp, NoDecode, SettingsConfigDict

# Longer than clients and proxies keep an idle connection (httpx 5 s, nginx 60 s): a request that is
# sent just when the server closes the connection gets a reset instead of an answer.
KEEP_ALIVE_S = 75

PositiveInt = Annotated[int, Field(ge=1)]
AnySettings = TypeVar("AnySettings", bound=BaseSettings)


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part for item in value.split(",") if (part := item.strip()))
    return value


def _keys(value: Any) -> Any:
    keys = _split(value)
    if value is not None and not isinstance(value, tuple) and not keys:
        # As from an unset environment variable: an open server is not what was meant.
        raise ValueError("there is no key in it; leave the option out to let everybody in")
    return keys


def _adapters(value: Any) -> Any:
    """Splits and checks adapters given as `NAME=FOLDER`."""
    pairs, seen = _split(value), set[str]()
    for pair in pairs:
        name, _, folder = str(pair).partition("=")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not folder:
            raise ValueError(f"{pair!r} is not NAME=FOLDER, with a name of A-Z, a-z, 0-9, . _ -")
        if name == "plain":
            raise ValueError("the name 'plain' is reserved for chats without sentiment")
        if name in seen:
            raise ValueError(f"the name {name!r} is given twice")
        seen.add(name)
    return pairs


def _engine_url(url: str | None) -> str | None:
    """Checks the URL, and removes the `/v1` of an OpenAI base URL."""
    if url is None:
        return None
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
        raise ValueError("it is not http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


# Several of NAME=FOLDER.
AdapterFolders = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_adapters)]


class ModelSettings(BaseSettings):
    """Settings of the model and its tasks."""

    model_config = SettingsConfigDict(
        env_prefix="QWEN_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        frozen=True,
    )

    model: str = Field(
        "auto",
        description="hub id, local folder, GGUF, 'mini' (bundled), or 'auto': Qwen1.5-0.5B-Chat, "
        "or the bundled model if the hub is unreachable",
    )
    revision: str | None = Field(
        None,
        description="commit, branch or tag of a hub model; default: the newest commit, for 'auto' "
        "a fixed one",
    )
    adapter: AdapterFolders = Field(
        (),
        description="NAME=FOLDER of a peft adapter (LoRA, prompt, prefix), which a chat selects by "
        "the model id plus :NAME, and a task in its file; several: repeat the option, or separate "
        "them by commas",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        "auto",
        description="type of the weights; 'auto': int8 for a large model, float32 for a small one",
    )
    num_threads: PositiveInt | None = Field(
        None, description="CPU threads of the model; default: the number of physical cores"
    )
    max_context: PositiveInt | None = Field(
        None,
        description="context length in tokens; default: the model's, at most three quarters of "
        "--max-kv-mib",
    )
    max_kv_mib: PositiveInt = Field(
        2048, description="KV cache of the running sequences, in MiB; further sequences wait"
    )
    tasks: Path | None = Field(
        None,
        description="TOML file of tasks that add to the built-in ones, or replace those of the "
        "same name; or a folder that fit wrote",
    )
    cache_dir: Path | None = Field(
        None,
        description="folder for judges fitted to a model; default: ~/.cache/qwen-all-in-one",
    )


class Settings(ModelSettings):
    """An OpenAI-compatible server with one small Qwen that reads the mood, then answers.

    `fit --help` explains how to fit a task to your own labelled texts.
    """

    model_config = SettingsConfigDict(cli_prog_name="qwen-all-in-one")

    engine: Annotated[str | None, AfterValidator(_engine_url)] = Field(
        None,
        description="http://HOST:PORT of a vLLM, or of another server like this one, that computes "
        "in place of this process; --model then names the same checkpoint, whose weights are not "
        "read",
    )
    engine_key: SecretStr | None = Field(None, description="API key that --engine requires")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port, 0: any free one")
    check: bool = Field(False, description="load the model, answer one request and exit")
    ui: bool = Field(True, description="serve the page at / if Gradio is installed; off: --no-ui")
    max_num_seqs: PositiveInt = Field(
        16, description="requests computed at once, and sequences that decode in one step"
    )
    max_num_batched_tokens: Annotated[int, Field(ge=2)] = Field(
        256,
        description="tokens of prompts, labels and answers computed in one step; an eighth of "
        "them if several requests share the step",
    )
    max_draft_tokens: Annotated[int, Field(ge=0, le=7)] = Field(
        3,
        description="next tokens that are drafted from the text so far and verified in one step "
        "with at most 8 tokens; only in int8 and int4 without a LoRA; does not change the text; "
        "0: off",
    )
    max_queue: Annotated[int, Field(ge=0)] = Field(
        64, description="requests that may wait beyond --max-num-seqs; further ones get a 429"
    )
    request_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="seconds that a request may take, including its wait"
    )
    grace_period: Annotated[float, Field(ge=0)] = Field(
        30.0, description="seconds for running requests to finish when the server is stopped"
    )
    max_prefix_mib: Annotated[int, Field(ge=0)] = Field(
        512, description="prefix cache: computed prompts that later ones may begin with, in MiB"
    )
    persona: str | None = Field(
        None,
        description="system prompt of a chat without one of its own, for every language; default: "
        "the task file's",
    )
    sentiment_cache_size: Annotated[int, Field(ge=0)] = Field(
        4096, description="cached results of sentiment and other tasks, 0: none"
    )
    max_body_bytes: PositiveInt = Field(
        4 * 1024 * 1024, description="largest request body, in bytes"
    )
    api_key: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_keys)] = Field(
        (),
        description="key that clients must send; several: repeat the option, or separate them by "
        "commas",
    )
    api_key_file: Path | None = Field(None, description="file of further keys, one per line")
    cors_origin: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="origin whose pages may call this server from a browser, '*': all; several: "
        "as for --api-key",
    )
    allowed_host: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="host name that a server on loopback without a key also accepts, for a reverse "
        "proxy on this machine; several: as for --api-key",
    )
    ssl_certfile: Path | None = Field(None, description="certificate chain (PEM), to serve https")
    ssl_keyfile: Path | None = Field(
        None, description="private key (PEM), if --ssl-certfile does not contain it"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="text lines, or one JSON object per line; both with the request's id"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged"
    )

    @property
    def scheme(self) -> Literal["http", "https"]:
        """The scheme that this server itself serves, whatever a proxy does."""
        return "https" if self.ssl_certfile else "http"

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or by default a folder as the XDG base directory specification says."""
        if self.cache_dir is not None:
            return self.cache_dir
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # the user has no home
            base = Path(tempfile.gettempdir())
        return base / "qwen-all-in-one"

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters' folders by their names."""
        pairs = (pair.partition("=") for pair in self.adapter)
        return {name: Path(folder).expanduser() for name, _, folder in pairs}

    @cached_property
    def keys(self) -> tuple[SecretStr, ...]:
        """All API keys, including those of the file, which is read once.

        Raises:
            OSError: the file cannot be read, or contains no key.
        """
        return (*self.api_key, *(_read_keys(self.api_key_file) if self.api_key_file else ()))

    def check_certificate(self) -> None:
        """Checks the certificate, before the model is loaded.

        Raises:
            OSError: the certificate cannot be used, or its private key is missing.
        """
        try:
            if self.ssl_certfile:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            elif self.ssl_keyfile:
                raise OSError("it is missing; --ssl-keyfile needs it")
        except OSError as error:  # includes ssl.SSLError
            raise OSError(f"cannot serve https with --ssl-certfile: {error}") from error


def read_settings(kind: type[AnySettings], arguments: list[str]) -> AnySettings:
    """Reads the settings from arguments and environment; exits with a message if one is invalid."""
    try:
        return CliApp.run(kind, cli_args=arguments)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        reason = first["msg"].removeprefix("Value error, ")
        sys.exit(f"error: {option} {first['input']!r}: {reason}")


def _read_keys(path: Path) -> Iterator[SecretStr]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise OSError(f"cannot read --api-key-file {path}: {reason}") from error
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        # An open server is not what was meant.
        raise OSError(f"there is no key in --api-key-file {path}")
    return map(SecretStr, keys)
