"""Runs one engine and measures the cases read from stdin. Imports no other engine."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engines.measuring import answer


def make(name: str, model: Path) -> Any:
    """The engine of that name. Imports only this engine (see the package's docstring)."""
    kind, _, weights = name.partition("-")
    match kind:
        case "ours":
            from benchmarks.engines.ours import Ours

            return Ours(model, weights)
        case "transformers":
            from benchmarks.engines.transformers import Transformers

            return Transformers(model, weights)
        case "llama.cpp":
            from benchmarks.engines.llama import LlamaCpp

            return LlamaCpp(model, has_flash_attention=not weights.endswith("-noflash"))
        case "openvino":
            from benchmarks.engines.openvino import OpenVino

            return OpenVino(model)
        case "bert":
            from benchmarks.engines.transformers import Bert

            return Bert()
    raise SystemExit(f"there is no engine {name!r}")


def main() -> None:
    name, model = sys.argv[1], Path(sys.argv[2])
    begin = time.perf_counter()
    engine = make(name, model)
    print(json.dumps({"ready_s": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
