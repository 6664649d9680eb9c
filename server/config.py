"""Every setting, its default and its help text, once."""

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

# Longer than clients and proxies keep an idle connection (httpx 5 s, nginx 60 s): whoever asks
# again just as the server hangs up gets a reset instead of an answer.
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
        # As from an environment variable that is not set: nobody means an open server by it.
        raise ValueError("there is no key in it; leave the option out to let everybody in")
    return keys


def _adapters(value: Any) -> Any:
    """Each as `NAME=FOLDER`."""
    pairs, seen = _split(value), set[str]()
    for pair in pairs:
        name, _, folder = str(pair).partition("=")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not folder:
            raise ValueError(f"{pair!r} is not NAME=FOLDER, with a name of A-Z, a-z, 0-9, . _ -")
        if name == "plain":
            raise ValueError("the name 'plain' is taken: it asks for a chat without sentiment")
        if name in seen:
            raise ValueError(f"the name {name!r} is given twice")
        seen.add(name)
    return pairs


def _engine_url(url: str | None) -> str | None:
    """Without what a base URL of OpenAI's has behind it."""
    if url is None:
        return None
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
        raise ValueError("it is not http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


# NAME=FOLDER, several.
AdapterFolders = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_adapters)]


class ModelSettings(BaseSettings):
    """Which model is loaded, as what, and with which tasks."""

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
        "the bundled model where it cannot be had",
    )
    revision: str | None = Field(
        None,
        description="commit, branch or tag of a model of the hub; default: the newest, but of "
        "'auto' always the same commit",
    )
    adapter: AdapterFolders = Field(
        (),
        description="NAME=FOLDER of a peft adapter (LoRA, prompt, prefix), which a chat chooses by "
        "the model id with :NAME behind it, and a task by its file; several: give it again, or put "
        "commas between",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        "auto",
        description="type of the weights; 'auto': int8 for a large model, float32 for a small one",
    )
    num_threads: PositiveInt | None = Field(
        None, description="CPU threads of the model; default: the physical cores"
    )
    max_context: PositiveInt | None = Field(
        None,
        description="context length in tokens; default: the model's, at most three quarters of "
        "--max-kv-mib",
    )
    max_kv_mib: PositiveInt = Field(
        2048, description="memory for the tokens of running sequences, in MiB; the others wait"
    )
    tasks: Path | None = Field(
        None,
        description="TOML file of tasks to add, or to replace built-in ones by name; or the folder "
        "that fit wrote",
    )
    cache_dir: Path | None = Field(
        None,
        description="folder for judges fitted to a model; default: ~/.cache/qwen-all-in-one",
    )


class Settings(ModelSettings):
    """An OpenAI-compatible server on one small Qwen that reads the mood, then answers.

    `fit --help`: how it learns a task from your own labelled texts.
    """

    model_config = SettingsConfigDict(cli_prog_name="qwen-all-in-one")

    engine: Annotated[str | None, AfterValidator(_engine_url)] = Field(
        None,
        description="http://HOST:PORT of a vLLM, or of another server like this one, that computes "
        "in place of this process; --model then names the same checkpoint, of which no weights are "
        "read",
    )
    engine_key: SecretStr | None = Field(None, description="key that --engine wants")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="port, 0 for a free one")
    check: bool = Field(False, description="load the model, answer one request and exit")
    ui: bool = Field(True, description="serve the page at /, where Gradio is installed; or --no-ui")
    max_num_seqs: PositiveInt = Field(
        16, description="requests computed together, and sequences that decode in one step"
    )
    max_num_batched_tokens: Annotated[int, Field(ge=2)] = Field(
        256,
        description="tokens computed in one step, of prompts, labels and answers; an eighth of "
        "them in a step that several requests share",
    )
    max_draft_tokens: Annotated[int, Field(ge=0, le=7)] = Field(
        3,
        description="next tokens that are guessed from the text so far and checked in one step of "
        "at most 8; in int8 and int4, without a LoRA; changes no text; 0: off",
    )
    max_queue: Annotated[int, Field(ge=0)] = Field(
        64, description="requests that may wait beyond --max-num-seqs; the next ones get a 429"
    )
    request_timeout: Annotated[float, Field(gt=0)] = Field(
        600.0, description="seconds a request may take, waiting included"
    )
    grace_period: Annotated[float, Field(ge=0)] = Field(
        30.0, description="seconds that running requests have to finish when the server is stopped"
    )
    max_prefix_mib: Annotated[int, Field(ge=0)] = Field(
        512, description="memory for computed prompts that later ones may begin with, in MiB"
    )
    persona: str | None = Field(
        None,
        description="system prompt of a chat that brings none of its own, whatever its language; "
        "default: the task file's",
    )
    sentiment_cache_size: Annotated[int, Field(ge=0)] = Field(
        4096, description="results of sentiment and other tasks kept, 0 for none"
    )
    max_body_bytes: PositiveInt = Field(4 * 1024 * 1024, description="largest request body read")
    api_key: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_keys)] = Field(
        (), description="key clients must send; several: give it again, or put commas between"
    )
    api_key_file: Path | None = Field(None, description="file of more such keys, one a line")
    cors_origin: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="origin whose pages may call from a browser, '*' for all; several as keys"
    )
    allowed_host: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="name by which a reverse proxy on this machine may ask a server on loopback "
        "that has no key; several as keys",
    )
    ssl_certfile: Path | None = Field(
        None, description="certificate chain (PEM), to be reached by https"
    )
    ssl_keyfile: Path | None = Field(
        None, description="its private key (PEM), unless --ssl-certfile holds it too"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="lines for people, or one JSON object a line with the request's id"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="how much is logged"
    )

    @property
    def scheme(self) -> Literal["http", "https"]:
        """What the server speaks, whatever stands before it."""
        return "https" if self.ssl_certfile else "http"

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or where the XDG base directory specification has a user's caches."""
        if self.cache_dir is not None:
            return self.cache_dir
        try:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # the user has no home
            base = Path(tempfile.gettempdir())
        return base / "qwen-all-in-one"

    @property
    def adapters(self) -> dict[str, Path]:
        """Folders by the names of the adapters in them."""
        pairs = (pair.partition("=") for pair in self.adapter)
        return {name: Path(folder).expanduser() for name, _, folder in pairs}

    @cached_property
    def keys(self) -> tuple[SecretStr, ...]:
        """All keys, those of the file included; it is read once.

        Raises:
            OSError: the file cannot be read, or has no key in it.
        """
        return (*self.api_key, *(_read_keys(self.api_key_file) if self.api_key_file else ()))

    def check_certificate(self) -> None:
        """Reads the certificate early: nobody should wait for a model to learn that it is wrong.

        Raises:
            OSError: it cannot be used, or the key to it is missing.
        """
        try:
            if self.ssl_certfile:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            elif self.ssl_keyfile:
                raise OSError("it is missing, --ssl-keyfile needs it")
        except OSError as error:  # ssl's errors, too
            raise OSError(f"cannot serve https by --ssl-certfile: {error}") from error


def read_settings(kind: type[AnySettings], arguments: list[str]) -> AnySettings:
    """From the arguments of the command and the environment; ends it with one sentence else."""
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
        # Nobody means an open server by it.
        raise OSError(f"there is no key in --api-key-file {path}")
    return map(SecretStr, keys)
