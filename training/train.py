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
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from server.core.text.tokenizer import ChatTokenizer
from training.bag import BagOfTokens, train_bag
from training.corpus import (
    ReplyRow,
    SentimentRow,
    read_openers,
    read_own_texts,
    read_replies,
    read_sentiment,
)
from training.examples import (
    IGNORED,
    LABEL,
    Example,
    Renderer,
    check_rendering,
    trained_prompts,
)
from training.teacher import Probabilities, Teacher, fragment, patchwork, train_teacher

# How often a source is drawn compared with its size.
# SST-2 is phrases cut from few reviews.
SENTIMENT_SOURCES = {
    "openers": 6.0, "own": 6.0,
    "sst2_train": 0.4, "tweeteval_sentiment_val": 2.0, "vader_amazon": 2.0,
}  # fmt: skip
# English is harder, so it gets more; there the model leans to the positive, as the teacher did.
SENTIMENT_CLASSES = {
    ("zh", "positive"): 0.12, ("zh", "negative"): 0.12, ("zh", "neutral"): 0.10,
    ("en", "positive"): 0.18, ("en", "negative"): 0.28, ("en", "neutral"): 0.20,
}  # fmt: skip
# Share of the reply examples drawn from each kind of row.
REPLY_KINDS = {"openers": 0.50, "caring": 0.27, "friendly": 0.07, "support": 0.13, "empathy": 0.03}
MAX_ROW_TOKENS = 160
# Share of fragments and patchworks among the texts of which the label is learned, and how many
# of each are made.
FRAGMENTS = 0.6
NUM_FRAGMENTS = {"zh": 70_000, "en": 170_000}
NUM_PATCHWORKS = {"zh": 100_000, "en": 400_000}
FINAL_LR = 2e-5
# A token's own row is learned in few of the steps.
EMBEDDINGS_LR = 4.0
WARMUP = 0.01
EMA_DECAY = 0.998
BATCH_TOKENS = 3000
POOL = 1500
LEARN_TEXT = 0.06
DROP_TOKEN = 0.1
# Share of the teacher in what is learned of a row that has a label: the label is the noisier.
TEACHER_SHARE = 0.8
# Share of the film reviews, which come in lower case and cut into words, that are put as typed.
AS_TYPED = 0.5
# What tells a question, and the marks that end a question and a statement.
QUESTIONS = {
    "zh": ("吗|呢|什么|几|多少|哪|谁|怎么|是不是|有没有", "？。"),
    "en": (
        r"(?i)^(what|when|where|which|who|why|how|can|could|do|does|did|is|are|will|would)\b",
        "?.",
    ),
}

# Token ids and the label probabilities to learn.
Judged = tuple[list[int], Sequence[float]]
# Its text, language and label probabilities.
Fragment = tuple[str, str, Sequence[float]]


