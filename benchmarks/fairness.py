"""How long other requests wait while a heavy request runs, over HTTP.

    python -m benchmarks.fairness --model DIR [--rounds N] [--load NAME ...] [server options]

Starts a server with the remaining options and measures, alone and beside each heavy load:

- the time to the first token of a short chat whose sentiment is not cached;
- the longest pause between two tokens of a running stream, compared with the pause beside one other
  stream;
- the seconds of the heavy request when nothing else runs. With `--before TREE`, a checkout of
  another commit, the server of that commit is measured in turns with this one;
- the latency of `GET /health`, sent every 10 ms. The event loop answers it without the engine, so
  the worst latency shows how long the loop was blocked. "own lag" is how late this process itself
  was woken; if it is large, too, the machine was busy with something else.

A load is sent again with other texts after each response, so that it lasts. Waits longer than 15 s
count as 15 s and are shown with ">". At the end another server, with
`--max-kv-mib 512 --max-prefix-mib 0`, shows how much resident memory changing chats need above the
idle server. Prints tables and, last, one line of JSON.
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.figures import summary
from benchmarks.heavy import Request, Writer
from benchmarks.servers import Server, our_server
from benchmarks.waiting import MAX_WAIT_S, WINDOW_S, Load, Probe, Waiting

MAX_PROMPT_TOKENS = 30_000
# Limits of the timed requests, which would otherwise take minutes, or never end.
NUM_TIMED_PROMPT_TOKENS = 4_000
NUM_TIMED_CHOICE_TOKENS = 64
# For the chat template and the varying length of sentences.
RESERVED_TOKENS = 60

ALONE, ONE_STREAM, ALL = "alone", "one other stream", "all"
HEAVY = {
    "classify": "classify: 256 texts",
    "own-labels": "classify: 64 texts, 50 own labels",
    "choices": "chat: n 16, endless",
    "long-prompt": "chat: a long prompt",
    "decisions": "decisions: 400 questions",
}
TITLES = {ALONE: ALONE, ONE_STREAM: ONE_STREAM, **HEAVY, ALL: "all at once"}

MEMORY_OPTIONS = ("--max-kv-mib", "512", "--max-prefix-mib", "0")
NUM_CHATS = 16
# Prompt tokens of each of NUM_CHATS simultaneous chats: rising above what fits, then falling.
CHAT_TOKENS = (100, 400, 1600, 100)
REST_S = 8.0  # the server returns memory to the system after five

Figures = dict[str, dict[str, float]]  # by load and name


@dataclass(frozen=True)
class Subject:
    """A measured server and its requests."""

    waiting: Waiting
    writer: Writer
    loads: dict[str, Load]
    timed: dict[str, Callable[[], Request]]  # shorter requests of the same kind as the load's
    num_context: int
    num_prompt_tokens: int


@asynccontextmanager
async def subject(server: Server) -> AsyncIterator[Subject]:
    """Writes requests for the server's tokenizer, and warms the server up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.base_url, timeout=None, limits=limits) as http:
        model = (await http.get("models")).json()["data"][0]

        async def tokens_of(text: str) -> list[int]:
            url = server.base_url.removesuffix("/v1") + "/tokenize"
            tokens: list[int] = (await http.post(url, json={"prompt": text})).json()["tokens"]
            return tokens

        # The bias repeats one word: every token gives a piece of text, and the text never ends.
        writer = Writer(model["id"], {str((await tokens_of(" the"))[0]): 100})
        per_sentence = len(await tokens_of(writer.text(200))) / 200
        num_context = model["context_length"]
        num_tokens = min(MAX_PROMPT_TOKENS, int(num_context * 0.95) - RESERVED_TOKENS)
        num_timed = min(NUM_TIMED_PROMPT_TOKENS, num_tokens)

        def long_prompt() -> Request:
            return writer.long_prompt(int(num_tokens / per_sentence))

        timed: dict[str, Callable[[], Request]] = {
            "classify": writer.classify,
            "own-labels": writer.own_labels,
            "choices": lambda: writer.choices(max_tokens=NUM_TIMED_CHOICE_TOKENS),
            "long-prompt": lambda: writer.long_prompt(int(num_timed / per_sentence)),
            "decisions": writer.decisions,
        }
        lasting = {**timed, "choices": writer.choices, "long-prompt": long_prompt}
        loads: dict[str, Load] = {name: [write] for name, write in lasting.items()}
        loads[ALL] = list(lasting.values())
        waiting = Waiting(http, writer)
        await waiting.ttfts_ms()
        for request in (writer.classify(16), writer.own_labels(2), writer.decisions(4)):
            await waiting.seconds(request)
        yield Subject(waiting, writer, loads, timed, num_context, num_tokens)


