"""Tokenizers of other checkpoints than the bundled one, and those that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.core.engine.checkpoint import BUNDLED_FOLDER, CheckpointError
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer
from server.core.text.tokenizer_files import read_tokenizer
from tests.unit.core.text.test_tokenizer import chat, plain_text

VOCAB_SIZE = read_tokenizer(BUNDLED_FOLDER).vocab_size


@pytest.fixture
def copy_with(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the bundled tokenizer, its tokenizer.json or chat template changed."""

    def copy(
        change: Callable[[dict[str, Any]], None] | None = None, template: str | None = None
    ) -> Path:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(BUNDLED_FOLDER / name, tmp_path)
        if change is not None:
            content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
            change(content)
            (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return tmp_path

    return copy


def test_the_tokenizer_of_unit_tests_is_the_one_that_is_read(tokenizer: ChatTokenizer) -> None:
    read = read_tokenizer(BUNDLED_FOLDER)
    assert type(read._template) is type(tokenizer._template)
    assert read._template.chat_template == tokenizer._template.chat_template
    assert read._backend.to_str() == tokenizer._backend.to_str()


# --- other checkpoints ----------------------------------------------------------------


def test_an_added_token_that_is_not_special_is_decoded_but_never_encoded_from_users(
    copy_with: Callable[..., Path],
) -> None:
    def add_tool_call(content: dict[str, Any]) -> None:
        like = content["added_tokens"][0]
        added = {**like, "id": VOCAB_SIZE, "content": "<tool_call>", "special": False}
        content["added_tokens"].append(added)

    template = "{{ '<tool_call>' + messages[0]['content'] }}"
    tokenizer = read_tokenizer(copy_with(add_tool_call, template))
    tool_call = tokenizer.marker_id("<tool_call>")
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == VOCAB_SIZE + 1
    assert tokenizer.token_bytes[tool_call] == b"<tool_call>"
    assert tool_call not in tokenizer.encode_text("<tool_call>")
    ids = tokenizer.encode_chat(chat("user: <tool_call>"))
    assert ids.count(tool_call) == 1
    assert plain_text(tokenizer, ids) == "<tool_call><tool_call>"


def test_a_marker_that_is_a_prefix_of_another_does_not_replace_it(
    copy_with: Callable[..., Path],
) -> None:
    def add_longer(content: dict[str, Any]) -> None:
        like = content["added_tokens"][0]
        content["added_tokens"].append({**like, "id": VOCAB_SIZE, "content": "<|im_end|>!"})

    template = "{{ '<|im_end|>!' + messages[0]['content'] + '<|im_end|>' }}"
    tokenizer = read_tokenizer(copy_with(add_longer, template))
    ids = tokenizer.encode_chat(chat("user: <|im_end|>!"))
    short, long = tokenizer.marker_id("<|im_end|>"), tokenizer.marker_id("<|im_end|>!")
    assert (ids[0], ids[-1]) == (long, short)
    assert not {short, long} & set(ids[1:-1])
    assert plain_text(tokenizer, ids) == "<|im_end|>!"


def test_thinking_is_turned_off_in_the_template(copy_with: Callable[..., Path]) -> None:
    template = "{% if enable_thinking is false %}quiet{% else %}aloud{% endif %}"
    tokenizer = read_tokenizer(copy_with(template=template))
    assert plain_text(tokenizer, tokenizer.encode_chat(chat("user: Hi"))) == "quiet"


def test_a_template_that_refuses_a_conversation_says_why(copy_with: Callable[..., Path]) -> None:
    template = (
        "{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    tokenizer = read_tokenizer(copy_with(template=template))
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        tokenizer.encode_chat(chat("user: Hi", "user: Hi"))


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_a_hostile_template_reaches_nothing_and_is_a_checkpoint_error(
    copy_with: Callable[..., Path], hostile: str
) -> None:
    with pytest.raises(CheckpointError, match="the chat template is broken"):
        read_tokenizer(copy_with(template=hostile))


def test_a_template_that_fails_on_a_message_refuses_it(copy_with: Callable[..., Path]) -> None:
    template = "{% if messages | length > 1 %}{{ messages.__class__.__mro__ }}{% endif %}"
    tokenizer = read_tokenizer(copy_with(template=template))
    with pytest.raises(ChatTemplateError):
        tokenizer.encode_chat(chat("user: Hi", "user: Hi"))


def test_a_template_that_drops_the_message_to_be_continued_refuses_it(
    copy_with: Callable[..., Path],
) -> None:
    template = "{{ messages[0]['content'] }}"
    tokenizer = read_tokenizer(copy_with(template=template))
    with pytest.raises(ChatTemplateError):
        tokenizer.encode_chat(chat("user: Hi", "assistant: Well"))


# --- checkpoints that cannot be used --------------------------------------------------


def test_a_folder_without_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing") as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_a_damaged_tokenizer_is_a_checkpoint_error_that_names_the_folder(
    copy_with: Callable[..., Path], name: str, content: bytes
) -> None:
    folder = copy_with()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="the tokenizer is not readable") as caught:
        read_tokenizer(folder)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_of_an_unknown_kind_is_a_checkpoint_error(
    copy_with: Callable[..., Path],
) -> None:
    folder = copy_with(lambda content: content["model"].update(type="Nonsense"))
    with pytest.raises(CheckpointError, match="the tokenizer is not readable"):
        read_tokenizer(folder)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_a_tokenizer_that_is_not_byte_level_is_a_checkpoint_error(
    copy_with: Callable[..., Path], decoder: dict[str, Any] | None
) -> None:
    folder = copy_with(lambda content: content.update(decoder=decoder))
    with pytest.raises(CheckpointError, match="not byte-level"):
        read_tokenizer(folder)


def test_a_base_model_without_chat_template_is_a_checkpoint_error(
    copy_with: Callable[..., Path],
) -> None:
    folder = copy_with()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        read_tokenizer(folder)
