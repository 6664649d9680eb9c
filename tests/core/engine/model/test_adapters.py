"""Adapters against peft: every kind, every architecture, alone and mixed in one batch."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.model.adapter_weights import LoadedAdapter, read_adapter
from server.core.engine.model.config import read_model_config
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.runner import ModelRunner
from server.core.engine.scheduler import ScheduledChunk
from server.core.engine.sequence import SamplingParams, ScoredEvent, Sequence
from tests.core.engine.model.test_runner import token_of

TOLERANCE = 1e-4
NUM_VIRTUAL_TOKENS = 5
OF_LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
VIRTUAL: dict[str, Any] = {**OF_LM, "num_virtual_tokens": NUM_VIRTUAL_TOKENS}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(**OF_LM, r=4, target_modules="all-linear"),
    "lora-of-some": lambda: LoraConfig(
        **OF_LM, r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]
    ),
    "lora-by-regex": lambda: LoraConfig(
        **OF_LM, r=4, target_modules=r".*\.1\..*(k|o|down)_proj"
    ),
    "rslora": lambda: LoraConfig(
        **OF_LM, r=8, lora_alpha=3, use_rslora=True, target_modules=["k_proj", "up_proj"]
    ),
    "lora-of-patterns": lambda: LoraConfig(
        **OF_LM,
        r=4,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"down_proj": 1, "q_proj": 16},
    ),
    "prompt": lambda: PromptTuningConfig(**VIRTUAL),
    "p-tuning": lambda: PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=16),
    "prefix": lambda: PrefixTuningConfig(**VIRTUAL),
    "projected-prefix": lambda: PrefixTuningConfig(
        **VIRTUAL, prefix_projection=True, encoder_hidden_size=16
    ),
}  # fmt: skip


def save_adapter(checkpoint: Path, config: Any, folder: Path, seed: int = 0) -> PeftModel:
    """A random adapter in the folder, and the model that peft makes of it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        # It starts at 0, which would add nothing.
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        # Large, or the random model would hardly attend to it.
        if name.endswith("embedding.weight"):
            torch.nn.init.normal_(parameter, std=3)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), folder
    ).eval()


@pytest.fixture(scope="session")
def folder_of(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, PeftModel]]:
    """The folder of an adapter of each kind, and its model in peft; made once."""
    made: dict[str, tuple[Path, PeftModel]] = {}

    def get(kind: str) -> tuple[Path, PeftModel]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder, save_adapter(checkpoint, CONFIGS[kind](), folder)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> QwenModel:
    return load_qwen(checkpoint, read_model_config(checkpoint), "float32")


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def new_runner(model: QwenModel, *loaded: LoadedAdapter, max_prefix_bytes: int = 0) -> ModelRunner:
    return ModelRunner(
        model,
        vocab_size=model.config.vocab_size,
        max_kv_tokens=4096,
        max_context=256,
        max_prefix_bytes=max_prefix_bytes,
        adapters=loaded,
    )


def to_measure(ids: list[int], adapter: Adapter, num_layers: int) -> Sequence:
    """A sequence for the hidden state of the last token after the last layer."""
    return Sequence(ids, layers=(num_layers,), adapter=adapter)


def compute(runner: ModelRunner, sequence: Sequence, size: int | None = None) -> ScoredEvent:
    """Computes the sequence, `size` tokens at a time; returns its terminal event."""
    num_cached = runner.admit(sequence)
    assert num_cached is not None
    sequence.num_computed = num_cached
    while True:
        chunk = ScheduledChunk(sequence, min(size or 1000, sequence.num_uncomputed))
        results = runner.step([chunk])
        chunk.advance()
        if sequence in results:
            event = results[sequence]
            assert isinstance(event, ScoredEvent)
            return event


def logits_of(model: QwenModel, event: ScoredEvent) -> Tensor:
    assert event.hidden_states is not None
    with torch.inference_mode():
        return model.logits(torch.from_numpy(event.hidden_states[-1:]))[0]


