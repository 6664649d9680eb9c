"""Exports a checkpoint to the formats of the peers, once, into benchmarks/cache."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path("benchmarks/cache")
# OpenVINO's own environment: it needs other versions of packages. Made by `make openvino`.
OPENVINO_PYTHON = CACHE / "openvino/bin/python"


def exported(engine: str, checkpoint: Path) -> Path:
    """The model for an engine of `benchmarks.engines`; written unless it exists."""
    kind, _, weights = engine.partition("-")
    match kind:
        case "llama.cpp":
            from benchmarks.gguf_files import gguf_file  # needs llama.cpp

            return gguf_file(checkpoint, export_folder(checkpoint), weights.split("-")[0])
        case "openvino":
            return _openvino_folder(checkpoint, weights)
    return checkpoint


def export_folder(checkpoint: Path) -> Path:
    """The folder of this checkpoint's exports in the cache."""
    weights = (checkpoint / "model.safetensors").resolve()
    state = weights.stat()
    key = f"{weights} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    folder = CACHE / "exports" / f"{checkpoint.resolve().name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _openvino_folder(checkpoint: Path, weights: str) -> Path:
    """The checkpoint, exported by OpenVINO's exporter with its defaults in "int8" or "int4"."""
    folder = export_folder(checkpoint) / f"openvino-{weights}"
    if folder.exists():
        return folder
    if not OPENVINO_PYTHON.exists():
        raise SystemExit(f"{OPENVINO_PYTHON} is missing: `make openvino` installs it")
    unfinished = folder.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run(
        [
            # Not the script `optimum-cli`: it contains the path where it was installed.
            OPENVINO_PYTHON, "-m", "optimum.commands.optimum_cli", "export", "openvino",
            "--model", checkpoint, "--task", "text-generation-with-past",
            "--weight-format", weights, unfinished,
        ],
        check=True,
        stdout=sys.stderr,  # stdout is for the benchmark's JSON
    )  # fmt: skip
    return unfinished.rename(folder)
