"""Adapters that cannot be used: one sentence each, naming what is wrong."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.model.adapter_weights import LoraWeights, read_adapter
from server.core.engine.model.config import ModelConfig

SHAPE = ModelConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000,
    max_position_embeddings=128,
    is_tied=True,
    has_qk_norm=False,
    has_qkv_bias=True,
    has_out_bias=False,
)
Q_PROJ = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def write(folder: Path, config: object, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Changes the queries of both layers."""
    torch.manual_seed(0)
    shapes = {"A": (4, 32), "B": (32, 4)}
    tensors = {
        Q_PROJ.format(layer, matrix): torch.randn(shape)
        for layer in range(2)
        for matrix, shape in shapes.items()
    }
    return write(tmp_path / "lora", LORA, tensors)


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    return write(tmp_path / "prompt", config, {"prompt_embeddings": torch.randn(3, 32)})


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    return write(tmp_path / "prefix", config, {"prompt_embeddings": torch.randn(3, 2 * 2 * 16)})


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
        path.write_text(json.dumps(config), encoding="utf-8")

    return change


def without_config(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        del config[name]
        path.write_text(json.dumps(config), encoding="utf-8")

    return change


def with_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """None removes the tensor."""

    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {**load_file(path), **changes}
        save_file({name: each for name, each in tensors.items() if each is not None}, path)

    return change


def with_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


WRONG_LORAS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("adapter_config.json"), "holds no adapter of peft"),
    "no weights": (without("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
    "a pickle": (pickled, "adapter_model.bin is a pickle.* save it again"),
    "truncated": (truncated, "damaged or incomplete.*copy or download"),
    "no safetensors": (with_bytes("adapter_model.safetensors", b"\xff" * 64), "damaged"),
    "no JSON": (with_bytes("adapter_config.json", b"{"), "not readable"),
    "no text": (with_bytes("adapter_config.json", b"\xff\xfe\xff"), "not readable"),
    "a list": (with_bytes("adapter_config.json", b"[]"), "not readable"),
    "no kind": (without_config("peft_type"), "not readable.*peft_type"),
    "another kind": (with_config(peft_type="IA3"), "type 'IA3'; this server runs LORA"),
    "kind no name": (with_config(peft_type=["LORA"]), "not readable"),
    "no rank": (without_config("r"), "r: Field required"),
    "rank 0": (with_config(r=0), "r: "),
    "another rank": (with_config(r=8), r"q_proj.lora_A.weight' has shape \[4, 32\], not \[8, 32\]"),
    "rank by pattern": (with_config(rank_pattern={"q_proj": 2}), r"not \[2, 32\]"),
    "bad pattern": (with_config(rank_pattern={"(": 2}), "not a regular expression"),
    "bad targets": (with_config(target_modules="("), "not a regular expression"),
    "DoRA": (with_config(use_dora=True), "use_dora True is not supported.*merge it"),
    "bias": (with_config(bias="all"), "bias 'all' is not supported"),
    "bias of LoRA": (with_config(lora_bias=True), "lora_bias"),
    "modules to save": (with_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "fan in fan out": (with_config(fan_in_fan_out=True), "fan_in_fan_out"),
    "of the future": (with_config(twist=0.5), "twist 0.5 is not supported"),
    "PiSSA": (with_config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    "head": (with_config(target_modules=["q_proj", "lm_head"]), "target module 'lm_head'"),
    "nothing": (with_config(target_modules=".*experts.*"), "target module '.*experts"),
    "fewer layers": (
        with_config(target_modules=["q_proj", "k_proj"]), "lacks 'base_model.*k_proj",
    ),
    "more layers": (
        with_tensors(**{Q_PROJ.format(2, "A"): torch.ones(4, 32)}), "layers.2.*has no place in it",
    ),
    "a layer beyond": (with_config(layers_to_transform=[0, 1, 7]), "no 'model.layers.7"),
    "a half": (with_tensors(**{Q_PROJ.format(1, "B"): None}), "lacks 'base_model.*lora_B"),
    "other model": (
        with_config(base_model_name_or_path="x/big", r=16),
        "made for 'x/big' does not fit this model",
    ),
    "integers": (
        with_tensors(**{Q_PROJ.format(0, "A"): torch.ones(4, 32, dtype=torch.int8)}),
        "does not consist of finite floats",
    ),
    "infinite": (
        with_tensors(**{Q_PROJ.format(0, "A"): torch.full((4, 32), math.inf)}), "finite floats",
    ),
}  # fmt: skip


def assert_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_adapter("own", folder, SHAPE)
    message = str(caught.value)
    assert re.search(pattern, message)
    assert str(folder) in message and "\n" not in message


@pytest.mark.parametrize("what", WRONG_LORAS)
def test_a_lora_that_cannot_be_used_is_one_clear_sentence(lora: Path, what: str) -> None:
    damage, pattern = WRONG_LORAS[what]
    damage(lora)
    assert_refused(lora, pattern)


WRONG_PROMPTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no number": (without_config("num_virtual_tokens"), "num_virtual_tokens: Field required"),
    "another number": (with_config(num_virtual_tokens=4), r"shape \[3, \d+\], not \[4, \d+\]"),
    "another size": (with_tensors(prompt_embeddings=torch.ones(3, 31)), r"shape \[3, 31\]"),
    "no tensor": (with_tensors(prompt_embeddings=None, x=torch.ones(1)), "lacks 'prompt_emb"),
    "one too many": (with_tensors(x=torch.ones(1)), "'x' has no place in it"),
    "modules to save": (with_config(modules_to_save=["score"]), "modules_to_save"),
}


@pytest.mark.parametrize("what", WRONG_PROMPTS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_that_cannot_be_used_are_one_clear_sentence(
    request: pytest.FixtureRequest, kind: str, what: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    damage, pattern = WRONG_PROMPTS[what]
    damage(folder)
    assert_refused(folder, pattern)


def test_a_folder_that_is_not_there_is_one_clear_sentence(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "there is no folder")


@pytest.mark.parametrize(
    "targets",
    [
        ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        ["self_attn.q_proj"],
        r".*\.q_proj",
    ],
)
def test_targets_are_paths_ends_of_paths_or_one_regex(lora: Path, targets: object) -> None:
    with_config(target_modules=targets)(lora)
    weights = read_adapter("own", lora, SHAPE).weights
    assert isinstance(weights, LoraWeights)
    assert list(weights.matrices) == [(0, "q_proj"), (1, "q_proj")]


def test_the_digest_changes_with_either_file(lora: Path) -> None:
    def digest() -> str:
        return read_adapter("own", lora, SHAPE).adapter.digest

    digests = [digest()]
    for change in (
        with_config(lora_alpha=9),
        with_tensors(**{Q_PROJ.format(0, "A"): torch.ones(4, 32)}),
    ):
        change(lora)
        digests.append(digest())
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 2}}, 2.0),
        ({"init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_the_scale_is_what_peft_makes_of_the_config(
    lora: Path, changes: dict[str, object], scale: float
) -> None:
    with_config(**changes)(lora)
    weights = read_adapter("own", lora, SHAPE).weights
    assert isinstance(weights, LoraWeights)
    stored = load_file(lora / "adapter_model.safetensors")[Q_PROJ.format(0, "B")]
    torch.testing.assert_close(weights.matrices[0, "q_proj"][1], stored * scale)
