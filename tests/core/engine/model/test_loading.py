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
from server.core.engine.checkpoint import CheckpointError
from server.core.engine.generation_config import read_generation_defaults
from server.core.engine.model import load_runner
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.runner import ModelRunner
from server.core.roles.task_files import read_task_file
from server.core.text.tokenizer import ChatTokenizer
from server.loading import MIN_EXTRACT_ROOM, find_model, load_services


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


def write(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(content)

    return change


def change_generation(**changes: object) -> Callable[[Path], None]:
    return write("generation_config.json", json.dumps({"eos_token_id": 2, **changes}))


def quantize_a_tensor(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")

    return change


def drop_all_eos(folder: Path) -> None:
    change_generation(eos_token_id=None)(folder)
    change_config(eos_token_id=None)(folder)


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


def write_index(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        drop_weights(folder)
        (folder / "model.safetensors.index.json").write_text(content)

    return change


def refuse_answers(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    refusal = "{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
    path.write_text(f"{{% for m in messages %}}{refusal}{{% endfor %}}{path.read_text()}")


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
    (
        write(
            "chat_template.jinja",
            "{% for m in messages %}{% if m.role == 'system' %}"
            "{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}",
        ),
        "refuses the prompt of the task 'sentiment': no system",
    ),
    (drop_config, "config.json is missing"),
    (write("config.json", "null"), "config.json is not readable"),
    (write("config.json", "{"), "config.json is not readable"),
    *(
        (change_config(**change), "config.json")
        for change in (
            {"hidden_size": "abc"},
            {"hidden_size": 0},
            {"num_hidden_layers": None},
            {"num_hidden_layers": 0},
            {"num_attention_heads": 0},
            {"num_attention_heads": 3},
            {"num_key_value_heads": 0},
            {"max_position_embeddings": "a"},
            {"rms_norm_eps": "a"},
            {"rms_norm_eps": -1.0},
            {"rope_parameters": "x"},
        )
    ),
    (change_config(quantization_config={"quant_method": "fp8"}), "quantized already (fp8)"),
    (quantize_a_tensor(torch.float8_e4m3fn), "is of type F8_E4M3"),
    (quantize_a_tensor(torch.int8), "is of type I8"),
    (write_index("[]"), "index.json is not readable"),
    (write_index('{"weight_map": {"a": 3}}'), "index.json is not readable"),
    *(
        (write("generation_config.json", content), "generation_config.json is not readable")
        for content in ("{", "[]", "\0")
    ),
    (change_generation(do_sample=True, temperature="hot"), "generation_config.json"),
    (change_generation(top_p=1.5), "generation_config.json"),
    (change_generation(top_k="a"), "generation_config.json"),
    (change_generation(eos_token_id="x"), "eos_token_id"),
    (change_generation(eos_token_id=[[2]]), "eos_token_id"),
    (change_generation(eos_token_id=999_999), "an eos_token_id of [999999] is not one of"),
    (refuse_answers, "template refuses the prompt of the task 'keywords': no answers"),
    (drop_all_eos, "neither generation_config.json nor config.json names an eos_token_id"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason[:40] for _, reason in DAMAGES])
def test_a_damaged_checkpoint_is_one_clear_sentence(
    copy: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(copy)
    with pytest.raises(CheckpointError) as error:
        load_services(Settings(model=str(copy)))
    message = str(error.value)
    assert reason in message
    assert "\n" not in message


def test_eos_ids_are_read_from_either_file(copy: Path) -> None:
    change_config(eos_token_id=[2, 3])(copy)
    change_generation(eos_token_id=None, top_k=7)(copy)
    defaults = read_generation_defaults(copy)
    assert defaults.eos_token_ids == {2, 3} and defaults.top_k == 7
    (copy / "generation_config.json").unlink()
    assert read_generation_defaults(copy).eos_token_ids == {2, 3}


@pytest.mark.parametrize("is_short", [False, True])
def test_an_instruction_that_leaves_no_room_for_text_is_one_clear_sentence(
    tiny_checkpoint: Path, tmp_path: Path, is_short: bool
) -> None:
    long = tmp_path / "tasks.toml"
    labels = '[{value = "a", text = "a"}, {value = "b", text = "b"}]'
    long.write_text(f'[long]\ninstructions = "{"word " * 3000}"\nlabels = {labels}\n')
    settings = Settings(
        model=str(tiny_checkpoint), **({"max_context": 10} if is_short else {"tasks": long})
    )
    with pytest.raises(CheckpointError, match=r"the instruction of the task .* leaves no room"):
        load_services(settings)


def test_a_task_that_extracts_needs_room_for_a_sentence_in_either_language(
    tiny_checkpoint: Path, tokenizer: ChatTokenizer
) -> None:
    task = read_task_file().extract_tasks["keywords"]
    longest = max(len(tokenizer.encode_chat(task.messages(text))) for text in ("a", "我"))
    least = longest + MIN_EXTRACT_ROOM
    model = str(tiny_checkpoint)
    assert find_model(Settings(model=model, max_context=least)).max_context == least
    with pytest.raises(CheckpointError, match=r"task 'keywords' leave no room for a sentence in"):
        find_model(Settings(model=model, max_context=least - 1))


def test_labels_of_a_task_file_that_are_too_long_are_one_clear_sentence(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tasks.toml"
    labels = ", ".join(f'{{value = "{i}", text = "{i}{"长" * 700}"}}' for i in range(2))
    file.write_text(f'[long]\ninstructions = "Which?"\nlabels = [{labels}]\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the task 'long' .* at most 1024"):
        load_services(Settings(model=str(tiny_checkpoint), tasks=file))


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
            [[hidden]] = model.forward([Segment([5, 6], [0, 1], cache)])
        return hidden

    assert torch.equal(hidden(whole), hidden(sharded))


def test_rows_of_8_bit_integers_with_scales_are_dequantized(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    rounded, stored = dict(tensors), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            scales = tensor.float().abs().amax(1).clamp_min(1e-12) / 127
            integers = (tensor.float() / scales[:, None]).round()
            rounded[name] = integers * scales[:, None]
            stored |= {name: integers.to(torch.int8), f"{name}.scales": scales}
        else:
            stored[name] = tensor
    config = read_model_config(copy)

    def hidden() -> Tensor:
        model, cache = load_qwen(copy, config, "float32"), KVCache()
        assert model.new_memory(max_tokens=128, max_context=128).reserve(cache, 2)
        with torch.inference_mode():
            [[hidden]] = model.forward([Segment([5, 6], [0, 1], cache)])
            return model.logits(hidden)

    save_file(rounded, copy / "model.safetensors")
    whole = hidden()
    save_file(stored, copy / "model.safetensors")
    assert torch.allclose(hidden(), whole, atol=1e-5)


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
    """OpenMP's helpers of another living thread would slow the engine's down."""
    loaded_on: list[threading.Thread] = []

    def load_and_record(*args: Any, **kwargs: Any) -> ModelRunner:
        loaded_on.append(threading.current_thread())
        return load_runner(*args, **kwargs)

    monkeypatch.setattr("server.loading.load_runner", load_and_record)
    load_services(Settings(model=str(tiny_checkpoint))).engine.close()
    [thread] = loaded_on
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


class Terminal(io.StringIO):
    """A stream to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_terminal_shows_the_progress_of_loading_and_a_log_does_not(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    shown = {}
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        load_qwen(tiny_checkpoint, read_model_config(tiny_checkpoint), dtype)
        shown[stderr.isatty()] = stderr.getvalue()
    assert "loading" in shown[True] and "0/2" in shown[True]
    # The line is cleared at the end.
    assert not shown[True].rpartition("\r")[0].rpartition("\r")[2].strip()
    assert shown[False] == ""