class SentimentSampler:
    """Draws labelled texts with fixed shares of languages and labels, and fragments."""

    def __init__(
        self, rows: Sequence[SentimentRow], judged: Probabilities, values: Sequence[str],
        fragments: Sequence[Fragment],
        tokenizer: ChatTokenizer, rng: random.Random,
    ) -> None:  # fmt: skip
        """judged: (rows, labels), the teacher's view; fragments: texts that have only that."""
        self._rng = rng
        self._by_class: dict[tuple[str, str], list[Judged]] = defaultdict(list)
        self._weights: dict[tuple[str, str], list[float]] = defaultdict(list)
        given = np.array([row.label for row in rows])[:, None] == np.array(values)
        targets = TEACHER_SHARE * judged + (1 - TEACHER_SHARE) * given
        for row, probabilities in zip(rows, targets.tolist(), strict=True):
            key = (row.lang, row.label)
            for text in spellings(row, rng):
                ids = tokenizer.encode_text(text)[: MAX_ROW_TOKENS - 8]
                self._by_class[key].append((ids, probabilities))
                self._weights[key].append(SENTIMENT_SOURCES.get(row.source, 1.0))
        self._classes = [key for key in SENTIMENT_CLASSES if self._by_class[key]]
        for weights in self._weights.values():
            for i in range(1, len(weights)):
                weights[i] += weights[i - 1]
        self._fragments: dict[tuple[str, str], list[Judged]] = defaultdict(list)
        for text, lang, probabilities in fragments:
            best = max(zip(probabilities, values, strict=True))[1]
            self._fragments[lang, best].append((tokenizer.encode_text(text), probabilities))

    def draw(self, renderer: Renderer) -> Example:
        """One text; mostly with a few tokens dropped, now and then learning the text itself."""
        shares = [SENTIMENT_CLASSES[key] for key in self._classes]
        [key] = self._rng.choices(self._classes, shares)
        # With the same shares: drawn as they come, most would be positive, and what is doubtful
        # would seem so, too.
        if self._rng.random() < FRAGMENTS:
            ids, probabilities = self._rng.choice(self._fragments[key])
            return renderer.sentiment(ids, probabilities, False)
        [(ids, probabilities)] = self._rng.choices(
            self._by_class[key], cum_weights=self._weights[key]
        )
        if self._rng.random() < LEARN_TEXT:
            return renderer.sentiment(ids, probabilities, True)
        kept = [i for i in ids if self._rng.random() > DROP_TOKEN] or ids
        return renderer.sentiment(kept, probabilities, False)


def spellings(row: SentimentRow, rng: random.Random) -> list[str]:
    """The text as people may type it, in one way or more."""
    text = row.text.strip()
    if row.source.startswith("sst"):
        return [as_typed(text) if rng.random() < AS_TYPED else text]
    return with_and_without_mark(text, row.lang) if row.source in ("openers", "own") else [text]


def as_typed(text: str) -> str:
    """A review of the Stanford treebanks as people write: "it 's bad ." as "It's bad."."""
    text = re.sub(r" (?=(?:[,.;:!?)]|'\w|n't))|(?<=\() ", "", text)
    return text[:1].upper() + text[1:]


def with_and_without_mark(text: str, lang: str) -> list[str]:
    """A short line as it is and, if it has no mark at its end, with the usual one.

    In the corpus a full stop goes with complaints, for chats have none.
    """
    if not text[-1].isalnum():
        return [text]
    asks, marks = QUESTIONS[lang]
    return [text, text + marks[0 if re.search(asks, text) else 1]]


