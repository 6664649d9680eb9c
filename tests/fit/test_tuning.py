"""A soft prompt trained by peft on a tiny model, in peft's own format."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.core.engine.model.tuning import SoftPrompt
from server.core.roles.task_files import read_task_file
from server.fit.errors import FitError
from server.fit.selection import Selection
from server.fit.tuning import check_tuning
from tests.fit.test_command import INSTRUCTION, fit, learnable, table

LABEL_IDS = [[300, 301], [400], [500, 501, 502]]
NUM_VECTORS = 5
TEXT = "What is this about, now?"


def rows(num: int, start: int = 0) -> list[tuple[list[int], int]]:
    """Prompts of several lengths, whose second last token determines the label."""
    return [
        ([20 + i % 7] * (i % 5 + 1) + [100 + i % 3, 9], i % 3) for i in range(start, start + num)
    ]


@pytest.fixture
def soft_prompt(tiny_checkpoint: Path) -> SoftPrompt:
    return SoftPrompt(tiny_checkpoint, TEXT, LABEL_IDS, NUM_VECTORS)


def test_training_lowers_the_loss_of_rows_held_out(soft_prompt: SoftPrompt) -> None:
    reports: list[None] = []
    before = soft_prompt.loss(rows(9, start=60))
    soft_prompt.train(rows(60), rows(9, start=60), 3, lambda: reports.append(None))
    # A random model cannot learn much.
    assert soft_prompt.loss(rows(9, start=60)) < before - 0.1
    assert len(reports) == 180


def test_the_vectors_of_the_best_epoch_are_kept(
    soft_prompt: SoftPrompt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses, vectors = iter([3.0, 1.0, 2.0]), []

    def loss_and_look(of: object) -> float:
        vectors.append(vectors_of(soft_prompt, tmp_path))
        return next(losses)

    monkeypatch.setattr(soft_prompt, "loss", loss_and_look)
    soft_prompt.train(rows(24), rows(9), 2, lambda: None)
    start, best, last = vectors
    assert not np.array_equal(start, best) and not np.array_equal(best, last)
    assert np.array_equal(vectors_of(soft_prompt, tmp_path), best)


def vectors_of(soft_prompt: SoftPrompt, folder: Path) -> NDArray[np.float32]:
    """The vectors as they are written."""
    soft_prompt.save(folder)
    vectors = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    return np.array(vectors.numpy())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_scores_are_those_of_peft_for_each_label_alone(
    soft_prompt: SoftPrompt, tmp_path: Path
) -> None:
    soft_prompt.train(rows(12), rows(6), 1, lambda: None)
    soft_prompt.save(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = [ids for ids, _ in rows(4)]
    found = soft_prompt.scores(prompts, lambda: None)
    assert found.shape == (4, 3)
    for prompt, row in zip(prompts, found, strict=True):
        for ids, score in zip(LABEL_IDS, row, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0]
            logprobs = logits.log_softmax(-1)[-len(ids) - 1 : -1]
            slow = sum(float(logprobs[i, token]) for i, token in enumerate(ids))
            assert score == pytest.approx(slow, abs=1e-3)


def test_the_vectors_start_from_the_text(
    soft_prompt: SoftPrompt, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    vectors = vectors_of(soft_prompt, tmp_path)
    assert soft_prompt.num_virtual_tokens == NUM_VECTORS
    assert vectors.shape == (NUM_VECTORS, 32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PROMPT_TUNING"
    assert config["num_virtual_tokens"] == NUM_VECTORS
    embeddings = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    ids = AutoTokenizer.from_pretrained(tiny_checkpoint)(TEXT)["input_ids"][:NUM_VECTORS]
    assert np.array_equal(vectors, embeddings.weight[ids].detach().numpy())


def test_the_method_writes_a_task_that_names_its_adapter(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    options = ["--task", "things", "--instruction", INSTRUCTION, "--model", tiny_checkpoint,
               "--out", out, "--method", "prompt", "--force"]  # fmt: skip
    assert fit(monkeypatch, table(tmp_path / "rows.csv", learnable(12)), *options) == ""
    printed = capsys.readouterr().out
    assert "a soft prompt of" in printed
    assert f"--tasks {out}" in printed
    assert f"--adapter things={out / 'things-adapter'}" in printed
    written = tomllib.loads((out / "tasks.toml").read_text())["things"]
    assert (written["adapter"], written["judge"]) == ("things", "things.safetensors")
    assert (out / "things-adapter" / "adapter_model.safetensors").is_file()
    assert (out / "things-adapter" / "adapter_config.json").is_file()
    assert json.loads((out / "things-report.json").read_text())["curve"] is None


def test_without_peft_the_method_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("server.fit.tuning.importlib.util.find_spec", lambda name: None)
    options = ["--task", "things", "--instruction", INSTRUCTION, "--model", tiny_checkpoint]
    path = table(tmp_path / "rows.csv", learnable())
    says = fit(monkeypatch, path, *options, "--out", tmp_path / "out", "--method", "prompt")
    assert "pip install 'qwen-all-in-one[tune]'" in says


def test_a_label_without_rows_cannot_be_tuned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = table(tmp_path / "rows.csv", learnable())
    options = ["--labels", "animal=positive,machine=negative", "--model", "mini"]
    says = fit(monkeypatch, path, *options, "--out", tmp_path / "out", "--method", "prompt")
    assert "'neutral' has no rows; --method prompt needs rows of every label" in says


def test_a_gguf_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path, task = tmp_path / "model.gguf", read_task_file().tasks["sentiment"]
    path.touch()
    with pytest.raises(FitError, match=r"cannot train on the GGUF file .*give the folder"):
        check_tuning(Selection(train=[], test=[], left_out=[]), task, path)