def expected(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits
    return logits[0, -1]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_those_of_peft(
    model: QwenModel, folder_of: Callable[[str], tuple[Path, PeftModel]], kind: str
) -> None:
    folder, oracle = folder_of(kind)
    loaded = read_adapter("own", folder, model.config)
    runner = new_runner(model, loaded)
    ids = random_ids(140)  # longer than the smallest slot
    for num_tokens, size in ((1, None), (60, None), (140, 32)):
        sequence = to_measure(ids[:num_tokens], loaded.adapter, model.config.num_layers)
        ours = logits_of(model, compute(runner, sequence, size))
        runner.release(sequence, is_sound=True)
        theirs = expected(oracle, ids[:num_tokens])
        assert_close(ours, theirs)
        with oracle.disable_adapter():
            base = expected(oracle, ids[:num_tokens])
        # The adapter changes much more than the error.
        assert (ours - theirs).abs().max() < (theirs - base).abs().max() / 20


def test_a_batch_of_every_kind_and_of_the_base_equals_each_alone(
    model: QwenModel, folder_of: Callable[[str], tuple[Path, PeftModel]]
) -> None:
    loaded = {kind: read_adapter(kind, folder_of(kind)[0], model.config) for kind in CONFIGS}
    runner = new_runner(model, *loaded.values())
    num_layers = model.config.num_layers
    sequences: list[tuple[Any, Sequence]] = []
    with_base = [(each.adapter, folder_of(kind)[1]) for kind, each in loaded.items()]
    base_folder = folder_of("lora")[1].peft_config["default"].base_model_name_or_path
    assert base_folder is not None
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    for i, (adapter, oracle) in enumerate([*with_base, (BASE, base), *with_base]):
        ids = random_ids(5 + 7 * i, seed=i)
        sequences.append((oracle, to_measure(ids, adapter, num_layers)))
    for _, sequence in sequences:
        sequence.num_computed = runner.admit(sequence) or 0
    # One sequence leaves the forward pass early.
    short = Sequence(random_ids(9), layers=(1,), adapter=loaded["lora"].adapter)
    short.num_computed = runner.admit(short) or 0
    chunks = [ScheduledChunk(s, s.num_uncomputed) for s in (short, *(s for _, s in sequences))]
    results = runner.step(chunks)
    for oracle, sequence in sequences:
        event = results[sequence]
        assert isinstance(event, ScoredEvent)
        assert_close(logits_of(model, event), expected(oracle, sequence.prompt_ids))


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_continuations_are_scored_as_peft_does(
    model: QwenModel, folder_of: Callable[[str], tuple[Path, PeftModel]], kind: str
) -> None:
    folder, oracle = folder_of(kind)
    loaded = read_adapter("own", folder, model.config)
    runner = new_runner(model, loaded)
    prompt, continuations = random_ids(20), [[7], [8, 9], [8, 10, 11]]
    sequence = Sequence(prompt, continuations=continuations, adapter=loaded.adapter)
    sequence.num_computed = runner.admit(sequence) or 0
    event = runner.step([ScheduledChunk(sequence, 20, 3)])[sequence]
    assert isinstance(event, ScoredEvent)
    for ids, ours in zip(continuations, event.logprobs, strict=True):
        theirs = sum(
            expected(oracle, prompt + ids[:i]).log_softmax(-1)[token_id].item()
            for i, token_id in enumerate(ids)
        )
        assert ours == pytest.approx(theirs, abs=5 * TOLERANCE)


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_tokens_sampled_greedily_are_those_of_peft(
    model: QwenModel, folder_of: Callable[[str], tuple[Path, PeftModel]], kind: str
) -> None:
    folder, oracle = folder_of(kind)
    loaded = read_adapter("own", folder, model.config)
    runner = new_runner(model, loaded)
    sequence = Sequence(
        random_ids(12), SamplingParams(max_tokens=9, temperature=0.0), adapter=loaded.adapter
    )
    sequence.num_computed = runner.admit(sequence) or 0
    for _ in range(9):
        assert runner.reserve(sequence)
        chunk = ScheduledChunk(sequence, sequence.num_uncomputed)
        token = token_of(runner.step([chunk])[sequence])
        theirs = expected(oracle, sequence.token_ids)
        assert theirs[token.token_id] > theirs.max() - TOLERANCE
        chunk.advance()
        sequence.completion_ids.append(token.token_id)


@pytest.mark.parametrize("kind", ["lora", "lora-of-some", "prompt", "prefix"])
def test_what_one_adapter_computed_is_never_reused_by_another(
    model: QwenModel, folder_of: Callable[[str], tuple[Path, PeftModel]], kind: str
) -> None:
    folder, oracle = folder_of(kind)
    one = read_adapter("one", folder, model.config)
    two = LoadedAdapter(Adapter("two", one.adapter.num_virtual_tokens), one.weights)
    runner = new_runner(model, one, two, max_prefix_bytes=10**8)
    num_layers, ids = model.config.num_layers, random_ids(50)
    counts = []
    for adapter in (BASE, one.adapter, two.adapter, one.adapter, BASE, two.adapter):
        sequence = Sequence(ids, adapter=adapter)
        counts.append(runner.admit(sequence))
        sequence.num_computed = counts[-1] or 0
        runner.step([ScheduledChunk(sequence, sequence.num_uncomputed)])
        sequence.num_computed = len(ids)
        runner.release(sequence, is_sound=True)
    assert counts == [0, 0, 0, 49, 49, 49]
    sequence = to_measure(ids, one.adapter, num_layers)
    assert_close(logits_of(model, compute(runner, sequence)), expected(oracle, ids))


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_a_suspended_sequence_resumes(
    model: QwenModel, folder_of: Callable[[str], tuple[Path, PeftModel]], kind: str
) -> None:
    folder, oracle = folder_of(kind)
    loaded = read_adapter("own", folder, model.config)
    runner = new_runner(model, loaded)
    ids = random_ids(40)
    sequence = to_measure(ids, loaded.adapter, model.config.num_layers)
    sequence.num_computed = runner.admit(sequence) or 0
    chunk = ScheduledChunk(sequence, 15)
    runner.step([chunk])
    chunk.advance()
    runner.suspend(sequence)
    sequence.num_computed = 0
    assert_close(logits_of(model, compute(runner, sequence)), expected(oracle, ids))


@pytest.mark.parametrize(
    ("kind", "dtype", "max_error"),
    [
        ("lora", "bfloat16", 0.03),
        ("lora", "int8", 0.1),
        ("lora", "int4", 0.5),
        ("prefix", "bfloat16", 0.3),
        ("prefix", "int8", 0.5),
    ],
)
def test_with_fewer_bits_adapters_change_logits_nearly_as_in_peft(
    checkpoint: Path,
    folder_of: Callable[[str], tuple[Path, PeftModel]],
    kind: str,
    dtype: str,
    max_error: float,
) -> None:
    config = read_model_config(checkpoint)
    if dtype == "int4" and (config.hidden_size | config.intermediate_size) % 64:
        pytest.skip("this shape has no int4")
    folder, oracle = folder_of(kind)
    model = load_qwen(checkpoint, config, dtype)
    loaded = read_adapter("own", folder, config)
    runner, ids = new_runner(model, loaded), random_ids(60)
    ours, base = (
        logits_of(model, compute(runner, to_measure(ids, adapter, config.num_layers)))
        for adapter in (loaded.adapter, BASE)
    )
    adapted = expected(oracle, ids)
    with oracle.disable_adapter():
        changed = adapted - expected(oracle, ids)
    assert (ours - base - changed).norm() < max_error * changed.norm()


def test_rows_of_the_base_are_the_same_to_the_last_bit_beside_an_adapter(
    checkpoint: Path, folder_of: Callable[[str], tuple[Path, PeftModel]]
) -> None:
    config = read_model_config(checkpoint)
    model = load_qwen(checkpoint, config, "int8")
    loaded = read_adapter("own", folder_of("lora")[0], config)
    runner = new_runner(model, loaded)
    ids = [random_ids(1, seed=i) for i in range(6)]

    def states(*adapters: Adapter) -> list[list[float]]:
        sequences = [
            to_measure(each, adapter, config.num_layers)
            for each, adapter in zip(ids, adapters, strict=False)
        ]
        for sequence in sequences:
            assert runner.admit(sequence) == 0
        results = runner.step([ScheduledChunk(sequence, 1) for sequence in sequences])
        found = []
        for sequence in sequences:
            event = results[sequence]
            assert isinstance(event, ScoredEvent) and event.hidden_states is not None
            found.append(event.hidden_states.ravel().tolist())
            runner.release(sequence, is_sound=True)
        return found

    lora = loaded.adapter
    base_states, lora_states = states(*[BASE] * 6), states(*[lora] * 6)
    assert states(BASE, lora, BASE, lora, BASE, lora) == [
        (lora_states if i % 2 else base_states)[i] for i in range(6)
    ]
    assert base_states != lora_states
