"""Trains the bundled tokenizer: byte-pair encoding with Qwen's splitting rule and markers."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from training.corpus import read_replies, read_sentiment
from training.examples import trained_prompts

# The splitting rule of the Qwen2 tokenizer (transformers, tokenization_qwen2.py).
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How often an English line counts. The corpus has twice as much Chinese, whose unspaced phrases
# would leave English 3,100 of 16,000 tokens and split the words that express a mood.
ENGLISH_WEIGHT = 6
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen1.5's ChatML, with its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}"
    "{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `vocab_size` ids in which every label of every task is one token."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(m, special=True, normalized=False) for m in MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=3,
    )
    backend.train_from_iterator(_lines(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _lines(corpus: Path) -> Iterator[str]:
    labels = [label.text for task in trained_prompts().tasks.values() for label in task.labels]
    # So often that each label is merged into one token early.
    yield from labels * 20_000 * ENGLISH_WEIGHT
    for row in read_sentiment(corpus / "sentiment_train.jsonl.gz"):
        yield from [row.text] * _weight(row.lang)
    for reply in read_replies(corpus / "replies_train.jsonl.gz"):
        yield from [reply.user, reply.reply] * _weight(reply.lang)


def _weight(lang: str) -> int:
    return ENGLISH_WEIGHT if lang == "en" else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=20_000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    train_tokenizer(args.corpus, args.vocab_size).save_pretrained(args.out)
