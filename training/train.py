"""Trains the bundled model, a small Qwen2 that plays the server's two roles, on a CPU or a GPU.

    python -m training.pack --corpus PATH --out training/runs/pack
    python -m training.train --pack training/runs/pack/pack.npz --run training/runs/mini
    python -m training.export --weights training/runs/mini/weights --out server/models/qwen-mini

Needs only torch, numpy, safetensors and tokenizers. A run writes checkpoints and resumes from the
last one when it is started again. The output is the averaged weights of the last evaluation.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from training.batches import Batches, Pack, Settings, to_device
from training.evaluate import evaluate
from training.model import Qwen2, Shape
from training.points import Points
from training.weights import quantized, read_weights, write_parts

SHAPES = {
    "mini": Shape(),
    "large": Shape(hidden_size=512, num_layers=6, num_heads=8, intermediate_size=1408),
    "tiny": Shape(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128),
}
MAX_PART = 15_000_000  # bytes
FINAL_LR = 0.02  # share of the peak
WARMUP = 0.02  # share of the run
# Factor of the learning rate: few steps update a given token's row.
EMBEDDINGS_LR = 2.0
WEIGHT_DECAY = 0.1
EMA_DECAY = 0.999
# Size of new embedding dimensions, relative to the old ones.
NEW_VECTORS = 0.3
# The weight of users' texts falls to 0 over this share of the run: language is learned first.
TEXT_UNTIL = 0.6

STARTED = time.monotonic()

Losses = tuple[Tensor, Tensor, Tensor]


def loss_of(model: Qwen2, batch: dict[str, Tensor], text_weight: Tensor) -> Losses:
    """The loss to minimise, and its parts: the mean losses of labels and of replies.

    The loss of a label is taken over all tokens, so that other tokens become unlikely.
    """
    hidden = model(batch["ids"], batch["positions"], batch["documents"]).flatten(0, 1)
    logits = model.lm_head(hidden[batch["target_at"]]).float()
    each = F.cross_entropy(logits, batch["targets"], reduction="none")
    is_reply = batch["is_reply"]
    reply = (each * batch["target_weights"] * is_reply).sum()
    text = (each * batch["target_weights"] * (1 - is_reply)).sum()
    logprobs = F.log_softmax(model.lm_head(hidden[batch["label_at"]]).float(), dim=-1)
    label_logprobs = logprobs[:, batch["label_ids"]]
    label = -((label_logprobs * batch["label_probs"]).sum(-1) * batch["label_weights"]).sum()
    return label + reply + text_weight * text, label.detach(), reply.detach()


def learning_rate(progress: float) -> float:
    """The share of the peak: linear warm-up, then cosine decay."""
    if progress < WARMUP:
        return progress / WARMUP
    return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def start_from(model: Qwen2, pack: Pack, folder: Path) -> None:
    """Copies the weights of a checkpoint with as many layers, which may be narrower.

    New dimensions do not affect the old ones at first, so that the model starts close to the
    checkpoint. The new dimensions of the embeddings start from the pack's vectors of a larger Qwen.
    """
    old = read_weights(folder)
    width = old["model.norm.weight"].shape[0]
    size = model.shape.hidden_size
    vectors = torch.from_numpy(pack.arrays["embeddings"].astype(np.float32)) / 100
    for name, weight in model.named_parameters():
        known = old[name].to(weight.device)
        if weight.ndim == 1:
            # The mean square now includes the new, small dimensions.
            scale = (width / size) ** 0.5 if "norm" in name else 1.0
            weight[: len(known)] = known * scale
            continue
        rows, columns = known.shape
        weight[:rows, :columns] = known
        if size == width:
            continue
        if name.startswith(("model.embed", "lm_head")):
            new = vectors[:, : size - columns].to(weight.device)
            weight[:, columns : columns + new.shape[1]] = new * known.std() * NEW_VECTORS
        else:
            weight[:rows, columns:] = 0.0


def new_optimizer(model: Qwen2, peak_lr: float) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in model.named_parameters():
        scale = EMBEDDINGS_LR if "embed_tokens" in name else 1.0
        decay = WEIGHT_DECAY if weight.ndim == 2 and scale == 1.0 else 0.0
        groups.setdefault((scale, decay), []).append(weight)
    return torch.optim.AdamW(
        [{"params": p, "scale": s, "weight_decay": d} for (s, d), p in groups.items()],
        lr=peak_lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip


class Run:
    """The state of a training run: the weights and their average."""

    def __init__(self, model: Qwen2, args: argparse.Namespace) -> None:
        self.model, self._args = model, args
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = new_optimizer(model, args.peak_lr)
        self.elapsed, self.step = 0.0, 0
        self._file = args.run / "checkpoint.pt"
        if self._file.exists():
            state = torch.load(self._file, map_location=args.device)
            for name in ("model", "average", "optimizer"):
                getattr(self, name).load_state_dict(state[name])
            self.elapsed, self.step = state["elapsed"], state["step"]

    def update(self, lr_share: float) -> None:
        """Updates the weights with the current gradients, and the average."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self._args.peak_lr * lr_share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), 1 - decay
            )
        self.step += 1

    def save(self) -> None:
        state = {
            name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")
        }
        state |= {"elapsed": self.elapsed, "step": self.step}
        torch.save(state, self._file.with_suffix(".tmp"))
        self._file.with_suffix(".tmp").replace(self._file)

    def write_average(self, scores: dict[str, float]) -> None:
        """Writes the averaged weights and their scores, replacing earlier ones.

        Not the weights with the smallest log-loss of held-out replies: that is reached after a
        twentieth of a run, before any answer is to the point.
        """
        write_parts(quantized(self.average.state_dict()), self._args.out, MAX_PART)
        (self._args.out / "config.json").write_text(
            json.dumps(self.model.shape.config(), indent=2) + "\n"
        )
        (self._args.out / "scores.json").write_text(json.dumps(scores) + "\n")


def autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16)


def compiled(model: Qwen2, batch: dict[str, Tensor], device: str) -> Callable[..., Losses]:
    """`loss_of`, compiled and run once, forward and backward; not compiled if that fails."""
    compute: Callable[..., Losses] = torch.compile(loss_of)
    try:
        with autocast(device):
            loss, _, _ = compute(model, batch, torch.tensor(1.0, device=device))
        loss.backward()
    except Exception as error:
        print(f"not compiled: {error!r}"[:2000], flush=True)
        compute = loss_of
    model.zero_grad(set_to_none=True)
    return compute


def train(run: Run, pack: Pack, batches: Iterator[dict[str, Tensor]], args: Any) -> None:
    clock: Callable[[], float] = time.monotonic if args.device != "cpu" else time.thread_time
    label_ids = torch.from_numpy(pack.label_ids).to(args.device)
    compute = loss_of
    if args.compile:
        first = to_device(next(batches), args.device) | {"label_ids": label_ids}
        compute = compiled(run.model, first, args.device)
    # Compilation does not count as training time.
    begin, next_at = clock(), 0.0
    total_s = min(args.minutes * 60, run.elapsed + args.until_s - time.monotonic() + STARTED)
    sums, count = torch.zeros(2, device=args.device), 0
    points = Points(pack, args.device)
    with (args.out / "log.jsonl").open("a") as log:
        while run.elapsed < total_s:
            progress = run.elapsed / total_s
            batch = to_device(next(batches), args.device) | {"label_ids": label_ids}
            text_weight = torch.tensor(max(0.0, 1 - progress / TEXT_UNTIL), device=args.device)
            with autocast(args.device):
                loss, label, reply = compute(run.model, batch, text_weight)
            loss.backward()
            run.update(learning_rate(progress))
            sums += torch.stack((label, reply))
            count += 1
            run.elapsed, begin = run.elapsed + clock() - begin, clock()
            if run.elapsed / total_s < next_at:
                continue
            next_at = min(1.0, (run.elapsed + 1e-9) / total_s + 1 / args.evaluations)
            label_mean, reply_mean = (sums / count).tolist()  # waits for the device
            sums.zero_()
            count = 0
            run.elapsed, begin = run.elapsed + clock() - begin, clock()
            with autocast(args.device):
                scores = evaluate(run.average, pack, args.settings, args.device)
                scores |= points.shares(run.average)
            line = {"minutes": round(run.elapsed / 60, 2), "step": run.step,
                    "label": round(label_mean, 4), "reply": round(reply_mean, 4)}  # fmt: skip
            line |= scores
            run.write_average(line)
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            if args.checkpoints:
                run.save()
            begin = clock()


def main() -> None:
    args = _arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    args.out = args.out or args.run / "weights"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    pack = Pack(args.pack)
    args.settings = replace(
        Settings(), rows=args.rows, row_tokens=args.row_tokens, label_rows=args.label_rows,
        drop_token=args.drop_token,
    )  # fmt: skip
    shape = SHAPES[args.shape]
    model = Qwen2(shape, args.dropout).to(args.device)
    if args.start_from is not None:
        start_from(model, pack, args.start_from)
    run = Run(model, args)
    loader = DataLoader(
        Batches(pack, args.settings, args.seed + run.step), batch_size=None,
        num_workers=args.workers, pin_memory=args.device != "cpu",
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(run, pack, iter(loader), args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument(
        "--out", type=Path, help="folder for the averaged weights; default: RUN/weights"
    )
    parser.add_argument("--start-from", type=Path, help="folder of a checkpoint to start from")
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--minutes", type=float, default=120.0, help="length of the whole run")
    parser.add_argument("--until-s", type=float, default=math.inf, help="latest end of the run")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--label-rows", type=float, default=0.42, help="share of rows of labels")
    parser.add_argument("--drop-token", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--peak-lr", type=float, default=6e-4)
    parser.add_argument("--workers", type=int, default=0, help="processes that create batches")
    parser.add_argument("--compile", action="store_true", help="requires a compiler")
    parser.add_argument("--no-checkpoints", dest="checkpoints", action="store_false")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
