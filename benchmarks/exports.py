"""A checkpoint in the formats of the peers, made once in benchmarks/cache."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path("benchmarks/cache")
# An environment of OpenVINO's own, for it needs other versions; `make openvino` makes it.
OPENVINO_PYTHON = CACHE / "openvino/bin/python"


def exported(engine: str, checkpoint: Path) -> Path:
    """What `benchmarks.engines` takes for the engine of that name. Made unless it is there."""
    kind, _, weights = engine.partition("-")
    match kind:
        case "llama.cpp":
            from benchmarks.gguf_files import gguf_file  # only where llama.cpp is measured

            return gguf_file(checkpoint, export_folder(checkpoint), weights.split("-")[0])
        case "openvino":
            return _openvino_folder(checkpoint, weights)
    return checkpoint


def export_folder(checkpoint: Path) -> Path:
    """A folder of the cache for this checkpoint, never the checkpoint's own."""
    weights = (checkpoint / "model.safetensors").resolve()
    state = weights.stat()
    key = f"{weights} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    folder = CACHE / "exports" / f"{checkpoint.resolve().name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _openvino_folder(checkpoint: Path, weights: str) -> Path:
    """The checkpoint as OpenVINO's own exporter writes it by default, in "int8" or "int4"."""
    folder = export_folder(checkpoint) / f"openvino-{weights}"
    if folder.exists():
        return folder
    if not OPENVINO_PYTHON.exists():
        raise SystemExit(f"{OPENVINO_PYTHON} is missing: `make openvino` installs it")
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run(
        [
            # By its module: the script `optimum-cli` names the folder where it was installed.
            OPENVINO_PYTHON, "-m", "optimum.commands.optimum_cli", "export", "openvino",
            "--model", checkpoint, "--task", "text-generation-with-past",
            "--weight-format", weights, unfinished,
        ],
        check=True,
        stdout=sys.stderr,  # for the bench's last line of output is JSON
    )  # fmt: skip
    return unfinished.rename(folder)
