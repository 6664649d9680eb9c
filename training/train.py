"""Trains the bundled model: a small Qwen2 that plays the server's two roles.

Progress is measured in minutes at work (CPU time of the main thread), so one command fits a
laptop and a GPU alike and a run that was paused loses nothing.
A run writes checkpoints and goes on from the last one when started again.

    python -m training.train --corpus PATH --run training/runs/mini --minutes 120
    python -m training.export --run training/runs/mini --out server/models/qwen-mini
"""

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM

from server.core.tasks import load_tasks
from server.core.tokenizer import ChatTokenizer
from training.bag import BagOfTokens, train_bag
from training.corpus import ReplyRow, SentimentRow, read_openers, read_replies, read_sentiment
from training.examples import IGNORED, Example, Renderer, check_rendering

# How often a source is drawn compared with its size.
SENTIMENT_SOURCES = {"openers": 6.0}
SENTIMENT_CLASSES = {
    ("zh", "positive"): 0.18, ("zh", "negative"): 0.18, ("zh", "neutral"): 0.10,
    ("en", "positive"): 0.19, ("en", "negative"): 0.18, ("en", "neutral"): 0.17,
}  # fmt: skip
# Share of the reply examples drawn from each kind of row.
REPLY_KINDS = {"openers": 0.50, "caring": 0.27, "friendly": 0.07, "support": 0.13, "empathy": 0.03}
MAX_ROW_TOKENS = 160
FINAL_LR = 5e-5
WARMUP = 0.01
EMA_DECAY = 0.998
BATCH_TOKENS = 3000
POOL = 1500
LEARN_TEXT = 0.3
DROP_TOKEN = 0.08


class SentimentSampler:
    """Draws labelled texts with fixed shares of languages and labels."""

    def __init__(self, rows: Sequence[SentimentRow], tokenizer: ChatTokenizer, rng: random.Random):
        self._rng = rng
        self._by_class: dict[tuple[str, str], list[tuple[list[int], str]]] = defaultdict(list)
        self._weights: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in rows:
            ids = tokenizer.encode_text(row.text.strip())[: MAX_ROW_TOKENS - 8]
            key = (row.lang, row.label)
            self._by_class[key].append((ids, row.label))
            self._weights[key].append(SENTIMENT_SOURCES.get(row.source, 1.0))
        self._classes = [key for key in SENTIMENT_CLASSES if self._by_class[key]]
        for weights in self._weights.values():
            for i in range(1, len(weights)):
                weights[i] += weights[i - 1]

    def draw(self, renderer: Renderer) -> Example:
        """One text; mostly with a few tokens dropped, now and then learning the text itself."""
        shares = [SENTIMENT_CLASSES[key] for key in self._classes]
        [key] = self._rng.choices(self._classes, shares)
        [(ids, label)] = self._rng.choices(self._by_class[key], cum_weights=self._weights[key])
        if self._rng.random() < LEARN_TEXT:
            return renderer.sentiment(ids, label, True)
        kept = [i for i in ids if self._rng.random() > DROP_TOKEN] or ids
        return renderer.sentiment(kept, label, False)


class ReplySampler:
    """Draws conversations: mostly one turn, some with earlier turns of the same kind."""

    def __init__(self, rows: Sequence[ReplyRow], tokenizer: ChatTokenizer, rng: random.Random):
        self._rng = rng
        self._pairs: dict[tuple[str, str], list[tuple[list[int], str, list[int]]]] = defaultdict(
            list
        )
        for row in rows:
            kind = _reply_kind(row)
            if kind is None:
                continue
            user = tokenizer.encode_text(row.user.strip())
            reply = tokenizer.encode_text(row.reply.strip())
            if len(user) + len(reply) <= MAX_ROW_TOKENS - 30:
                self._pairs[kind, row.lang].append((user, row.label or "neutral", reply))
        self._keys = list(self._pairs)
        self._shares = [
            REPLY_KINDS[kind] / sum(other == kind for other, _ in self._keys)
            for kind, _ in self._keys
        ]

    def draw(self, renderer: Renderer, with_label: bool) -> Example:
        while True:
            [key] = self._rng.choices(self._keys, self._shares)
            turns = self._rng.choices([1, 2, 3], [0.8, 0.15, 0.05])[0]
            *past, (user, label, reply) = self._rng.choices(self._pairs[key], k=turns)
            history = [(past_user, past_reply) for past_user, _, past_reply in past]
            example = renderer.reply(history, user, label if with_label else None, reply)
            if len(example.ids) <= MAX_ROW_TOKENS:
                return example


def batches(draw: Callable[[], Example], rng: random.Random) -> Iterator[list[Example]]:
    """Endless batches of similar length, so that little of BATCH_TOKENS is padding."""
    while True:
        pool = sorted((draw() for _ in range(POOL)), key=lambda e: len(e.ids))
        cut: list[list[Example]] = [[]]
        for example in pool:
            if (len(cut[-1]) + 1) * len(example.ids) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        yield from cut


