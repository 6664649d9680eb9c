"""Creates batches of packed rows from the file of `training.pack`. Needs only numpy and torch.

A pack contains *segments*: token ids of texts, replies and the pieces of the chat template between
them. A document is a sequence of segments. A segment's role says what is learned of it. All steps
but the placement into rows are vectorized over documents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

# Roles of segments.
GIVEN, TEXT, REPLY, LABEL, LABEL_END = range(5)
PREFIXES = ("instructions", "persona", "plain")
PADDING = -1

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """The settings of batches."""

    rows: int = 128
    row_tokens: int = 512
    # Shares of the rows with each prefix.
    label_rows: float = 0.42
    plain_rows: float = 0.10
    drop_token: float = 0.1  # share of the tokens dropped from users' texts
    wrong_cue: float = 0.08  # share of conversations with the cue of a random mood
    learn_text: float = 0.15  # share of the texts whose tokens are targets, too
    text_weight: float = 0.3
    label_weight: float = 1.0
    reply_weight: float = 1.0
    turns: tuple[float, ...] = (0.8, 0.15, 0.05)  # shares of conversations of 1, 2, … turns
    max_targets: float = 0.3  # share of the tokens of a batch


class Pack:
    """The arrays of a file, and documents drawn from them."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays: dict[str, Array] = {name: file[name] for name in file.files}
        a = self.arrays
        self.lengths = a["lengths"].astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens = a["tokens"]
        self.label_ids = a["label_ids"].astype(np.int64)
        self._text_bounds = np.cumsum(a["text_weights"].astype(np.float64))
        self._pair_bounds = {
            "reply": np.cumsum(a["pair_weights"].astype(np.float64)),
            "plain": np.cumsum(a["plain_weights"].astype(np.float64)),
        }

    def piece(self, name: str) -> int:
        """The segment of a piece of the template."""
        return int(self.arrays[f"piece_{name}"])

    def draw_texts(self, rng: np.random.Generator, num: int) -> Array:
        return _draw(self._text_bounds, rng, num)

    def draw_pairs(self, rng: np.random.Generator, num: int, kind: str) -> Array:
        return _draw(self._pair_bounds[kind], rng, num)

    def label_documents(self, texts: Array, probabilities: Array) -> tuple[Array, Array]:
        """Segments and roles: (N, S) each. texts: segments (N,). probabilities: (N, labels)."""
        best = self.arrays["piece_label"][probabilities.argmax(-1)]
        columns = [(self.piece("user"), GIVEN), (texts, TEXT), (self.piece("answer"), GIVEN),
                   (best, LABEL), (self.piece("end"), LABEL_END)]  # fmt: skip
        return _table(columns, len(texts))

    def reply_documents(
        self, turns: list[tuple[Array, Array]], cues: Array | None
    ) -> tuple[Array, Array]:
        """Segments and roles: (N, S) each. PADDING stands for an absent segment.

        turns: users and replies (N,) of each turn; the last reply is learned. cues: labels (N,) or
        None.
        """
        columns: list[tuple[Array | int, int]] = []
        for users, replies in turns[:-1]:
            absent = users < 0
            columns += [
                (np.where(absent, PADDING, self.piece("user")), GIVEN), (users, GIVEN),
                (np.where(absent, PADDING, self.piece("answer")), GIVEN), (replies, GIVEN),
                (np.where(absent, PADDING, self.piece("turn_end")), GIVEN),
            ]  # fmt: skip
        users, replies = turns[-1]
        cue: Array | int = self.piece("answer") if cues is None else self.arrays["piece_cue"][cues]
        columns += [(self.piece("user"), GIVEN), (users, TEXT), (cue, GIVEN), (replies, REPLY),
                    (self.piece("end"), REPLY)]  # fmt: skip
        return _table(columns, len(users))

    def flatten(self, segments: Array, roles: Array) -> tuple[Array, Array, Array]:
        """Concatenates the documents; returns tokens, and the document and role of each token."""
        present = segments >= 0
        chosen, role = segments[present], roles[present]
        document = np.nonzero(present)[0]
        lengths = self.lengths[chosen]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(self.starts[chosen], lengths) + within
        return (
            self.tokens[at].astype(np.int32),
            np.repeat(document, lengths),
            np.repeat(role, lengths),
        )


def _draw(bounds: Array, rng: np.random.Generator, num: int) -> Array:
    drawn = np.searchsorted(bounds, rng.random(num) * bounds[-1], side="right")
    capped: Array = np.minimum(drawn, len(bounds) - 1)
    return capped


