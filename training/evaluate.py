"""Evaluates both roles on held-out rows. Needs only numpy and torch."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches import LABEL_END, TEXT, Array, Pack, Settings, packed, to_device
from training.model import Qwen2

LANGUAGES = ("zh", "en")


@torch.no_grad()
def evaluate(model: Qwen2, pack: Pack, settings: Settings, device: str) -> dict[str, float]:
    """Label accuracy by language, on all rows and on polar rows; log-loss (nats) of labels, and of
    replies per token.
    """
    return _labels(model, pack, settings, device) | _replies(model, pack, settings, device)


def _labels(model: Qwen2, pack: Pack, settings: Settings, device: str) -> dict[str, float]:
    a = pack.arrays
    true = a["dev_labels"].astype(np.int64)
    segments, roles = pack.label_documents(a["dev_texts"], np.eye(len(pack.label_ids))[true])
    roles[(roles == TEXT) | (roles == LABEL_END)] = 0
    scores = torch.cat([
        model.lm_head(hidden[at["label_at"]]).float()[:, pack.label_ids]
        for hidden, at in _passes(model, pack, "instructions", (segments, roles), settings, device)
    ])  # fmt: skip
    target = torch.from_numpy(true).to(device)
    result = {"label_loss": round(F.cross_entropy(scores, target).item(), 4)}
    predicted, poles = scores.argmax(-1).cpu().numpy(), scores[:, a["poles"].tolist()].argmax(-1)
    predicted_pole = a["poles"][poles.cpu().numpy()]
    for i, lang in enumerate(LANGUAGES):
        in_language = a["dev_langs"] == i
        is_polar = in_language & np.isin(true, a["poles"])
        result[f"{lang}_three_way"] = round(float((predicted == true)[in_language].mean()), 4)
        result[f"{lang}_polar"] = round(float((predicted_pole == true)[is_polar].mean()), 4)
    return result


def _replies(model: Qwen2, pack: Pack, settings: Settings, device: str) -> dict[str, float]:
    a = pack.arrays
    pairs = [(a["dev_pair_users"], a["dev_pair_replies"])]
    segments, roles = pack.reply_documents(pairs, a["dev_pair_labels"])
    roles[roles == TEXT] = 0
    losses, langs = [], []
    begin = 0
    for hidden, at in _passes(model, pack, "persona", (segments, roles), settings, device):
        logits = model.lm_head(hidden[at["target_at"]]).float()
        losses.append(F.cross_entropy(logits, at["targets"], reduction="none").cpu().numpy())
        langs.append(a["dev_pair_langs"][begin + at["target_documents"].cpu().numpy()])
        begin += int(at["used"])
    loss, lang = np.concatenate(losses), np.concatenate(langs)
    result = {"reply_loss": round(float(loss.mean()), 4)}
    for i, name in enumerate(LANGUAGES):
        result[f"{name}_reply_loss"] = round(float(loss[lang == i].mean()), 4)
    return result


def _passes(
    model: Qwen2, pack: Pack, prefix: str, documents: tuple[Array, Array], settings: Settings,
    device: str,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:  # fmt: skip
    """Hidden states (rows * T, C) of some rows at a time, and the places of their targets."""
    segments, roles = documents
    settings = replace(settings, rows=32)
    while len(segments):
        head = len(pack.arrays[f"prefix_{prefix}"])
        room = settings.rows * (settings.row_tokens - head)
        flat = pack.flatten(segments[: room // 8], roles[: room // 8])
        rows = packed(pack, prefix, flat, settings.rows, settings)
        at: dict[str, Tensor] = to_device(
            {k: torch.from_numpy(v) for k, v in rows.items() if v.ndim}, device
        )
        at["used"] = torch.tensor(int(rows["used"]))
        hidden = model(at["ids"], at["positions"], at["documents"]).flatten(0, 1)
        yield hidden, {k: v.long() if k != "used" else v for k, v in at.items()}
        segments, roles = segments[int(rows["used"]) :], roles[int(rows["used"]) :]