def _reply_kind(row: ReplyRow) -> str | None:
    if row.source == "openers":
        return "openers"
    if row.source == "ms_chitchat":
        return row.persona if row.persona in REPLY_KINDS else None
    if row.source == "empathy_reddit":
        return "empathy"
    return "support" if len(row.reply) <= 60 and len(row.user) <= 60 else None


def forward_behind(
    model: Qwen2ForCausalLM, prefix: Sequence[int], examples: Sequence[Example], device: str
) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a target, and those targets: (N, C), (N,).

    The prefix is computed once and its keys and values, gradient included, are expanded
    to all rows.
    """
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full((len(examples), longest), IGNORED)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = torch.tensor(example.ids)
        # Position t predicts t + 1; the first target is never one (it is a turn marker).
        targets[i, : len(example.ids) - 1] = torch.tensor(example.targets[1:])
    shared = DynamicCache()
    model.model(torch.tensor([list(prefix)], device=device), past_key_values=shared)
    cache = DynamicCache()
    for i, layer in enumerate(shared.layers):
        cache.update(
            layer.keys.expand(len(examples), -1, -1, -1),
            layer.values.expand(len(examples), -1, -1, -1),
            i,
        )
    hidden = model.model(ids.to(device), past_key_values=cache).last_hidden_state
    targets = targets.to(device)
    chosen = targets != IGNORED
    return hidden[chosen], targets[chosen]


class FusedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of hidden states against the tied embeddings, in chunks.

    Gradients are made in the same pass, so the (N, V) logits never exist at once; that
    takes less than half the time of a linear layer and F.cross_entropy on a CPU. The
    method is that of Liger-Kernel's fused linear cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embeddings: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        """hidden: (N, C), embeddings: (V, C), targets: (N,), weights: (N,)."""
        narrow, wide = embeddings.to(torch.bfloat16), hidden.to(torch.bfloat16)
        grad_hidden = torch.empty_like(wide)
        grad_embeddings = torch.zeros_like(embeddings)
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(targets), 512):
            chunk = slice(begin, begin + 512)
            target, weight = targets[chunk, None], weights[chunk, None]
            logprobs = F.log_softmax((wide[chunk] @ narrow.T).float(), dim=-1)
            total -= (logprobs.gather(1, target) * weight).sum()
            grad = logprobs.exp_().scatter_add_(1, target, -torch.ones_like(weight))
            grad = grad.mul_(weight).to(torch.bfloat16)
            grad_hidden[chunk] = grad @ narrow
            grad_embeddings += grad.T @ wide[chunk]
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_embeddings)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_embeddings = ctx.saved_tensors
        return grad_hidden * grad, grad_embeddings * grad, None, None


def loss_of(
    model: Qwen2ForCausalLM,
    prefix: Sequence[int],
    examples: Sequence[Example],
    device: str,
    label_ids: Tensor | None,
) -> tuple[Tensor, float]:
    """The loss to minimise and, for the log, the mean over its main targets.

    In a batch of labels a label weighs about ten times a token of text.
    """
    hidden, targets = forward_behind(model, prefix, examples, device)
    if label_ids is not None:
        is_label = torch.isin(targets, label_ids)
        weights = torch.where(is_label, 1.0, 0.1) / is_label.sum()
    else:
        weights = torch.full(targets.shape, 0.5 / len(targets), device=device)
    loss = FusedCrossEntropy.apply(hidden, model.lm_head.weight, targets, weights)
    return loss, loss.item()


@torch.no_grad()
def evaluate(
    model: Qwen2ForCausalLM, renderer: Renderer, rows: Sequence[SentimentRow],
    tokenizer: ChatTokenizer, device: str,
) -> dict[str, float]:  # fmt: skip
    """Three-way accuracy and accuracy on polar rows alone, per language."""
    values = list(renderer.label_ids)
    label_ids = torch.tensor([renderer.label_ids[v][0] for v in values], device=device)
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(rows, key=lambda row: len(row.text))
    for begin in range(0, len(ordered), 100):
        batch = ordered[begin : begin + 100]
        examples = [
            renderer.sentiment(tokenizer.encode_text(r.text.strip())[:400], r.label, False)
            for r in batch
        ]
        hidden, targets = forward_behind(model, renderer.instructions, examples, device)
        scores = model.lm_head(hidden[torch.isin(targets, label_ids)])[:, label_ids]
        for row, score in zip(batch, scores.tolist(), strict=True):
            best = max(range(len(values)), key=score.__getitem__)
            right[f"{row.lang}_three_way"].append(values[best] == row.label)
            if row.label != "neutral":
                is_positive = score[values.index("positive")] > score[values.index("negative")]
                right[f"{row.lang}_polar"].append(is_positive == (row.label == "positive"))
    return {key: round(sum(hits) / len(hits), 4) for key, hits in right.items()}


def new_model(vocab_size: int, end_id: int, bag: BagOfTokens) -> Qwen2ForCausalLM:
    """Random weights but for the embeddings, which start from the bag-of-tokens classifier."""
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=704, max_position_embeddings=2048,
        tie_word_embeddings=True, rope_theta=10_000.0, bos_token_id=0, eos_token_id=end_id,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        embeddings = bag.embeddings.weight
        model.model.embed_tokens.weight.copy_(embeddings / embeddings.std() * 0.03)
    return model


def learning_rate(progress: float, peak: float) -> float:
    if progress < WARMUP:
        return peak * progress / WARMUP
    return FINAL_LR + (peak - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("server/models/qwen-mini"))
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--init", type=Path, help="checkpoint folder to start from, not anew")
    parser.add_argument("--minutes", type=float, default=120.0, help="length of the whole run")
    parser.add_argument("--label-share", type=float, default=0.4, help="batches of labels, 0 to 1")
    parser.add_argument("--peak-lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(args.tokenizer))
    task = load_tasks()["sentiment"]
    renderer = Renderer(tokenizer, task)
    openers = read_openers()
    texts = read_sentiment(args.corpus / "sentiment_train.jsonl.gz")
    dev = read_sentiment(args.corpus / "sentiment_dev.jsonl.gz")
    seen = {row.text for row in dev}
    texts += [
        SentimentRow(user, label, lang, "openers")
        for user, label, lang in sorted({(r.user, str(r.label), r.lang) for r in openers})
        if user not in seen
    ]
    replies = read_replies(args.corpus / "replies_train.jsonl.gz")
    check_rendering(renderer, tokenizer, task, texts, replies)

    bag = train_bag(texts, tokenizer, list(renderer.label_ids), args.run / "bag.pt")
    model = new_model(tokenizer.vocab_size, renderer.end, bag)
    if args.init is not None:
        model.load_state_dict(Qwen2ForCausalLM.from_pretrained(args.init).state_dict())
    model.to(args.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.peak_lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    used = [row for row in replies if _reply_kind(row) is not None]
    replies = bag.label_replies(used, texts, tokenizer) + openers
    sentiment = SentimentSampler(texts, tokenizer, rng)
    reply = ReplySampler(replies, tokenizer, rng)

    checkpoint = args.run / "checkpoint.pt"
    elapsed, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        elapsed, step = state["elapsed"], state["step"]
        rng.seed(step)

    def save() -> None:
        state = {
            "model": model.state_dict(), "average": average.state_dict(),
            "optimizer": optimizer.state_dict(), "elapsed": elapsed, "step": step,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    label_ids = torch.tensor([i for ids in renderer.label_ids.values() for i in ids])
    label_ids = label_ids.to(args.device)
    streams = {
        "label": (renderer.instructions, batches(lambda: sentiment.draw(renderer), rng)),
        "reply": (renderer.persona, batches(lambda: reply.draw(renderer, True), rng)),
        "plain": (renderer.plain, batches(lambda: reply.draw(renderer, False), rng)),
    }
    replies_share = 1 - args.label_share
    shares = {
        "label": args.label_share, "reply": 0.88 * replies_share, "plain": 0.12 * replies_share
    }  # fmt: skip
    total_s = args.minutes * 60
    losses: dict[str, list[float]] = defaultdict(list)
    begin, saved = time.thread_time(), elapsed
    with (args.run / "log.jsonl").open("a") as log:
        while elapsed < total_s:
            progress = elapsed / total_s
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.peak_lr)
            [kind] = rng.choices(list(shares), list(shares.values()))
            prefix, stream = streams[kind]
            learned = label_ids if kind == "label" else None
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss, value = loss_of(model, prefix, next(stream), args.device, learned)
                loss.backward()
            losses[kind].append(value)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(model)
            step += 1
            now = time.thread_time()
            elapsed, begin = elapsed + now - begin, now
            if elapsed - saved > min(300, total_s / 5) or elapsed >= total_s:
                saved = elapsed
                save()
                with torch.autocast(args.device, dtype=torch.bfloat16):
                    scores = evaluate(average.module, renderer, dev, tokenizer, args.device)
                line = {"minutes": round(elapsed / 60, 1), "step": step}
                line |= {kind: round(sum(x) / len(x), 4) for kind, x in losses.items()} | scores
                losses.clear()
                print(json.dumps(line), flush=True)
                log.write(json.dumps(line) + "\n")
                log.flush()
                begin = time.thread_time()


if __name__ == "__main__":
    main()