def judged_fragments(
    texts: Sequence[SentimentRow], replies: Sequence[ReplyRow], teacher: Teacher,
    rng: random.Random, path: Path,
) -> list[Fragment]:  # fmt: skip
    """Whole lines of the reply corpus, fragments of everything and patchworks of fragments, as
    the teacher sees them.

    That takes some minutes; read from `path` if it is there.
    """
    judged: list[Fragment] = joblib.load(path) if path.exists() else []
    if judged:
        return judged
    for lang, num_fragments in NUM_FRAGMENTS.items():
        lines = [line for r in replies if r.lang == lang for line in (r.user, r.reply)]
        sources = lines + [row.text for row in texts if row.lang == lang]
        drawn = [fragment(rng.choice(sources), lang, rng) for _ in range(num_fragments)]
        drawn += [patchwork(sources, lang, rng) for _ in range(NUM_PATCHWORKS[lang])]
        drawn += rng.sample(lines, min(len(lines), num_fragments // 4))
        drawn = sorted({line for line in drawn if line.strip()})
        probabilities = teacher.judge(drawn, lang).tolist()
        judged += [(text, lang, p) for text, p in zip(drawn, probabilities, strict=True)]
    joblib.dump(judged, path)
    return judged


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
            line = row.user.strip()
            lines = with_and_without_mark(line, row.lang) if kind == "openers" else [line]
            reply = tokenizer.encode_text(row.reply.strip())
            for user in map(tokenizer.encode_text, lines):
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


def label_replies(
    replies: Sequence[ReplyRow], texts: Sequence[SentimentRow], teacher: Teacher
) -> list[ReplyRow]:
    """The same rows with the sentiment of the user's line: the known one, or the teacher's."""
    known = {row.text: row.label for row in texts}
    labelled = []
    for lang in ("zh", "en"):
        rows = [row for row in replies if row.lang == lang]
        best = teacher.judge([row.user for row in rows], lang).argmax(-1)
        for row, i in zip(rows, best.tolist(), strict=True):
            labelled.append(replace(row, label=known.get(row.user, teacher.values[i])))
    return labelled


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
    """Hidden states and what each is to predict, or IGNORED: (B, T, C), (B, T).

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
    return hidden, targets.to(device)


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
        """hidden: (N, C), embeddings: (V, C), targets, weights: (N, K), K targets each."""
        narrow, wide = embeddings.to(torch.bfloat16), hidden.to(torch.bfloat16)
        grad_hidden = torch.empty_like(wide)
        grad_embeddings = torch.zeros_like(embeddings)
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(targets), 512):
            chunk = slice(begin, begin + 512)
            target, weight = targets[chunk], weights[chunk]
            logprobs = F.log_softmax((wide[chunk] @ narrow.T).float(), dim=-1)
            total -= (logprobs.gather(1, target) * weight).sum()
            grad = logprobs.exp_().mul_(weight.sum(-1, keepdim=True))
            grad = grad.scatter_add_(1, target, -weight).to(torch.bfloat16)
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
    label_ids: Tensor,
) -> tuple[Tensor, float]:
    """The loss to minimise, and its value for the log.

    In a batch of labels a label weighs about ten times a token of text. Its distribution is
    learned as one target for each label, weighted by its probability.
    """
    states, targets = forward_behind(model, prefix, examples, device)
    chosen = targets != IGNORED
    hidden, targets = states[chosen], targets[chosen, None]
    is_label = targets[:, 0] == LABEL
    if num := int(is_label.sum()):
        targets = targets.repeat(1, len(label_ids))
        targets[is_label] = label_ids
        weights = torch.full(targets.shape, 0.1 / len(label_ids), device=device)
        weights[is_label] = torch.tensor([e.probabilities for e in examples], device=device)
        weights /= num
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
    values, label_ids = renderer.values, torch.tensor(renderer.label_ids, device=device)
    right: dict[str, list[bool]] = defaultdict(list)
    ordered = sorted(rows, key=lambda row: len(row.text))
    for begin in range(0, len(ordered), 100):
        batch = ordered[begin : begin + 100]
        examples = [
            renderer.sentiment(tokenizer.encode_text(r.text.strip())[:400], [1.0], False)
            for r in batch
        ]
        hidden, targets = forward_behind(model, renderer.instructions, examples, device)
        scores = model.lm_head(hidden[targets == LABEL])[:, label_ids]
        for row, score in zip(batch, scores.tolist(), strict=True):
            best = max(range(len(values)), key=score.__getitem__)
            right[f"{row.lang}_three_way"].append(values[best] == row.label)
            if row.label != "neutral":
                is_positive = score[values.index("positive")] > score[values.index("negative")]
                right[f"{row.lang}_polar"].append(is_positive == (row.label == "positive"))
    return {key: round(sum(hits) / len(hits), 4) for key, hits in right.items()}


def new_model(vocab_size: int, end_id: int) -> Qwen2ForCausalLM:
    """The bundled model's shape with random weights."""
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=704, max_position_embeddings=2048,
        # Tied, what a token tells of the mood would drown in what predicts it.
        tie_word_embeddings=False, rope_theta=10_000.0, bos_token_id=0, eos_token_id=end_id,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def start_from_bag(model: Qwen2ForCausalLM, bag: BagOfTokens) -> None:
    """Takes the embeddings from the bag-of-tokens classifier."""
    embeddings = bag.embeddings.weight
    model.model.embed_tokens.weight.copy_(embeddings / embeddings.std() * 0.03)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)


@torch.no_grad()
def start_from(model: Qwen2ForCausalLM, folder: Path, vocab: Mapping[str, int]) -> None:
    """Copies the weights of a checkpoint, whose tokenizer may be another one.

    vocab: ids of the tokens of `model`. Each starts as the mean of those the checkpoint cuts it
    into, which is its own row where both know it.
    """
    former = AutoTokenizer.from_pretrained(folder)
    ids = former.get_vocab()
    cut = former.backend_tokenizer.model.tokenize
    weights = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    tokens = sorted(vocab, key=vocab.__getitem__)
    pieces = [[ids[t]] if t in ids else [piece.id for piece in cut(t)] for t in tokens]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.stack([weights[name][of_token].mean(0) for of_token in pieces])
    model.load_state_dict(weights)


def compile_elementwise(model: Qwen2ForCausalLM) -> None:
    """Fuses what surrounds the matrix products, which saves a third of a step's time on a CPU.

    Attention stays as it is: its cache is an argument that changes in the course of a step.
    """
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            module.compile(dynamic=True)
    rotate = torch.compile(modeling_qwen2.apply_rotary_pos_emb, dynamic=True)
    modeling_qwen2.apply_rotary_pos_emb = rotate


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
    parser.add_argument("--label-share", type=float, default=0.75, help="batches of labels, 0 to 1")
    # A batch has a hundred labels where it has thousands of words, and they are noisy: at
    # three times this rate the loss of the labels stays where it is.
    parser.add_argument("--peak-lr", type=float, default=3e-4)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    vocab = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer = ChatTokenizer(vocab)
    prompts = trained_prompts()
    renderer = Renderer(tokenizer, prompts)
    openers = read_openers()
    texts = read_sentiment(args.corpus / "sentiment_train.jsonl.gz")
    dev = read_sentiment(args.corpus / "sentiment_dev.jsonl.gz")
    seen = {row.text for row in dev}
    texts += [
        SentimentRow(user, label, lang, "openers")
        for user, label, lang in sorted({(r.user, str(r.label), r.lang) for r in openers})
        if user not in seen
    ]
    texts += [row for row in read_own_texts() if row.text not in seen]
    replies = read_replies(args.corpus / "replies_train.jsonl.gz")
    check_rendering(renderer, tokenizer, prompts, texts, replies)

    teacher = train_teacher(texts, renderer.values, args.run / "teacher.joblib")
    model = new_model(tokenizer.vocab_size, renderer.end)
    if args.init is not None:
        start_from(model, args.init, vocab.get_vocab())
    else:
        start_from_bag(model, train_bag(texts, tokenizer, renderer.values, args.run / "bag.pt"))
    model.to(args.device)
    model.train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY)).eval()
    if args.compile:
        compile_elementwise(model)
    embeddings = model.model.embed_tokens.weight
    others = [p for p in model.parameters() if p is not embeddings]
    optimizer = torch.optim.AdamW(
        [{"params": others, "scale": 1.0}, {"params": [embeddings], "scale": EMBEDDINGS_LR}],
        lr=args.peak_lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True,
    )  # fmt: skip
    fragments = judged_fragments(texts, replies, teacher, rng, args.run / "fragments.joblib")
    sentiment = SentimentSampler(
        texts, teacher.out_of_fold, teacher.values, fragments, tokenizer, rng
    )
    used = [row for row in replies if _reply_kind(row) is not None]
    reply = ReplySampler(label_replies(used, texts, teacher) + openers, tokenizer, rng)

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

    label_ids = torch.tensor(renderer.label_ids, device=args.device)
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
                group["lr"] = group["scale"] * learning_rate(progress, args.peak_lr)
            [kind] = rng.choices(list(shares), list(shares.values()))
            prefix, stream = streams[kind]
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss, value = loss_of(model, prefix, next(stream), args.device, label_ids)
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
