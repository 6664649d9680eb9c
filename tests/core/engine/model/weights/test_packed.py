"""Matrices packed by GPTQ and AWQ, against the dequantized ones in transformers.

They are packed here as the formats are defined, integer by integer.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from server.core.engine.checkpoint import CheckpointError
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.weights import open_weights, reader

IDS = random.Random(0).choices(range(300), k=40)
# Column of each of the eight places of a word, from the lowest bits: AutoAWQ's `order_map`.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Case:
    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    is_symmetric: bool = False
    is_reordered: bool = False
    form: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        config = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        field = "version" if self.method == "awq" else "checkpoint_format"
        return config | ({field: self.form} if self.form else {})


CASES = [
    *(
        Case(method, group_size=size, is_symmetric=is_symmetric)
        for method in ("gptq", "awq")
        for size in (32, 64, 128, -1)
        for is_symmetric in (False, True)
    ),
    Case(is_reordered=True),
    Case(is_reordered=True, form="gptq"),
    Case(form="gptq_v2"),
    Case(bits=8, group_size=64),
    Case(bits=8, form="gptq_v2", is_symmetric=True),
    Case("awq", form="GEMM"),
]


def packed_words(integers: Tensor, bits: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """Packs neighbours of a row into words of 32 bits: (N, M) -> (N, M * bits / 32)."""
    per_word = 32 // bits
    words = torch.zeros(len(integers), integers.shape[1] // per_word, dtype=torch.int64)
    for place, column in enumerate(columns or range(per_word)):
        words |= integers[:, column::per_word].long() << bits * place
    return words.to(torch.int32)  # wraps round, as the highest bit is the sign


def pack(weight: Tensor, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """The stored tensors of a (C_out, C_in) matrix, and the dequantized matrix."""
    num_columns, top = weight.shape[1], 2**case.bits - 1
    size = num_columns if case.group_size == -1 else case.group_size
    groups = torch.arange(num_columns) // size
    if case.is_reordered:
        groups = groups[torch.randperm(num_columns)]
    num_groups = int(groups.max()) + 1
    low = torch.stack([weight[:, groups == g].amin(1) for g in range(num_groups)]).clamp(max=0)
    high = torch.stack([weight[:, groups == g].amax(1) for g in range(num_groups)]).clamp(min=0)
    if case.is_symmetric:
        scales = (torch.maximum(-low, high) * 2 / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        scales = ((high - low) / top).half().float()
        zeros = (-low / scales).round()
    # (C_in, C_out), as both formats have it.
    integers = (weight.T / scales[groups] + zeros[groups]).round().clamp(0, top)
    dequantized = ((integers - zeros[groups]) * scales[groups]).T
    stored = {"scales": scales.half()}
    if case.method == "awq":
        stored["qweight"] = packed_words(integers, 4, AWQ_COLUMNS)
        stored["qzeros"] = packed_words(zeros, 4, AWQ_COLUMNS)
        return stored, dequantized
    stored["qweight"] = packed_words(integers.T, case.bits).T.contiguous()
    # A zero of 0 is stored as the largest number, where one less is stored.
    stored_zeros = zeros if case.form == "gptq_v2" else (zeros - 1) % (top + 1)
    stored["qzeros"] = packed_words(stored_zeros, case.bits)
    stored["g_idx"] = groups.to(torch.int32)
    return stored, dequantized


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with sizes for the kernels, and for groups of 128 columns."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.3)
    folder = tmp_path_factory.mktemp("packed") / "original"
    model.save_pretrained(folder)
    return folder


def write(original: Path, folder: Path, case: Case) -> dict[str, Tensor]:
    """Writes the checkpoint with its layers' matrices packed; returns dequantized weights."""
    torch.manual_seed(2)
    folder.mkdir()
    stored: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, weights[name] = pack(tensor, case)
            prefix = name.removesuffix("weight")
            stored |= {f"{prefix}{part}": value for part, value in parts.items()}
        else:
            stored[name] = weights[name] = tensor
    save_file(stored, folder / "model.safetensors")
    write_config(original, folder, quantization_config=case.config)
    return weights


