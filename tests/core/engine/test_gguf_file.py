"""The metadata of a GGUF, and files that cannot be served: one sentence each."""

import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import pytest

from server.config import Settings
from server.core.engine.checkpoint import CheckpointError, find_checkpoint
from server.core.engine.generation_config import read_generation_defaults
from server.core.engine.gguf_file import read_gguf
from server.core.engine.model.config import read_model_config
from server.loading import load_services
from tests.gguf_files import write_gguf


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_checkpoint)
    return path


def truncate(num_bytes: int) -> Callable[[Path], None]:
    """num_bytes: to keep or, if negative, to drop."""

    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:num_bytes])

    return change


def set_version(version: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate(4), "damaged or incomplete"),
        (truncate(60), "damaged or incomplete"),
        (truncate(100_000), "damaged or incomplete"),
        (truncate(-1), "damaged or incomplete (it ends before "),
        (set_version(1), "is a GGUF of version 1; this server reads versions 2 and 3"),
        (truncate(3), "is a file; give the folder of a checkpoint, or a GGUF"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_file_is_one_clear_sentence(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    path = Path(shutil.copy(whole, tmp_path))
    damage(path)
    assert reason in refusal(path)


def test_a_big_endian_file_is_one_clear_sentence(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    write_gguf(path, tiny_checkpoint, byte_order=gguf.GGUFEndian.BIG)
    assert "is a big-endian GGUF" in refusal(path)


Change = Callable[[gguf.GGUFWriter], Any]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.add_string("general.architecture", "llama"), "holds a 'llama' model"),
        (lambda w: w.add_string("general.architecture", "qwen2moe"), "holds a 'qwen2moe' model"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts of a GGUF"),
        (lambda w: w.add_head_count(3), "the metadata is not readable"),
        (lambda w: w.add_string("qwen2.block_count", "x"), "the metadata is not readable"),
        (lambda w: w.add_layer_norm_rms_eps(-1.0), "the metadata: rms_norm_eps"),
        (
            lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                       w.add_rope_scaling_factor(4.0)),
            "RoPE scaling 'yarn' is not supported",
        ),
        (lambda w: w.add_tokenizer_model("llama"), "the tokenizer is of kind 'llama', 'qwen2'"),
        (lambda w: w.add_tokenizer_pre("llama-bpe"), "is of kind 'gpt2', 'llama-bpe'"),
        (lambda w: w.add_token_merges(["a b c"]), "the tokenizer is not readable"),
        (lambda w: w.add_token_list(["a", "a"]), "two tokens have the same text"),
        (lambda w: w.add_chat_template("{% for %}"), "the chat template is broken"),
        (lambda w: w.add_sampling_top_p(1.5), "the metadata: top_p"),
        (lambda w: w.add_eos_token_id(999_999), "is not one of the model's"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_served_are_one_clear_sentence(
    tiny_checkpoint: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    path = tmp_path / "tiny.gguf"

    def replace(writer: gguf.GGUFWriter) -> None:
        other = gguf.GGUFWriter(None, "qwen2")
        change(other)
        writer.kv_data[0] |= other.kv_data[0]

    write_gguf(path, tiny_checkpoint, change=replace)
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("general.architecture", "the metadata lack 'general.architecture'"),
        ("qwen2.block_count", "the metadata lack 'qwen2.block_count'"),
        ("tokenizer.ggml.tokens", "has no tokenizer"),
        ("tokenizer.ggml.merges", "the metadata lack 'tokenizer.ggml.merges'"),
        ("tokenizer.chat_template", "has no chat template"),
        ("token_embd.weight", "the weights lack 'token_embd.weight'"),
        ("blk.1.ffn_up.weight", "the weights lack 'blk.1.ffn_up.weight'"),
    ],
)
def test_a_missing_key_or_tensor_is_named(
    tiny_checkpoint: Path, tmp_path: Path, key: str, reason: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_checkpoint, without=(key,))
    assert reason in refusal(path)


def refusal(path: Path) -> str:
    """The error of a model that cannot be served."""
    with pytest.raises(CheckpointError) as error:
        load_services(Settings(model=str(path)))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_id_is_the_name_of_the_file_and_the_shape_is_that_of_the_folder(
    whole: Path, tiny_checkpoint: Path
) -> None:
    found = find_checkpoint(str(whole))
    assert (found.model_id, found.path) == ("tiny", whole)
    # The file has its numbers in float32.
    expected = pytest.approx(asdict(read_model_config(tiny_checkpoint)))
    assert asdict(read_model_config(read_gguf(whole))) == expected


def test_a_reply_ends_at_the_named_stop_token_and_at_both_markers_of_qwen(whole: Path) -> None:
    defaults = read_generation_defaults(read_gguf(whole))
    assert defaults.eos_token_ids == {0, 2}
    assert defaults.temperature == 0


def test_sampling_parameters_of_a_file_are_the_defaults(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def recommend(writer: gguf.GGUFWriter) -> None:
        writer.add_sampling_temp(0.5)
        writer.add_sampling_top_k(7)
        writer.add_sampling_penalty_repeat(1.25)

    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_checkpoint, change=recommend)
    defaults = read_generation_defaults(read_gguf(path))
    found = (defaults.temperature, defaults.top_k, defaults.repetition_penalty, defaults.top_p)
    assert found == (0.5, 7, 1.25, 1.0)


def test_a_file_without_any_stop_token_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.token_type")
    write_gguf(path, tiny_checkpoint, without=keys)
    with pytest.raises(CheckpointError, match="nothing in the metadata names an eos_token_id"):
        read_generation_defaults(read_gguf(path))
