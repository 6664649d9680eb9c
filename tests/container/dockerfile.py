"""Runs the lines of a Dockerfile in a Debian root, where no container engine is at hand.

Knows the instructions and flags that the project's Dockerfile uses and refuses all others. The base
image is stood in for by debootstrap: the same Debian release and the same minor version of Python,
but Debian's build of it, in an environment at /usr/local, where the image has its own.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

# Debian's Python of each release.
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Instruction:
    """One instruction, its flags without dashes, and the rest of the line."""

    name: str
    flags: tuple[str, ...]
    rest: str


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile, with continued lines joined as Docker joins them."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\[ \t]*\n", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        flags = []
        while (found := re.match(r"\s*--(\S+)\s+", rest)) is not None:
            flags.append(found[1])
            rest = rest[found.end() :]
        yield Instruction(name.upper(), tuple(flags), rest.strip())


@dataclass
class Image:
    """A root folder, and what the instructions so far have set."""

    root: Path
    cache: Path
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0"
    volumes: list[str] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def build(self, context: Path) -> None:
        """Carries out the Dockerfile of the folder `context`."""
        for instruction in instructions((context / "Dockerfile").read_text(encoding="utf-8")):
            print(instruction.name, *instruction.flags, instruction.rest, flush=True)
            self._carry_out(instruction, context)

    def _carry_out(self, instruction: Instruction, context: Path) -> None:
        match instruction.name:
            case "FROM":
                self._bootstrap(self._expanded(instruction.rest))
            case "WORKDIR":
                self.workdir = instruction.rest
                self._inside(self.workdir).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(shlex.split(instruction.rest), context)
            case "RUN":
                self._run(instruction)
            case _:
                self._set(instruction)

    def _set(self, instruction: Instruction) -> None:
        match instruction.name:
            case "ARG":
                name, _, default = instruction.rest.partition("=")
                self.arguments[name] = default
            case "ENV":
                pairs = [word.partition("=") for word in shlex.split(instruction.rest)]
                self.environment |= {name: value for name, _, value in pairs}
            case "USER":
                self.user = instruction.rest
            case "VOLUME":
                self.volumes.append(instruction.rest)
            case "EXPOSE":
                self.ports.append(instruction.rest)
            case "HEALTHCHECK":
                self.healthcheck = json.loads(instruction.rest.removeprefix("CMD "))
            case "CMD":
                self.command = json.loads(instruction.rest)
            case name:
                raise NotImplementedError(name)

    def _inside(self, path: str) -> Path:
        return self.root / PurePosixPath(self.workdir, path).relative_to("/")

    def _expanded(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda found: self.arguments[found[1]], text)

    def _bootstrap(self, image: str) -> None:
        found = re.fullmatch(r"python:([\d.]+)-slim-(\w+)", image)
        assert found, image
        python, suite = found.groups()
        assert PYTHONS[suite] == python, f"Debian {suite} has Python {PYTHONS[suite]}"
        packages_folder = self.cache / "debs"
        packages_folder.mkdir(parents=True, exist_ok=True)
        packages = "--include=python3,python3-venv,ca-certificates"
        options = ["--variant=minbase", f"--cache-dir={packages_folder}", packages]
        subprocess.run(["debootstrap", *options, suite, str(self.root)], check=True)
        self.environment["PATH"] = BASE_PATH
        self.run(["/usr/bin/python3", "-m", "venv", "/usr/local"])

    def _copy(self, words: list[str], context: Path) -> None:
        *sources, target = words
        for source in sources:
            path = context / source
            assert is_in_context(source, context), f"{source} is left out by .dockerignore"
            if path.is_dir():
                leave_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, self._inside(target), ignore=leave_out)
            else:
                shutil.copy(path, self._inside(target))

    def _run(self, instruction: Instruction) -> None:
        binds = []
        for flag in instruction.flags:
            kind, _, value = flag.partition("=")
            options = dict(part.split("=", 1) for part in value.split(","))
            assert kind == "mount" and options["type"] == "cache", flag
            target = options["target"]
            folder = self.cache / "mounts" / target.strip("/").replace("/", "-")
            binds.append((folder, target))
        shell = ["/bin/sh", "-c", instruction.rest]
        self.run(shell, {**self.arguments, **pip_settings()}, [*binds, *pip_folders()])

    def run(
        self,
        command: list[str],
        more: dict[str, str] | None = None,
        binds: list[tuple[Path, str]] | None = None,
    ) -> None:
        """Runs a command to its end, as a RUN does."""
        subprocess.run(self.words(command, binds or []), env=self._env(more), check=True)

    def start(self, command: list[str], more: dict[str, str]) -> "subprocess.Popen[str]":
        """Starts a command as a container's, with a pipe for what it prints."""
        out = subprocess.PIPE
        words, env = self.words(command, []), self._env(more)
        return subprocess.Popen(words, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)

    def words(self, command: list[str], binds: list[tuple[Path, str]]) -> list[str]:
        """The command in namespaces of its own, so that its mounts and processes end with it."""
        mounts = [f"mount --rbind /dev {self.root}/dev", f"mount -t proc proc {self.root}/proc"]
        for source, target in binds:
            source.mkdir(parents=True, exist_ok=True)
            place = self.root / target.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            mounts.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(place))}")
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
        workdir = f"cd {shlex.quote(self.workdir)} && exec {shlex.join(command)}"
        chroot = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root)]
        script = " && ".join([*mounts, f"exec {shlex.join([*chroot, '/bin/sh', '-c', workdir])}"])
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*namespaces, "sh", "-c", script]

    def _env(self, more: dict[str, str] | None) -> dict[str, str]:
        home = "/root" if self.user == "0" else self._home()
        return {"HOME": home, **self.environment, **(more or {})}

    def _home(self) -> str:
        for line in (self.root / "etc/passwd").read_text(encoding="utf-8").splitlines():
            name, _, number, _, _, home, _ = line.split(":")
            if self.user in (name, number):
                return home
        raise KeyError(self.user)


def is_in_context(source: str, context: Path) -> bool:
    """Whether .dockerignore lets a file or folder at the top through; the last match decides."""
    is_in = True
    for line in (context / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if fnmatch.fnmatch(source, line.lstrip("!")):
            is_in = line.startswith("!")
    return is_in


def pip_settings() -> dict[str, str]:
    """The configuration of this environment's pip, as variables; options of a RUN come first."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    settings = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_RETRIES": "1"}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        _, _, option = key.rpartition(".")
        settings[f"PIP_{option.upper().replace('-', '_')}"] = shlex.split(value)[0]
    return settings


def pip_folders() -> list[tuple[Path, str]]:
    """Folders of this machine that the configuration names, under their names in the root."""
    folders = set()
    for word in " ".join(pip_settings().values()).split():
        # The pages of an index name files beside its folder.
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            is_index = word.startswith("file://")
            folders.add(path.parent if is_index or path.is_file() else path)
    return [(folder, str(folder)) for folder in sorted(folders)]


def missing() -> str | None:
    """Why nothing can be run here."""
    if os.geteuid() != 0:
        return "needs root, for chroot"
    tools = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    return f"needs {', '.join(tools)}" if tools else None
