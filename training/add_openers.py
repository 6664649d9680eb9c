"""Checks new openers and adds them to the training data and to the test data of replies.

    python -m training.add_openers --out training/data/openers_new.jsonl FILE...

A row is `{"label", "lang", "topic", "users", "replies"}`. Malformed rows are left out and counted;
so are users' lines that are known or similar to a line of the test data. With `--hold-out` one row
in twenty becomes a held-out pair of the test data, which replaces the present pairs. The result
depends on the files alone, so the command can be repeated when they have grown.
"""

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.core.roles.language import language_of
from training.corpus import OWN_DATA
from training.similar import MEASURES, Lines, bare, measured_lines

LABELS = ("positive", "negative", "neutral")
HELD_OUT = 20
PAIRS = MEASURES / "pairs.jsonl"
MAX_LINE, MAX_REPLY = 90, 220


def problem(row: dict[str, Any]) -> str | None:
    """The reason to reject the whole row, or None."""
    if row.get("label") not in LABELS or row.get("lang") not in ("zh", "en"):
        return "unknown label or language"
    lines = [*row.get("users", ()), *row.get("replies", ())]
    if not row.get("users") or not row.get("replies"):
        return "no users or no replies"
    if not all(isinstance(line, str) and line.strip() for line in lines):
        return "an empty line"
    if any(language_of(line) != row["lang"] for line in lines):
        return "a line in another language"
    if max(map(len, row["users"])) > MAX_LINE or max(map(len, row["replies"])) > MAX_REPLY:
        return "a line too long"
    return None


def checked(
    rows: Sequence[dict[str, Any]], known: Lines, measured: Lines
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows to keep, and the number of rows and lines left out for each reason."""
    kept, left_out = [], Counter[str]()
    seen: set[str] = set()
    for row in rows:
        if (reason := problem(row)) is not None:
            left_out[reason] += 1
            continue
        users = []
        for user in dict.fromkeys(line.strip() for line in row["users"]):
            if measured.has_near(user):
                left_out["line near a measured one"] += 1
            elif known.has_same(user) or bare(user) in seen:
                left_out["line known"] += 1
            else:
                users.append(user)
                seen.add(bare(user))
        replies = list(dict.fromkeys(reply.strip() for reply in row["replies"]))
        if users:
            topic = {"topic": row["topic"]} if row.get("topic") else {}
            kept.append({"label": row["label"], "lang": row["lang"], **topic, "users": users,
                         "replies": replies})  # fmt: skip
        else:
            left_out["row without a line"] += 1
    return kept, left_out


def is_held_out(row: dict[str, Any]) -> bool:
    return zlib.crc32(row["users"][0].encode()) % HELD_OUT == 0


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hold-out", action="store_true")
    args = parser.parse_args()
    others = [
        path
        for path in sorted(OWN_DATA.glob("openers_*.jsonl"))
        if path.resolve() != args.out.resolve()
    ]
    known = Lines(user for path in others for row in read(path) for user in row["users"])
    rows = [row for path in args.files for row in read(path)]
    if args.hold_out:
        PAIRS.unlink(missing_ok=True)
    kept, left_out = checked(rows, known, measured_lines())
    held_out = [row for row in kept if args.hold_out and is_held_out(row)]
    # A paraphrase of a held-out line must not be trained on, either.
    held_out_lines = Lines(user for row in held_out for user in row["users"])
    training = []
    for row in kept:
        if row not in held_out:
            users = [user for user in row["users"] if not held_out_lines.has_near(user)]
            left_out["line near a held-out one"] += len(row["users"]) - len(users)
            training += [row | {"users": users}] if users else []
    if args.hold_out:
        write(held_out, PAIRS)
    write(training, args.out)
    counts = Counter((row["lang"], row["label"]) for row in training)
    print(f"{len(training)} rows to {args.out}, {len(held_out)} held out")
    print("rows:", dict(counts), "lines:", sum(len(row["users"]) for row in training))
    print("left out:", dict(left_out))


if __name__ == "__main__":
    main()