# --- waiting times --------------------------------------------------------------------


async def measure(servers: Sequence[Server], names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Figures of the first server. Of a second one, only heavy requests are timed."""
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    async with AsyncExitStack() as stack:
        subjects = [await stack.enter_async_context(subject(server)) for server in servers]
        for number in range(1, rounds + 1):
            _print_progress(f"round {number} of {rounds}: {ALONE}")
            for load, values in (await _round(subjects, names)).items():
                for name, value in values.items():
                    figures[load][name].append(value)
            _print_progress("\n")
    return {
        "context": subjects[0].num_context,
        "prompt_tokens": subjects[0].num_prompt_tokens,
        "waiting": {
            load: {name: summary(each) for name, each in values.items()}
            for load, values in figures.items()
        },
    }


async def _round(subjects: Sequence[Subject], names: Sequence[str]) -> Figures:
    ours, *before = subjects
    waiting = ours.waiting
    figures: Figures = {ALONE: _ttfts(await waiting.ttfts_ms())}
    async with waiting.probed() as probe:
        await asyncio.sleep(WINDOW_S / 2)
    figures[ALONE] |= _health(probe)
    figures[ONE_STREAM] = {"pause_ms": await waiting.longest_pause_ms([ours.writer.stream])}
    for name in names:
        _print_progress(f", {name}")
        earlier = [(await _timed(each, name))[0] for each in before]
        own, probe = await _timed(ours, name)
        values = {**own, **_health(probe), **_ttfts(await waiting.ttfts_ms(ours.loads[name]))}
        values["pause_ms"] = await waiting.longest_pause_ms(ours.loads[name])
        values["ttft_ratio"] = values["ttft_ms"] / figures[ALONE]["ttft_ms"]
        values["pause_ratio"] = values["pause_ms"] / figures[ONE_STREAM]["pause_ms"]
        for each in earlier if "seconds" in own else ():
            values["before_s"] = each["seconds"]
            values["throughput_ratio"] = each["seconds"] / own["seconds"]
        figures[name] = values
    await waiting.idle()
    return figures


async def _timed(subject: Subject, name: str) -> tuple[dict[str, float], Probe]:
    """The seconds of the request alone, if it is timed; latencies of /health beside the load."""
    waiting, load, figures = subject.waiting, subject.loads[name], dict[str, float]()
    await waiting.idle()
    async with waiting.probed() as probe:
        if name in subject.timed:
            figures["seconds"] = await waiting.seconds(subject.timed[name]())
        if subject.timed.get(name) not in load:
            async with waiting.beside(load):
                await asyncio.sleep(WINDOW_S)
    return figures, probe


def _ttfts(measured_ms: list[float]) -> dict[str, float]:
    return {"ttft_ms": statistics.median(measured_ms), "ttft_worst_ms": max(measured_ms)}


def _health(probe: Probe) -> dict[str, float]:
    in_order = sorted(probe.answers_ms)
    return {
        "health_p99_ms": in_order[int(0.99 * len(in_order))],
        "health_worst_ms": in_order[-1],
        "own_lag_ms": max(probe.own_lags_ms),
    }


def _print_progress(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


# --- memory ---------------------------------------------------------------------------


async def measure_memory(server: Server) -> dict[str, float]:
    """Resident MiB of the idle server, then the MiB above it."""
    process_id = server.process_id
    async with subject(server) as ours:
        idle_mib = await _resident_at_rest_mib(ours, process_id)
        _reset_peak(process_id)
        for num_tokens in CHAT_TOKENS:
            await _chats(ours, min(num_tokens, int(ours.num_context * 0.9) - RESERVED_TOKENS))
        chats_mib = _resident_mib(process_id, "VmHWM") - idle_mib
        _reset_peak(process_id)
        async with ours.waiting.beside(ours.loads[ALL]):
            await asyncio.sleep(WINDOW_S)
        loads_mib = _resident_mib(process_id, "VmHWM") - idle_mib
        rest_mib = await _resident_at_rest_mib(ours, process_id) - idle_mib
    memory = {
        "idle server": idle_mib,
        "chats that grow and shrink, at most": chats_mib,
        "all loads at once, at most": loads_mib,
        "at rest again": rest_mib,
    }
    return {name: round(mib, 1) for name, mib in memory.items()}


async def _resident_at_rest_mib(ours: Subject, process_id: int) -> float:
    await ours.waiting.idle()
    await asyncio.sleep(REST_S)
    return _resident_mib(process_id, "VmRSS")


async def _chats(ours: Subject, num_tokens: int) -> None:
    """Sends NUM_CHATS chats at once and waits for their short answers."""
    texts = [ours.writer.text(max(1, num_tokens // 23)) for _ in range(NUM_CHATS)]
    requests = [ours.writer.endless(text, max_tokens=32) for text in texts]
    await asyncio.gather(*(ours.waiting.seconds(request) for request in requests))


def _resident_mib(process_id: int, name: str) -> float:
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    values = dict(line.split(":", 1) for line in status.splitlines())
    return int(values[name].split()[0]) / 1024


def _reset_peak(process_id: int) -> None:
    """Resets VmHWM to the current resident size; see clear_refs in proc(5)."""
    Path(f"/proc/{process_id}/clear_refs").write_text("5", encoding="utf-8")


# --- tables ---------------------------------------------------------------------------

# Title, goal, figure, statistic over the rounds, decimals.
COLUMNS = [
    ("TTFT, ms", "", "ttft_ms", "median", 0),
    ("worst", "", "ttft_worst_ms", "max", 0),
    ("/ alone", "≤3, all ≤6", "ttft_ratio", "median", 1),
    ("pause, ms", "", "pause_ms", "median", 0),
    ("/ stream's", "≤3", "pause_ratio", "median", 1),
    ("health p99", "", "health_p99_ms", "median", 0),
    ("worst, ms", "≤50", "health_worst_ms", "max", 0),
    ("own lag, ms", "", "own_lag_ms", "max", 0),
    ("alone, s", "", "seconds", "median", 1),
    ("before, s", "", "before_s", "median", 1),
    ("before / now", "≥0.95", "throughput_ratio", "median", 2),
]
WIDTH = 13
MAX_RESIDENT_MIB = 560


def print_waiting(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row for each load, with the median or the maximum of the rounds."""
    print(f"\n{'beside':34}" + "".join(f"{title:>{WIDTH}}" for title, *_ in COLUMNS))
    print(f"{'goal':34}" + "".join(f"{goal:>{WIDTH}}" for _, goal, *_ in COLUMNS))
    for load, values in figures.items():
        cells = (_cell(values, *column[2:]) for column in COLUMNS)
        print(f"{TITLES[load]:34}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    print(f"\nevent loop: worst latency of /health {_worst_health(figures):.0f} ms, goal: ≤50")


def _cell(values: dict[str, dict[str, float]], name: str, statistic: str, num_decimals: int) -> str:
    if name not in values:
        return ""
    waited_ms = values.get(name.replace("ratio", "ms"), {}).get(statistic, 0)
    sign = ">" if waited_ms >= MAX_WAIT_S * 1000 else ""
    return f"{sign}{values[name][statistic]:.{num_decimals}f}"


def _worst_health(figures: dict[str, dict[str, dict[str, float]]]) -> float:
    return max(
        each["health_worst_ms"]["max"] for each in figures.values() if "health_p99_ms" in each
    )


def print_memory(memory: dict[str, float]) -> None:
    print(f"\nresident, MiB, with {' '.join(MEMORY_OPTIONS)}; above the idle server")
    for name, mib in memory.items():
        goal = f"   goal: ≤{MAX_RESIDENT_MIB}" if "at most" in name else ""
        print(f"  {name:40} {mib:8.0f}{goal}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="All other options are passed to the server, such as --max-kv-mib 512.",
    )  # fmt: skip
    parser.add_argument("--model", default="auto", help="as the server's own option")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", nargs="+", choices=(*HEAVY, ALL), default=(*HEAVY, ALL))
    parser.add_argument("--tree", type=Path, help="checkout to measure in place of this one")
    parser.add_argument("--before", type=Path, help="checkout to compare throughput with")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    args, options = parser.parse_known_args()
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    options = ["--no-ui", *options]
    result: dict[str, Any] = {"model": model, "options": options, "rounds": args.rounds}
    with ExitStack() as stack:
        trees = [args.tree, args.before] if args.before else [args.tree]
        servers = [stack.enter_context(our_server(model, *options, tree=tree)) for tree in trees]
        result |= asyncio.run(measure(servers, args.load, args.rounds))
    print(f"longest prompt: {result['prompt_tokens']} of {result['context']} tokens")
    print_waiting(result["waiting"])
    if not args.no_memory:
        with our_server(model, *options, *MEMORY_OPTIONS, tree=args.tree) as server:
            result["memory_mib"] = asyncio.run(measure_memory(server))
        print_memory(result["memory_mib"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
