"""The measured processes. Needs no package of the peers."""

import ast
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import compare, exports, light_client
from benchmarks.engines import TOKEN_ENGINES, measuring
from benchmarks.engines.measuring import answer
from benchmarks.worker import Worker
from server.core.engine.checkpoint import BUNDLED_FOLDER
from tests.unit.test_layout import ROOT, imports_of, is_below

TEXT = list(range(1000, 1040))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker("ours-float32", BUNDLED_FOLDER)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    "request_",
    [
        {"case": "prefill", "num_tokens": 300},
        {"case": "decode", "num_streams": 1, "num_cached": 20},
        {"case": "decode", "num_streams": 3, "num_cached": 20, "sampling": True},
        {"case": "generate", "num_streams": 3, **light_client.WORKLOAD, "num_new": 5},
    ],
)
def test_our_engine_is_measured(worker: Worker, request_: dict[str, object]) -> None:
    assert worker.ask(request_)["seconds"] > 0


def test_the_perplexity_of_random_tokens_is_high_and_the_same_twice(worker: Worker) -> None:
    request = {"case": "perplexity", "texts": [TEXT], "vocab_size": 20_000}
    first = worker.ask(request)["perplexity"]
    assert 100 < first < math.inf
    assert worker.ask(request)["perplexity"] == pytest.approx(first)


def test_the_peak_of_memory_is_the_workers_own() -> None:
    held = np.ones(300_000_000, np.uint8)  # by the parent
    worker = Worker("ours-float32", BUNDLED_FOLDER)
    try:
        assert 50 < worker.ask({"case": "memory"})["peak_mib"] < measuring.peak_mib()
    finally:
        worker.close()
    del held


class Flat:
    """Equal logits for the vocabulary, and a larger one beyond it."""

    def logits(self, ids: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        for _ in ids[1:]:
            yield np.array([[2.0] * 7 + [50.0]], np.float32)


def test_padding_of_the_vocabulary_does_not_count_in_the_perplexity() -> None:
    request = {"case": "perplexity", "texts": [[1, 2, 3], [4, 5]], "vocab_size": 7}
    assert answer(Flat(), request)["perplexity"] == pytest.approx(7)


def test_every_goal_has_a_measured_case() -> None:
    known = {*compare.CASES, compare.PERPLEXITY, compare.PEAK}
    for goal in [*compare.GOALS, *compare.GOALS_OF_SHAPE]:
        for engine, case in [goal.figure, *goal.peers]:
            assert engine in TOKEN_ENGINES and case in known


def test_the_longest_prompt_fits_with_the_tokens_that_follow() -> None:
    longest = max(request.get("num_cached", 0) for request, _ in compare.CASES.values())
    assert longest + measuring.NUM_STEPS < measuring.MAX_CONTEXT
    assert all(
        request["num_cached"] + measuring.NUM_STEPS < measuring.MAX_BATCH_CONTEXT
        for request, _ in compare.CASES.values()
        if request.get("num_streams", 1) > 1
    )


def test_exports_are_kept_apart_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "CACHE", tmp_path / "cache")
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(b"weights")
    first = exports.export_folder(checkpoint)
    assert first.is_relative_to(tmp_path / "cache") and first == exports.export_folder(checkpoint)
    weights.write_bytes(b"other weights")
    assert exports.export_folder(checkpoint) != first
    assert list(checkpoint.iterdir()) == [weights]


@pytest.mark.parametrize("name", ["__init__", "__main__", "measuring", "openvino"])
def test_openvino_s_environment_has_all_that_its_worker_imports(name: str) -> None:
    source = (ROOT / f"benchmarks/engines/{name}.py").read_text(encoding="utf-8")
    # An import within a function is only needed by another engine.
    top = "\n".join(
        ast.unparse(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    allowed = ("numpy", "openvino", "openvino_genai", "benchmarks.engines.measuring",
               *sys.stdlib_module_names)  # fmt: skip
    assert all(is_below(module, allowed) for module in imports_of(top, "benchmarks.engines"))


def test_the_random_prompts_are_within_every_vocabulary() -> None:
    assert max(measuring.prompt(10_000, 0)) < 20_000
