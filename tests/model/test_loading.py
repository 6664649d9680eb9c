"""Checkpoints that cannot be served: one sentence each, naming what is wrong."""

import io
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.config import Settings
from server.core.checkpoint import CheckpointError
from server.core.model import load_runner
from server.core.model.attention import Segment
from server.core.model.config import read_model_config
from server.core.model.kv_cache import KVCache
from server.core.model.qwen import QwenModel, load_qwen
from server.core.model.runner import ModelRunner
from server.loading import load_services


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_index(folder: Path) -> None:
    drop_weights(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate_weights, "damaged or incomplete"),
    (damage_header, "damaged or incomplete"),
    (drop_weights, "has no weights"),
    (drop_a_tensor, "lack 'model.layers.1.mlp.up_proj.weight'"),
    (change_config(hidden_size=40), "has shape"),
    (change_config(model_type="llama"), "'llama'"),
    (change_config(model_type="no-such-model"), "config.json"),
    (change_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "RoPE scaling"),
    (
        change_config(
            use_sliding_window=True, sliding_window=64, max_window_layers=0, layer_types=None
        ),
        "sliding-window",
    ),
    (drop_tokenizer, "has no tokenizer"),
    (damage_tokenizer, "tokenizer is not readable"),
    (drop_template, "no chat template"),
    (break_template, "chat template is broken"),
    (drop_config, "config.json"),
    (damage_index, "index.json is not readable"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES, ids=lambda value: str(value)[:40])
def test_a_damaged_checkpoint_is_one_clear_sentence(
    copy: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(copy)
    with pytest.raises(CheckpointError) as error:
        load_services(Settings(model=str(copy)))
    message = str(error.value)
    assert says in message
    assert "\n" not in message


def test_sharded_weights_are_read_like_a_single_file(copy: Path) -> None:
    whole = load_qwen(copy, read_model_config(copy), "float32")
    model = AutoModelForCausalLM.from_pretrained(copy)
    drop_weights(copy)
    model.save_pretrained(copy, max_shard_size="200KB")
    assert (copy / "model.safetensors.index.json").exists()
    sharded = load_qwen(copy, read_model_config(copy), "float32")

    def hidden(model: QwenModel) -> Tensor:
        cache = KVCache()
        assert model.new_memory(max_tokens=128, max_context=128).reserve(cache, 2)
        with torch.inference_mode():
            return model.forward([Segment([5, 6], [0, 1], cache)])[0]

    assert torch.equal(hidden(whole), hidden(sharded))


def test_a_context_that_memory_cannot_hold_is_one_clear_sentence(tiny_checkpoint: Path) -> None:
    settings = Settings(model=str(tiny_checkpoint), max_context=512, max_kv_mib=1)
    load_services(settings).engine.close()
    with pytest.raises(CheckpointError, match="a context of 512 tokens does not fit --max-kv-mib"):
        load_services(settings.model_copy(update={"max_kv_mib": 0}))


def test_int4_refuses_matrices_it_cannot_group(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="use --dtype int8"):
        load_services(Settings(model=str(tiny_checkpoint), dtype="int4"))


def test_the_model_is_loaded_on_a_thread_that_ends(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP's helpers of any other thread would slow the engine's down."""
    loaded_on: list[threading.Thread] = []

    def load_and_note(*args: Any, **kwargs: Any) -> ModelRunner:
        loaded_on.append(threading.current_thread())
        return load_runner(*args, **kwargs)

    monkeypatch.setattr("server.loading.load_runner", load_and_note)
    load_services(Settings(model=str(tiny_checkpoint))).engine.close()
    [thread] = loaded_on
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_terminal_shows_how_far_the_loading_is_and_a_log_does_not(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    shown = {}
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        load_qwen(tiny_checkpoint, read_model_config(tiny_checkpoint), dtype)
        shown[stderr.isatty()] = stderr.getvalue()
    assert "loading" in shown[True] and "0/2" in shown[True]
    # And it wipes the line in the end.
    assert not shown[True].rpartition("\r")[0].rpartition("\r")[2].strip()
    assert shown[False] == ""
