"""Fitted judges in files: what is read is what was written, or it is fitted again."""

import json
import logging
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from server.core.roles import judge_cache, judge_files
from server.core.roles.heads import LinearHead, fit_heads
from server.core.roles.judge_cache import JudgeCache
from server.core.roles.judges import CrossValidation, HeadJudge, Judge, LabelJudge

VALIDATION = CrossValidation(num_examples=1218, accuracy=0.75, log_loss=1 / 3)
HEAD = LinearHead(
    np.array([1e4, -2, 0.3, 0, 5, 1 / 3], np.float32),
    np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32),
    np.array([0.1, -0.0, 1e-30], np.float32),
)
JUDGES: dict[str, Judge] = {
    "head": HeadJudge(17, HEAD, VALIDATION),
    "labels": LabelJudge((-1.25, 1 / 3, -1e300), 1.7, VALIDATION),
    "prior": LabelJudge((-1.25, 0.5)),
    "as they are": LabelJudge(),
}

every_judge = pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)


@pytest.fixture
def cache(tmp_path: Path) -> JudgeCache:
    return JudgeCache(tmp_path / "judges", "model 1")


def kept(cache: JudgeCache, judge: Judge) -> Path:
    """The file that the judge was written to."""
    path = cache.path("key")
    cache.write(path, judge)
    assert path.is_file()
    return path


def assert_same(ours: Judge | None, theirs: Judge) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, HeadJudge) and isinstance(theirs, HeadJudge):
        for name in ("center", "weights", "biases"):
            a, b = getattr(ours.head, name), getattr(theirs.head, name)
            assert a.dtype == b.dtype and a.shape == b.shape
            assert a.tobytes() == b.tobytes()
        assert replace(ours, head=HEAD) == replace(theirs, head=HEAD)
    else:
        assert ours == theirs


def is_same(ours: Judge, theirs: Judge) -> bool:
    try:
        assert_same(ours, theirs)
    except AssertionError:
        return False
    return True


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


# --- what is kept ---------------------------------------------------------------------


@every_judge
def test_what_is_read_is_what_was_written(
    cache: JudgeCache, judge: Judge, caplog: pytest.LogCaptureFixture
) -> None:
    assert_same(cache.read(kept(cache, judge)), judge)
    assert not caplog.records


def test_a_fitted_head_is_read_as_it_was_written(cache: JudgeCache) -> None:
    states = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    for head in fit_heads(states, np.arange(60) % 4):
        judge = HeadJudge(2, head.with_temperature(1.3))
        assert_same(cache.read(kept(cache, judge)), judge)


def test_a_head_is_written_from_any_memory_order(cache: JudgeCache) -> None:
    strided = LinearHead(HEAD.center[::-1], np.asfortranarray(HEAD.weights), HEAD.biases[::-1])
    read = cache.read(kept(cache, HeadJudge(3, strided)))
    assert isinstance(read, HeadJudge)
    assert np.array_equal(read.head.center, strided.center)
    assert np.array_equal(read.head.weights, strided.weights)
    assert np.array_equal(read.head.biases, strided.biases)


def test_a_judge_that_is_read_can_be_used(cache: JudgeCache) -> None:
    path = kept(cache, JUDGES["head"])
    read = cache.read(path)
    path.unlink()
    assert isinstance(read, HeadJudge)
    # Its numbers are in memory of its own, in order.
    states = np.ones((1, 6), np.float32)
    assert np.array_equal(read.head.scores(states), HEAD.scores(states))


def test_a_judge_replaces_the_one_of_the_same_key(cache: JudgeCache) -> None:
    for judge in JUDGES.values():
        assert_same(cache.read(kept(cache, judge)), judge)
    assert len(list(cache.path("key").parent.iterdir())) == 1