def write_config(original: Path, folder: Path, **changes: Any) -> None:
    config = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@torch.inference_mode()
def logits(model: QwenModel) -> Tensor:
    cache = KVCache()
    assert model.new_memory(max_tokens=128, max_context=128).reserve(cache, len(IDS))
    [[hidden]] = model.forward([Segment(IDS, range(len(IDS)), cache)])
    return model.logits(hidden)


def load(folder: Path, dtype: str = "float32") -> QwenModel:
    return load_qwen(folder, read_model_config(folder), dtype)


@torch.inference_mode()
def expected(original: Path, weights: dict[str, Tensor]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    model.load_state_dict(weights)
    theirs: Tensor = model(torch.tensor([IDS])).logits[0]
    return theirs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_those_of_transformers_with_the_dequantized_weights(
    original: Path, tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than one block for each matrix.
    monkeypatch.setattr(reader, "BLOCK_ROWS", 48)
    weights = write(original, tmp_path / "packed", case)
    theirs = expected(original, weights)
    ours = logits(load(tmp_path / "packed"))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("case", [Case(), Case("awq", group_size=128)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.05), ("int4", 0.2)])
def test_packed_matrices_are_quantized_again(
    original: Path, tmp_path: Path, case: Case, dtype: str, bound: float
) -> None:
    theirs = expected(original, write(original, tmp_path / "packed", case))
    error = logits(load(tmp_path / "packed", dtype)) - theirs
    assert error.square().mean() < bound**2 * theirs.square().mean()


def test_a_quantize_config_of_autogptqs_first_versions_is_read(
    original: Path, tmp_path: Path
) -> None:
    folder, case = tmp_path / "packed", Case(group_size=64)
    weights = write(original, folder, case)
    write_config(original, folder)
    old = {key: value for key, value in case.config.items() if key != "quant_method"}
    (folder / "quantize_config.json").write_text(json.dumps(old | {"desc_act": False}))
    theirs = expected(original, weights)
    assert (logits(load(folder)) - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant_method": "fp8"}, "is quantized already (fp8); this server reads GPTQ"),
        ({"quant_method": None}, "is quantized already (None)"),
        ({"bits": 3}, "is quantized already (gptq of format gptq, 3 bits)"),
        ({"checkpoint_format": "marlin"}, "(gptq of format marlin, 4 bits)"),
        ({"quant_method": "awq", "bits": 8}, "(awq of format gemm, 8 bits)"),
        ({"quant_method": "awq", "version": "gemv"}, "(awq of format gemv, 4 bits)"),
        ({"group_size": 0}, "a group_size of 0 is not possible"),
        ({"group_size": "a"}, "a group_size of 'a' is not possible"),
    ],
    ids=str,
)
def test_unsupported_packings_are_refused_by_name(
    original: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    write_config(original, tmp_path, quantization_config=Case().config | change)
    with pytest.raises(CheckpointError) as error:
        read_model_config(tmp_path)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


NAME = "model.layers.1.mlp.up_proj."


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("qzeros", None, f"the weights lack '{NAME}qzeros'"),
        ("scales", lambda scales: scales[1:], f"'{NAME}scales' has shape [3, 256]"),
        ("qweight", lambda words: words.long(), f"'{NAME}qweight' is of type I64"),
        ("g_idx", lambda groups: groups + 1, f"'{NAME}g_idx' names groups that do not exist"),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_sentence(
    original: Path,
    tmp_path: Path,
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    reason: str,
) -> None:
    folder = tmp_path / "packed"
    write(original, folder, Case())
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(NAME + part)
    if change:
        tensors[NAME + part] = change(tensor).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_weights(folder).read(f"{NAME}weight", (256, 128))
    assert reason in str(error.value)
