"""The quality figures of benchmarks/perplexity.py."""

import math

import pytest
import torch

from benchmarks.perplexity import TEXTS, compare, logprobs
from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.engine.model.config import read_model_config
from server.core.engine.model.qwen import load_qwen


def test_the_perplexity_of_a_flat_distribution_is_its_number_of_tokens() -> None:
    flat = torch.zeros(5, 7).log_softmax(-1)
    quality = compare([[0, 1, 2, 3, 4, 5]], [flat], [flat])
    assert quality.perplexity == pytest.approx(7)
    assert quality.divergence == 0
    assert quality.same_top == 1


def test_a_distribution_is_compared_with_that_of_float32() -> None:
    reference = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]).clamp_min(1e-9).log()
    ours = torch.tensor([[0.25, 0.75, 0.0], [0.2, 0.2, 0.6]]).clamp_min(1e-9).log()
    quality = compare([[0, 1, 2]], [ours], [reference])
    assert quality.perplexity == pytest.approx(math.sqrt(1 / (0.75 * 0.6)))
    assert quality.divergence == pytest.approx(0.5 * math.log(0.5 / 0.25 * 0.5 / 0.75) / 2)
    assert quality.same_top == 0.5


def test_logprobs_do_not_depend_on_how_the_text_is_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = read_model_config(BUNDLED_FOLDER)
    model = load_qwen(BUNDLED_FOLDER, config, "float32")
    ids = list(range(5, 45))
    whole = logprobs(model, ids, 1000)
    monkeypatch.setattr("benchmarks.perplexity.STEP_ROWS", 16)
    torch.testing.assert_close(logprobs(model, ids, 1000), whole, rtol=0, atol=1e-4)
    assert whole.shape == (39, 1000)


def test_both_texts_exist() -> None:
    assert all(path.read_text(encoding="utf-8").strip() for path in TEXTS)