def test_a_missing_judge_is_none_without_a_warning(
    cache: JudgeCache, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.read(cache.path("key")) is None
    assert not caplog.records
    kept(cache, JUDGES["head"])
    assert cache.read(cache.path("other")) is None
    assert not caplog.records


# --- keys -----------------------------------------------------------------------------


def test_paths_differ_by_model_and_by_key_and_by_nothing_else(tmp_path: Path) -> None:
    keys: list[Any] = ["a", "b", ["a"], [["a"]], ["a", "b"], ["ab"], [[1, 2], [3]], [[1], [2, 3]]]
    keys += ["1", 1, None, "", [], [""], "中", "\ud800"]
    paths = [
        JudgeCache(tmp_path, model).path(key) for model in ("one", "two", "one ") for key in keys
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.parent == tmp_path for path in paths)
    assert JudgeCache(tmp_path, "one").path(["a", [1, "中"]]) == JudgeCache(tmp_path, "one").path(
        ["a", [1, "中"]]
    )


def test_another_format_is_another_file(cache: JudgeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.path("key")
    monkeypatch.setattr(judge_cache, "FORMAT", judge_cache.FORMAT + 1)
    assert cache.path("key") != before


# --- damaged files --------------------------------------------------------------------


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as opened:
        about = json.loads(opened.metadata()["judge"])
    assert isinstance(about, dict)
    return about


def with_metadata(judge: str | None, other: str = "judge") -> Callable[[Path], None]:
    """The same tensors with other metadata; None is none at all."""

    def damage(path: Path) -> None:
        save_file(load_file(path), path, metadata=None if judge is None else {other: judge})

    return damage


def without(name: str) -> Callable[[Path], None]:
    """Without a part of the metadata."""

    def damage(path: Path) -> None:
        about = metadata_of(path)
        del about[name]
        with_metadata(json.dumps(about))(path)

    return damage


def truncate(length: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:length])

    return damage


def write(content: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def rename_a_tensor(path: Path) -> None:
    tensors, about = load_file(path), metadata_of(path)
    save_file(
        {f"{name}s": tensor for name, tensor in tensors.items()},
        path,
        metadata={"judge": json.dumps(about)},
    )


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": truncate(0),
    "a few bytes": truncate(7),
    "half a header": truncate(60),
    "one byte short": truncate(-1),
    "one byte long": append,
    "a bit": flip_last_bit,
    "garbage": write(random.Random(0).randbytes(500)),
    "ones": write(b"\xff" * 100),
    "text": write(b"not a judge\n" * 30),
    "tensors of other names": rename_a_tensor,
    "no metadata": with_metadata(None),
    "other metadata": with_metadata("{}", "other"),
    "no JSON": with_metadata("{"),
    "no digest": without("digest"),
    "no validation": without("validation"),
    "an empty object": with_metadata("{}"),
    "a list": with_metadata("[]"),
    "null": with_metadata("null"),
    "a number": with_metadata("3"),
    "a string": with_metadata('"digest"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", ["head", "labels"])
def test_a_damaged_file_is_one_warning_and_no_judge(
    cache: JudgeCache, caplog: pytest.LogCaptureFixture, kind: str, damage: Callable[[Path], None]
) -> None:
    path = kept(cache, JUDGES[kind])
    damage(path)
    assert cache.read(path) is None
    [warning] = warnings_of(caplog)
    assert str(path) in warning and "\n" not in warning


def test_a_file_that_cannot_be_read_is_one_warning_and_no_judge(
    cache: JudgeCache, caplog: pytest.LogCaptureFixture
) -> None:
    path = cache.path("key")
    path.mkdir(parents=True)
    assert cache.read(path) is None
    [warning] = warnings_of(caplog)
    assert f"--cache-dir {path.parent}" in warning and "\n" not in warning


def test_a_cache_logs_only_its_first_failure(
    cache: JudgeCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(cache, JUDGES["head"])
    truncate(30)(path)
    fill_the_disk(monkeypatch)
    for _ in range(3):
        assert cache.read(path) is None
        cache.write(path, JUDGES["head"])
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("validation", ["x", [1], {"accuracy": 1.0}, {"nothing": 0}])
def test_a_validation_of_another_form_is_a_damaged_file(
    cache: JudgeCache, caplog: pytest.LogCaptureFixture, validation: object
) -> None:
    path = kept(cache, JUDGES["head"])
    with_metadata(json.dumps(metadata_of(path) | {"validation": validation}))(path)
    assert cache.read(path) is None
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("length", [0.1, 0.5, 0.9, 0.99])
@every_judge
def test_a_file_truncated_anywhere_is_no_judge(
    cache: JudgeCache, judge: Judge, length: float
) -> None:
    path = kept(cache, judge)
    truncate(int(length * path.stat().st_size))(path)
    assert cache.read(path) is None


@pytest.mark.parametrize("kind", ["head", "labels"])
def test_a_changed_byte_never_gives_another_judge(cache: JudgeCache, kind: str) -> None:
    judge = JUDGES[kind]
    path = kept(cache, judge)
    whole = path.read_bytes()
    # In place: a file that is emptied and written again waits for the disk.
    with path.open("r+b", buffering=0) as file:
        for index, byte in enumerate(whole):
            for value in {byte ^ 1, byte ^ 4, 0x20, 0x30, 0xFF} - {byte}:
                file.seek(index)
                file.write(bytes([value]))
                read = cache.read(path)
                assert read is None or is_same(read, judge), (index, whole[index - 10 : index + 10])
            file.seek(index)
            file.write(bytes([byte]))


def test_a_damaged_file_can_be_written_again(cache: JudgeCache) -> None:
    path = kept(cache, JUDGES["head"])
    truncate(30)(path)
    assert cache.read(path) is None
    assert_same(cache.read(kept(cache, JUDGES["labels"])), JUDGES["labels"])


# --- folders that cannot be used ------------------------------------------------------


def test_a_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    cache = JudgeCache(tmp_path / "a" / "b" / "c", "model")
    assert_same(cache.read(kept(cache, JUDGES["head"])), JUDGES["head"])


@pytest.mark.parametrize("below", ["file", "file/judges"])
def test_a_folder_that_cannot_be_created_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, below: str
) -> None:
    (tmp_path / "file").write_text("here")
    cache = JudgeCache(tmp_path / below, "model")
    cache.write(cache.path("key"), JUDGES["head"])
    [warning] = warnings_of(caplog)
    assert "--cache-dir" in warning and str(tmp_path / below) in warning
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_of_the_system_is_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = JudgeCache(Path("/proc/judges"), "model")
    cache.write(cache.path("key"), JUDGES["head"])
    assert len(warnings_of(caplog)) == 1
    assert cache.read(cache.path("key")) is None
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("below", ["file", "file/judges"])
def test_a_file_in_place_of_the_folder_holds_no_judge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, below: str
) -> None:
    (tmp_path / "file").write_text("here")
    cache = JudgeCache(tmp_path / below, "model")
    assert cache.read(cache.path("key")) is None
    assert len(warnings_of(caplog)) <= 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o500)
    try:
        cache = JudgeCache(tmp_path, "model")
        cache.write(cache.path("key"), JUDGES["head"])
    finally:
        tmp_path.chmod(0o700)
    assert len(warnings_of(caplog)) == 1
    assert not list(tmp_path.iterdir())


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        truncate(100)(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(judge_files, "save_file", save_half)


def test_no_partial_file_remains(
    cache: JudgeCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_the_disk(monkeypatch)
    path = cache.path("key")
    cache.write(path, JUDGES["head"])
    [warning] = warnings_of(caplog)
    assert "No space left on device" in warning
    assert not list(path.parent.iterdir())
    assert cache.read(path) is None


def test_a_write_that_fails_leaves_the_judge_that_was_there(
    cache: JudgeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(cache, JUDGES["labels"])
    fill_the_disk(monkeypatch)
    cache.write(path, JUDGES["head"])
    assert_same(cache.read(path), JUDGES["labels"])
    assert list(path.parent.iterdir()) == [path]


def test_a_file_appears_only_when_it_is_complete(
    cache: JudgeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = cache.path("key"), []

    def save_and_look(tensors: dict[str, Any], draft: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, draft, metadata=metadata)
        seen.append((draft != path, draft.parent == path.parent, path.exists()))

    monkeypatch.setattr(judge_files, "save_file", save_and_look)
    cache.write(path, JUDGES["head"])
    assert seen == [(True, True, False)]
    assert list(path.parent.iterdir()) == [path]