def _table(columns: list[tuple[Array | int, int]], num: int) -> tuple[Array, Array]:
    segments = np.empty((num, len(columns)), dtype=np.int64)
    roles = np.empty((num, len(columns)), dtype=np.int8)
    for i, (segment, role) in enumerate(columns):
        segments[:, i], roles[:, i] = segment, role
    return segments, roles


class Batcher:
    """Draws documents and packs them into rows."""

    def __init__(self, pack: Pack, settings: Settings, seed: int) -> None:
        self._pack, self._settings = pack, settings
        self._rng = np.random.default_rng(seed)

    def batch(self) -> dict[str, Tensor]:
        """A batch of rows with each of the prefixes."""
        s = self._settings
        num_label = round(s.rows * s.label_rows)
        num_plain = max(1, round(s.rows * s.plain_rows))
        parts = [
            self._label_rows(num_label),
            self._reply_rows(s.rows - num_label - num_plain, "reply"),
            self._reply_rows(num_plain, "plain"),
        ]
        return collect(parts, self._pack.label_ids, s, self._rng)

    def _label_rows(self, num_rows: int) -> dict[str, Array]:
        pack, rng = self._pack, self._rng
        chosen = pack.draw_texts(rng, self._enough(num_rows))
        probabilities = pack.arrays["text_probs"][chosen]
        segments, roles = pack.label_documents(pack.arrays["text_segments"][chosen], probabilities)
        tokens = self._thinned(*pack.flatten(segments, roles))
        return packed(pack, "instructions", tokens, num_rows, self._settings, probabilities)

    def _reply_rows(self, num_rows: int, kind: str) -> dict[str, Array]:
        pack, rng, a = self._pack, self._rng, self._pack.arrays
        chosen = pack.draw_pairs(rng, self._enough(num_rows), kind)
        num_turns = rng.choice(len(self._settings.turns), len(chosen), p=self._settings.turns)
        turns = []
        for past in range(len(self._settings.turns) - 1, 0, -1):
            # Nearby pairs of the pack have the same kind and language as a rule.
            near = np.clip(
                chosen + rng.integers(-200, 201, len(chosen)), 0, len(a["pair_users"]) - 1
            )
            is_present = (num_turns >= past) & (a["pair_langs"][near] == a["pair_langs"][chosen])
            turns.append((np.where(is_present, a["pair_users"][near], PADDING),
                          np.where(is_present, a["pair_replies"][near], PADDING)))  # fmt: skip
        turns.append((a["pair_users"][chosen], a["pair_replies"][chosen]))
        cues = None
        if kind == "reply":
            random_labels = rng.integers(0, len(pack.label_ids), len(chosen))
            is_random = rng.random(len(chosen)) < self._settings.wrong_cue
            cues = np.where(is_random, random_labels, a["pair_labels"][chosen])
        segments, roles = pack.reply_documents(turns, cues)
        tokens = self._thinned(*pack.flatten(segments, roles))
        prefix = "persona" if kind == "reply" else "plain"
        return packed(pack, prefix, tokens, num_rows, self._settings)

    def _thinned(self, tokens: Array, documents: Array, roles: Array) -> tuple[Array, ...]:
        """Makes the text of some documents a target; drops tokens from the text of the others."""
        s, rng = self._settings, self._rng
        learns = rng.random(documents[-1] + 1) < s.learn_text
        is_text = roles == TEXT
        roles = np.where(is_text & ~learns[documents], GIVEN, roles)
        keep = ~is_text | learns[documents] | (rng.random(len(tokens)) >= s.drop_token)
        return tokens[keep], documents[keep], roles[keep]

    def _enough(self, num_rows: int) -> int:
        """A number of documents that is certainly more than fits."""
        return max(8, num_rows * self._settings.row_tokens // 10)


def packed(
    pack: Pack, prefix: str, flat: tuple[Array, ...], num_rows: int, settings: Settings,
    probabilities: Array | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Rows of a prefix and as many documents as fit, in order.

    The result's `used` is the number of these documents.
    """
    tokens, documents, roles = flat
    T = settings.row_tokens
    head = pack.arrays[f"prefix_{prefix}"].astype(np.int32)
    lengths = np.bincount(documents)
    row_of, column_of = _places(lengths.tolist(), len(head), T, num_rows)
    used = len(row_of)
    fits = documents < used
    tokens, documents, roles = tokens[fits], documents[fits], roles[fits]
    lengths = lengths[:used]
    within = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = (np.repeat(row_of * T + column_of, lengths) + within).astype(np.int64)
    ids = np.zeros(num_rows * T, dtype=np.int32)
    positions = np.zeros(num_rows * T, dtype=np.int32)
    document = np.full(num_rows * T, PADDING, dtype=np.int32)
    for flat_row, values in ((ids, head), (positions, np.arange(len(head))), (document, 0)):
        flat_row.reshape(num_rows, T)[:, : len(head)] = values
    ids[at], positions[at], document[at] = tokens, len(head) + within, documents + 1
    is_label = roles == LABEL
    is_target = (roles != GIVEN) & ~is_label
    result = {
        "ids": ids.reshape(num_rows, T), "positions": positions.reshape(num_rows, T),
        "documents": document.reshape(num_rows, T), "target_at": at[is_target] - 1,
        "targets": tokens[is_target], "target_roles": roles[is_target],
        "target_documents": documents[is_target],
        "label_at": at[is_label] - 1, "used": np.array(used),
    }  # fmt: skip
    if probabilities is not None:
        result["label_probs"] = probabilities[:used]
    return result


def _places(lengths: list[int], head: int, T: int, num_rows: int) -> tuple[Array, Array]:
    """The row and column of each document that fits, by next-fit packing."""
    rows, columns, row, column = [], [], 0, head
    for length in lengths:
        if column + length > T:
            row, column = row + 1, head
            if row == num_rows:
                break
        assert head + length <= T, "a document is longer than a row"
        rows.append(row)
        columns.append(column)
        column += length
    return np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64)


def collect(
    parts: list[dict[str, Array]], label_ids: Array, settings: Settings, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Joins rows to a batch of fixed shapes, with a weight for every target.

    Drops random targets if there are more than `max_targets` allows.
    """
    s = settings
    rows = np.cumsum([0] + [len(p["ids"]) for p in parts])
    at = np.concatenate(
        [p["target_at"] + begin * s.row_tokens for p, begin in zip(parts, rows, strict=False)]
    )
    targets = np.concatenate([p["targets"] for p in parts])
    roles = np.concatenate([p["target_roles"] for p in parts])
    weights = np.zeros(len(roles), dtype=np.float32)
    for role, weight in ((TEXT, s.text_weight), (REPLY, s.reply_weight), (LABEL_END, 0.1)):
        weights[roles == role] = weight / max(1, (roles == role).sum())
    size = int(s.rows * s.row_tokens * s.max_targets)
    kept = rng.permutation(len(at))[:size] if len(at) > size else np.arange(len(at))
    label_at = parts[0]["label_at"]
    probabilities = parts[0]["label_probs"].astype(np.float32)
    probabilities /= probabilities.sum(-1, keepdims=True)
    num_labels = s.rows * s.row_tokens // 16
    label_at, probabilities = label_at[:num_labels], probabilities[:num_labels]
    batch = {
        "ids": np.concatenate([p["ids"] for p in parts]),
        "positions": np.concatenate([p["positions"] for p in parts]),
        "documents": np.concatenate([p["documents"] for p in parts]),
        "target_at": _padded_places(at[kept].astype(np.int32), size),
        "targets": _padded(targets[kept].astype(np.int32), size),
        "target_weights": _padded(weights[kept], size),
        "is_reply": _padded((roles[kept] == REPLY).astype(np.float32), size),
        "label_at": _padded_places(label_at.astype(np.int32), num_labels),
        "label_probs": _padded(probabilities, num_labels),
        "label_weights": _padded(
            np.full(len(label_at), s.label_weight / max(1, len(label_at)), np.float32), num_labels
        ),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in batch.items()}


def _padded(values: Array, size: int) -> Array:
    out = np.zeros((size, *values.shape[1:]), dtype=values.dtype)
    out[: len(values)] = values
    return out


def _padded_places(places: Array, size: int) -> Array:
    """Pads with distinct places, whose weight is 0: adding to the same place would be serial."""
    out = np.arange(size, dtype=places.dtype)
    out[: len(places)] = places
    return out


class Batches(IterableDataset[dict[str, Tensor]]):
    """An endless sequence of batches; each worker draws its own."""

    def __init__(self, pack: Pack, settings: Settings, seed: int) -> None:
        self._pack, self._settings, self._seed = pack, settings, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        batcher = Batcher(
            self._pack, self._settings, self._seed * 1000 + (worker.id if worker else 0)
        )
        while True:
            yield batcher.batch()


def to_device(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    return {k: v.long() if v.dtype == torch.int32 else v for k, v in moved.items()}
