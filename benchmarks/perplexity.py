"""The quality loss of each dtype: perplexity of prose, compared with float32 of the same model.

    python -m benchmarks.perplexity --model DIR --dtype int8 int4

The text is the project's own, Chinese and English. Its perplexity varies by half a percent because
it is short; the divergence from float32 shows small losses better. Prints a table and, last, one
line of JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.qwen import QwenModel, load_qwen

TEXTS = [Path(__file__).parent / "data" / f"prose_{language}.txt" for language in ("zh", "en")]
STEP_ROWS = 256


@dataclass(frozen=True)
class Quality:
    """The quality of a dtype.

    divergence: mean Kullback-Leibler divergence from float32, in nats. same_top: share of the
    positions with the same likeliest token as in float32.
    """

    perplexity: float
    divergence: float
    same_top: float


@torch.inference_mode()
def logprobs(model: QwenModel, ids: Sequence[int], vocab_size: int) -> Tensor:
    """Log-probabilities of the next token after each but the last: (T - 1, V)."""
    memory, cache = model.new_memory(len(ids), len(ids)), KVCache()
    assert memory.reserve(cache, len(ids))
    rows = []
    for begin in range(0, len(ids) - 1, STEP_ROWS):
        part = ids[begin : min(begin + STEP_ROWS, len(ids) - 1)]
        positions = range(begin, begin + len(part))
        [[hidden]] = model.forward([Segment(part, positions, cache)])
        rows.append(model.logits(hidden)[:, :vocab_size].log_softmax(-1))
    return torch.cat(rows)


def compare(texts: Sequence[Sequence[int]], ours: Iterable[Tensor],
            reference: Iterable[Tensor]) -> Quality:  # fmt: skip
    """ours, reference: the result of `logprobs` for each text."""
    loss = divergence = num_same = num_tokens = 0.0
    for ids, mine, theirs in zip(texts, ours, reference, strict=True):
        loss -= mine.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        divergence += (theirs.exp() * (theirs - mine)).sum().item()
        num_same += (mine.argmax(-1) == theirs.argmax(-1)).sum().item()
        num_tokens += len(mine)
    return Quality(math.exp(loss / num_tokens), divergence / num_tokens, num_same / num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8", "int4"])
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = [tokenizer.encode(path.read_text(encoding="utf-8")).ids for path in TEXTS]
    config, vocab_size = read_model_config(args.model), tokenizer.get_vocab_size()
    reference: list[Tensor] = []
    table = {}
    for dtype in ("float32", *args.dtype):
        begin = time.perf_counter()
        model = load_qwen(args.model, config, dtype)
        loading_s = time.perf_counter() - begin
        ours = [logprobs(model, ids, vocab_size) for ids in texts]
        reference = reference or ours
        table[dtype] = quality = compare(texts, ours, reference)
        print(f"{dtype:9} perplexity {quality.perplexity:.2f}, "
              f"{quality.perplexity / table['float32'].perplexity - 1:+.2%}; divergence "
              f"{quality.divergence:.4f}; same top token {quality.same_top:.3f}; "
              f"loaded in {loading_s:.1f} s", flush=True)  # fmt: skip
    print(json.dumps({dtype: asdict(quality) for dtype, quality in table.items()}))


if __name__ == "__main__":
    main()
