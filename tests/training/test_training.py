"""Rows, weights and lines of the training data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from training.add_openers import checked, is_held_out
from training.batches import GIVEN, LABEL, PADDING, REPLY, Batcher, Pack, Settings, packed
from training.model import Qwen2, Shape
from training.points import Points
from training.similar import Lines
from training.weights import dequantize, quantize, quantized, read_weights, write_parts

SHAPE = Shape(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """Segments 0 to 9 of lengths 1 to 3, of which 0 to 6 are pieces of the template."""
    lengths = np.array([2, 1, 1, 1, 2, 1, 1, 3, 2, 3], dtype=np.uint8)
    arrays: dict[str, Any] = {
        "tokens": np.arange(10, 10 + lengths.sum(), dtype=np.uint16), "lengths": lengths,
        "label_ids": np.array([3, 4]), "poles": np.array([0, 1]),
        "prefix_instructions": np.array([5, 6, 7]), "prefix_persona": np.array([8, 9]),
        "prefix_plain": np.array([9]),
        "piece_user": np.array(0), "piece_answer": np.array(1), "piece_turn_end": np.array(2),
        "piece_end": np.array(3), "piece_cue": np.array([4, 4, 4]), "piece_label": np.array([5, 6]),
        "text_segments": np.array([7, 8]), "text_probs": np.array([[255, 0], [51, 204]], np.uint8),
        "text_weights": np.array([0.5, 0.5]),
        "pair_users": np.array([7, 8]), "pair_replies": np.array([9, 9]),
        "pair_labels": np.array([0, 1]), "pair_langs": np.array([0, 0]),
        "pair_weights": np.array([1.0, 1.0]), "plain_weights": np.array([1.0, 0.0]),
    }  # fmt: skip
    np.savez_compressed(tmp_path / "pack.npz", **arrays)
    return Pack(tmp_path / "pack.npz")


def test_documents_follow_their_prefix_with_their_targets(pack: Pack) -> None:
    pairs = [(np.array([7, 8]), np.array([9, 9]))]
    documents = pack.reply_documents(pairs, np.array([0, 1]))
    rows = packed(pack, "persona", pack.flatten(*documents), 2, Settings(rows=2, row_tokens=16))
    # Two header tokens, three of text, two of the cue, three of the reply, the end.
    assert rows["ids"][0].tolist()[:13] == [8, 9, 10, 11, 19, 20, 21, 15, 16, 24, 25, 26, 14]
    assert rows["documents"][0].tolist() == [0] * 2 + [1] * 11 + [PADDING] * 3
    assert rows["documents"][1].tolist() == [0] * 2 + [2] * 10 + [PADDING] * 4
    assert rows["positions"][1].tolist()[:12] == list(range(12))
    learned = rows["target_roles"] == REPLY
    assert rows["targets"][learned].tolist() == [24, 25, 26, 14] * 2
    flat = rows["ids"].reshape(-1)
    assert flat[rows["target_at"][learned] + 1].tolist() == rows["targets"][learned].tolist()


def test_documents_that_do_not_fit_are_not_used(pack: Pack) -> None:
    pairs = [(np.array([7] * 5), np.array([9] * 5))]
    flat = pack.flatten(*pack.reply_documents(pairs, None))
    rows = packed(pack, "plain", flat, 1, Settings(rows=1, row_tokens=24))
    assert int(rows["used"]) == 2


def test_a_label_is_where_its_distribution_is_learned(pack: Pack) -> None:
    segments, roles = pack.label_documents(np.array([8]), np.array([[0.2, 0.8]]))
    tokens, _, of_tokens = pack.flatten(segments, roles)
    assert tokens[of_tokens == LABEL].tolist() == [18]
    assert of_tokens[0] == GIVEN


def test_batches_keep_their_shape_and_their_weights_add_up(pack: Pack) -> None:
    settings = Settings(rows=8, row_tokens=48)
    batcher = Batcher(pack, settings, seed=0)
    shapes = []
    for _ in range(3):
        batch = batcher.batch()
        shapes.append({name: tuple(tensor.shape) for name, tensor in batch.items()})
        weights = batch["target_weights"] * batch["is_reply"]
        assert weights.sum().item() == pytest.approx(settings.reply_weight, abs=1e-4)
        assert batch["label_weights"].sum().item() == pytest.approx(settings.label_weight, abs=1e-4)
    assert shapes[0] == shapes[1] == shapes[2]


def test_the_logits_equal_those_of_transformers() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=24, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs = Qwen2ForCausalLM(config).eval()
    ours = Qwen2(SHAPE).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(50, (1, 12))
    # A prefix of four tokens and two documents of four.
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]])
    documents = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    with torch.no_grad():
        logits = ours.lm_head(ours(ids, positions, documents))
        alone = theirs(torch.cat((ids[:, :4], ids[:, 8:]), dim=1)).logits
    assert torch.allclose(logits[0, 8:], alone[0, 4:], atol=1e-5)


def test_quantized_weights_come_back_within_half_a_step() -> None:
    weight = torch.randn(7, 9)
    integers, scales = quantize(weight)
    assert integers.dtype == torch.int8
    assert ((dequantize(integers, scales) - weight).abs() <= scales[:, None] / 2 + 1e-6).all()


def test_weights_in_parts_are_read_as_one(tmp_path: Path) -> None:
    state = Qwen2(SHAPE).state_dict()
    write_parts(quantized(state), tmp_path, max_bytes=2000)
    files = set(
        json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert len(files) > 1 and files == {path.name for path in tmp_path.glob("*.safetensors")}
    read = read_weights(tmp_path)
    assert read.keys() == state.keys()
    assert all(torch.allclose(read[name], state[name], atol=2e-2) for name in state)


@pytest.mark.parametrize(
    ("line", "is_near"),
    [
        ("My cat died yesterday", True),
        ("my cat died", True),
        ("My dog learned to sit", False),
        ("楼上邻居半夜吵得我睡不着", True),
        ("楼上邻居搬走了", False),
    ],
)
def test_similar_lines_are_near(line: str, is_near: bool) -> None:
    assert Lines(["My cat died!", "楼上邻居半夜吵得睡不着"]).has_near(line) is is_near


def test_new_openers_are_kept_without_known_or_measured_lines() -> None:
    row = {"label": "negative", "lang": "en", "topic": "pets",
           "users": ["My cat died!", "our hamster is ill", "we lost the match"],
           "replies": ["I'm sorry."]}  # fmt: skip
    wrong = row | {"lang": "zh"}
    kept, left_out = checked([row, wrong], Lines(["We lost the match."]), Lines(["my cat died"]))
    assert [r["users"] for r in kept] == [["our hamster is ill"]]
    assert left_out["a line in another language"] == left_out["line known"] == 1
    assert is_held_out(kept[0]) == is_held_out(dict(kept[0]))


# --- answers during training ----------------------------------------------------------


def test_answers_are_greedy_after_the_cue_of_the_mood(pack: Pack) -> None:
    torch.manual_seed(0)
    model = Qwen2(Shape(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)).eval()
    points = Points(pack, "cpu")
    prompt = points._prompts[3]
    # The cue of the fixture's moods is its segment 4.
    assert prompt[:2] == [10, 11]
    assert prompt[-2:] == [15, 16]
    ids = [*points._head, *prompt]
    for _ in range(8):
        documents = torch.tensor([[0] * len(points._head) + [1] * (len(ids) - len(points._head))])
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], documents)
        ids.append(int(model.lm_head(hidden[0, -1]).argmax()))
    alone = points._tokenizer.decode(ids[-8:])
    assert alone
    assert points.answers(model)[3].startswith(alone)


def test_shares_are_those_of_answers_with_a_word_of_the_topic(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = Points(pack, "cpu")
    langs = [opener["lang"] for opener in points._openers]
    topics = [opener["topic"].split("|")[0] for opener in points._openers]
    answers = [topic if lang == "zh" else "" for lang, topic in zip(langs, topics, strict=True)]
    monkeypatch.setattr(points, "answers", lambda model: answers)
    shares = points.shares(Qwen2(SHAPE))
    assert shares["zh_to_the_point"] > 0.9
    assert shares["en_to_the_point"] == 0.0
