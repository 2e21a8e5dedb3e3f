"""The store of activations on the disk: what a kill, a full disk or a bad disk leaves of it."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cdas_fast.errors import InvalidInputError, StorageError
from cdas_fast.training import activation_store
from cdas_fast.training.activation_store import (
    ALIGNMENT,
    ActivationStore,
    base_key,
    prompt_key,
    source_key,
)

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = {"model": "abc", "layers": [1, 3], "dtype": "bfloat16"}


def key_of(number: int) -> str:
    return base_key([number], 0)


def tensors_of(number: int, scale: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "hidden": torch.randn(scale * (number % 7), 5, generator=generator).bfloat16(),  # some are empty
        "source": torch.randn(3, generator=generator),
    }


def assert_same(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def fill(store: ActivationStore, numbers: Any) -> None:
    with store.writer() as writer:
        for number in numbers:
            writer.add(key_of(number), tensors_of(number))


def only(store: ActivationStore, pattern: str) -> Path:
    (path,) = store.path.glob(pattern)
    return path


def test_entries_come_back_in_another_process(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, range(20))
    for opened in (store, ActivationStore(tmp_path, {**IDENTITY, "layers": (1, 3)})):
        assert opened.find(map(key_of, range(30))) == set(map(key_of, range(20)))
        for number in range(20):
            assert_same(opened.get(key_of(number)), tensors_of(number))
        assert opened.get(key_of(20)) is None
    code = (
        "import sys; from cdas_fast.training.activation_store import *;"
        f"print(ActivationStore(sys.argv[1], {IDENTITY!r}).get({key_of(5)!r})['source'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    assert json.loads(done.stdout) == tensors_of(5)["source"].tolist()


def test_views_are_aligned_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(store, range(9))
        for number in range(9):
            for tensor in (store.get(key_of(number)) or {}).values():
                assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0
    before = only(store, "*.bin").read_bytes()
    found = store.get(key_of(4))
    assert found is not None
    found["hidden"].zero_()
    assert only(store, "*.bin").read_bytes() == before
    assert_same(ActivationStore(tmp_path, IDENTITY).get(key_of(4)), tensors_of(4))


def test_tensors_need_not_be_contiguous_nor_detached(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    whole = torch.arange(12.0, requires_grad=True).view(3, 4)
    with store.writer() as writer:
        writer.add(key_of(0), {"a": whole.T, "b": whole[:, 1], "c": torch.tensor(3, dtype=torch.int64)})
    expected = {"a": whole.T.detach(), "b": whole[:, 1].detach(), "c": torch.tensor(3)}
    assert_same(ActivationStore(tmp_path, IDENTITY).get(key_of(0)), expected)


def test_uncommitted_entries_are_not_there_yet(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    with store.writer() as writer:
        writer.add(key_of(1), tensors_of(1))
        assert store.get(key_of(1)) is None
        writer.commit()
        assert_same(store.get(key_of(1)), tensors_of(1))
        writer.add(key_of(2), tensors_of(2))
        assert ActivationStore(tmp_path, IDENTITY).find([key_of(1), key_of(2)]) == {key_of(1)}


def test_data_reach_the_disk_before_the_lines_that_name_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    synced = []

    def fsync(descriptor: int) -> None:
        data, index = (only(store, f"*.{suffix}").stat() for suffix in ("bin", "jsonl"))
        name = {data.st_ino: "data", index.st_ino: "index"}[os.fstat(descriptor).st_ino]
        synced.append((name, data.st_size > 0, index.st_size > 0))

    with store.writer() as writer:
        monkeypatch.setattr(os, "fsync", fsync)
        writer.add(key_of(1), tensors_of(1))
        assert synced == []
        writer.commit()
        assert synced == [("data", True, False), ("index", True, True)]
        writer.commit()
        assert len(synced) == 2


def test_exception_commits_what_is_whole(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)

    def numbers() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(store, numbers())
    assert_same(ActivationStore(tmp_path, IDENTITY).get(key_of(1)), tensors_of(1))


def test_writer_that_stores_nothing_leaves_nothing(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    with store.writer():
        pass
    assert [path.name for path in store.path.iterdir()] == ["identity.json"]


KILLED = """
import sys
sys.path.insert(0, "tests")
from test_activation_store import *
store = ActivationStore(sys.argv[1], IDENTITY)
with store.writer() as writer:
    print("started", flush=True)
    for number in range(int(sys.argv[2]), 10**6):
        writer.add(key_of(number), tensors_of(number, 50))
        if number % 3 == 0:
            writer.commit()
            print(number, flush=True)
"""


def test_sigkill_at_any_moment_leaves_all_that_was_committed(tmp_path: Path) -> None:
    seconds = random.Random(0)
    known: set[int] = set()
    for run in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(1000 * run)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(seconds.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        told = process.stdout.read().split()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        if told:
            known |= set(range(1000 * run, int(told[-1]) + 1))
        store = ActivationStore(tmp_path, IDENTITY)
        assert store.find(map(key_of, known)) == set(map(key_of, known))
        beyond = store.find(key_of(number) for start in range(0, 5000, 1000) for number in range(start, start + 1000))
        for number in range(5000):
            if key_of(number) in beyond:
                assert_same(store.get(key_of(number)), tensors_of(number, 50))
    assert len(known) > 10


@pytest.mark.parametrize("kept", [0, 1, 20, -1], ids=["nothing", "a byte", "a part", "all but the newline"])
def test_torn_line_is_ignored(kept: int, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, range(1, 4))
    index = only(store, "*.jsonl")
    *lines, last = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines) + last[:kept])
    opened = ActivationStore(tmp_path, IDENTITY)
    assert opened.find(map(key_of, range(5))) == {key_of(1), key_of(2)}
    fill(opened, range(1, 4))
    assert ActivationStore(tmp_path, IDENTITY).find(map(key_of, range(5))) == {key_of(1), key_of(2), key_of(3)}


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("crc32"),
        lambda values: values.update(key="../x"),
        lambda values: values["tensors"]["source"].update(dtype="float99"),
        lambda values: values["tensors"]["source"].update(offset=-64),
        lambda values: values["tensors"]["source"].update(offset=3),
        lambda values: values["tensors"]["source"].update(shape=[-3]),
        lambda values: values["tensors"]["source"].update(shape=[4]),
        lambda values: values["tensors"]["source"].update(dtype="int32"),
        lambda values: values["tensors"].update(other=values["tensors"].pop("source")),
        lambda values: values["tensors"].pop("source"),
        lambda values: values.update(crc32=5),
        lambda values: values["tensors"]["source"].update(offset=2**70),
        lambda values: values.update(tensors=[1]),
    ],
)
def test_wrong_line_is_left_out(change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, [1, 3])
    index = only(store, "*.jsonl")
    first, last = map(json.loads, index.read_text().splitlines())
    change(first)
    index.write_text(json.dumps(first) + "\n[]\nnonsense\n" + json.dumps(last) + "\n")
    with caplog.at_level(logging.WARNING, activation_store.__name__):
        assert ActivationStore(tmp_path, IDENTITY).find([key_of(1), key_of(3)]) == {key_of(3)}
    assert len(caplog.records) == 3


def test_truncated_data_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, range(1, 4))
    data = only(store, "*.bin")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    opened = ActivationStore(tmp_path, IDENTITY)
    assert opened.find(map(key_of, range(5))) == {key_of(1), key_of(2)}
    assert f"expected {len(whole)} bytes of data, got {len(whole) - 1}. It is computed again." in caplog.text
    fill(opened, range(1, 4))
    for number in range(1, 4):
        assert_same(ActivationStore(tmp_path, IDENTITY).get(key_of(number)), tensors_of(number))
    data.unlink()
    assert ActivationStore(tmp_path, IDENTITY).find(map(key_of, range(5))) == {key_of(3)}
    assert "cannot be read (No such file or directory)" in caplog.text


def test_flipped_bit_is_found_and_its_entry_stored_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, range(1, 4))
    data = only(store, "*.bin")
    content = bytearray(data.read_bytes())
    place = json.loads(only(store, "*.jsonl").read_text().splitlines()[1])["tensors"]["source"]["offset"]
    content[place + 5] ^= 4
    data.write_bytes(content)
    opened = ActivationStore(tmp_path, IDENTITY)
    assert opened.get(key_of(2)) is None
    assert f"entry {key_of(2)}: expected the bytes that were stored, got others. It is computed" in caplog.text
    assert opened.find(map(key_of, range(5))) == {key_of(1), key_of(3)}
    fill(opened, range(1, 4))
    for again in (opened, ActivationStore(tmp_path, IDENTITY)):
        assert_same(again.get(key_of(2)), tensors_of(2))


class FullDisk:
    """Room for so many bytes, then half of what is written and an error, as a disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, suffix: str) -> None:
        self.room = room

        class File(io.FileIO):
            def write(file, content: Any) -> int:  # noqa: N805
                if not os.fspath(file.name).endswith(suffix):
                    return super().write(content)
                if self.room <= 0 and len(content) > 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                written = super().write(memoryview(content)[: self.room])
                self.room -= written
                return written

        monkeypatch.setattr(io, "FileIO", File)


@pytest.mark.parametrize("suffix", [".bin", ".jsonl"])
def test_full_disk_keeps_what_was_stored(suffix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    disk = FullDisk(monkeypatch, 1200, suffix)
    stored = []
    message = r"expected 0\.0 MiB free for cached activations, got No space left on device\. Free some space or choose"
    with store.writer() as writer:
        for number in range(1, 100):
            try:
                writer.add(key_of(number), tensors_of(number, 5))
                writer.commit()
            except StorageError as error:
                assert re.search(message, str(error))  # noqa: PT017
                break
            stored.append(number)
        assert len(stored) > 2
        disk.room = 10**6
        following = len(stored) + 2
        writer.add(key_of(following), tensors_of(following))
    found = ActivationStore(tmp_path, IDENTITY)
    failed = [] if suffix == ".bin" else [len(stored) + 1]  # its data were whole, and its line could be written later
    assert found.find(map(key_of, range(200))) == set(map(key_of, [*stored, *failed, following]))
    for number in stored:
        assert_same(found.get(key_of(number)), tensors_of(number, 5))
    assert_same(found.get(key_of(following)), tensors_of(following))


def test_full_disk_ends_the_block_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    FullDisk(monkeypatch, 700, ".bin")
    with pytest.raises(StorageError, match="Free some space"):
        fill(store, range(1, 100))
    assert key_of(1) in ActivationStore(tmp_path, IDENTITY).find([key_of(1)])


def test_too_little_room_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    store = ActivationStore(tmp_path, IDENTITY)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 2**20))
    store.writer(2**20)._close()
    with pytest.raises(StorageError, match=r"expected 1\.5 MiB free for cached activations, got 1 MiB\. Free some"):
        store.writer(3 * 2**19)


def test_two_writers_at_once(tmp_path: Path) -> None:
    one, other = (ActivationStore(tmp_path, IDENTITY) for _ in range(2))
    different = {"source": torch.full((3,), 9.0)}
    with one.writer() as first, other.writer() as second:
        for number in range(10):
            first.add(key_of(number), tensors_of(number))
            second.add(key_of(number), different)
            second.add(key_of(number + 10), tensors_of(number + 10))
            (first if number % 2 else second).commit()
    for store in (ActivationStore(tmp_path, IDENTITY), ActivationStore(tmp_path, IDENTITY)):
        assert store.find(map(key_of, range(30))) == set(map(key_of, range(20)))
        for number in range(20):
            assert_same(store.get(key_of(number)), tensors_of(number))
    assert one.find([key_of(15)]) == {key_of(15)}
    assert_same(other.get(key_of(3)), different)  # it was there first, in this store


def test_stored_key_is_not_stored_again(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    with store.writer() as writer:
        writer.add(key_of(1), tensors_of(1))
        writer.add(key_of(1), tensors_of(2))
        writer.commit()
        size = store.size
        writer.add(key_of(1), tensors_of(2))
        writer.commit()
    assert store.size == size
    assert_same(ActivationStore(tmp_path, IDENTITY).get(key_of(1)), tensors_of(1))


def test_identities_have_folders_of_their_own(tmp_path: Path) -> None:
    one, other = ActivationStore(tmp_path, IDENTITY), ActivationStore(tmp_path, {**IDENTITY, "model": "abd"})
    fill(one, [1])
    assert other.find([key_of(1)]) == set()
    other.remove()
    assert one.path.exists()
    assert [path.name for path in tmp_path.iterdir()] == [one.path.name]
    assert len(one.path.name) == 16


def test_changed_identity_is_refused(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, [1])
    path = store.path / "identity.json"
    path.write_text(path.read_text().replace("abc", "abd"))
    with pytest.raises(StorageError, match=r"identity\.json: expected model 'abc', got model 'abd'\. The folder was"):
        ActivationStore(tmp_path, IDENTITY)
    path.unlink()
    with pytest.raises(StorageError, match=r"expected a file identity\.json, got none\. Delete the folder"):
        ActivationStore(tmp_path, IDENTITY)
    with pytest.raises(InvalidInputError, match="identity of activations: expected JSON values"):
        ActivationStore(tmp_path, {"model": float("nan")})


def test_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, [1])
    (store.path / "thesis.tex").write_text("mine")
    for act in (store.remove, lambda: ActivationStore(tmp_path, IDENTITY)):
        with pytest.raises(StorageError, match=r"expected nothing but cached activations, got thesis\.tex\. Choose"):
            act()
    assert len(list(store.path.iterdir())) == 4
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"folder of cached activations: expected .*file"):
        ActivationStore(tmp_path / "file", IDENTITY)


def test_removed_store_harms_nobody_who_has_it_open(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, range(5))
    reader = ActivationStore(tmp_path, IDENTITY)
    found = store.get(key_of(4))
    with reader.writer() as writer:
        writer.add(key_of(7), tensors_of(7))
        store.remove()
        assert not store.path.exists()
        assert store.size == 0
        store.remove()
        writer.commit()
    assert_same(found, tensors_of(4))
    for number in (2, 3, 7):
        assert_same(reader.get(key_of(number)), tensors_of(number))
    assert store.find([key_of(4)]) == set()
    with pytest.raises(StorageError, match="a folder to write to"):
        reader.writer()
    assert ActivationStore(tmp_path, IDENTITY).find(map(key_of, range(9))) == set()


def test_size_counts_every_file(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, IDENTITY)
    fill(store, range(10))
    fill(store, range(20))
    assert store.size == sum(path.stat().st_size for path in store.path.iterdir())
    assert len(list(store.path.iterdir())) == 5


def test_keys_tell_apart_what_matters() -> None:
    keys = [
        base_key([1, 2, 3], 1),
        base_key([1, 2, 3], 2),
        base_key([12, 3], 1),
        prompt_key([1, 2, 3], [1]),
        prompt_key([1, 2, 3], [1, 2]),
        prompt_key([1, 2], [3, 1]),
        source_key([1, 2, 3], 2, 1, [1]),
        source_key([1, 2, 3], 1, 1, [1]),
        source_key([1, 2, 3], 2, 0, [1]),
        source_key([1, 2, 3], 2, 1, [2]),
    ]
    assert len(set(keys)) == len(keys)
    assert base_key((1, 2, 3), 1) == keys[0]
    assert source_key((1, 2, 3), 2, 1, (1,)) == keys[6]


@pytest.mark.parametrize(
    ("key", "tensors", "message"),
    [
        ("../../etc/passwd", {"a": torch.ones(1)}, "expected 16 to 128 hexadecimal digits"),
        (key_of(0), {}, "expected at least one tensor, got none"),
        (key_of(0), {"a": torch.ones(1, dtype=torch.complex64)}, r"expected float16 or .*, got torch\.complex64"),
    ],
)
def test_what_cannot_be_stored_is_refused(key: str, tensors: Any, message: str, tmp_path: Path) -> None:
    with ActivationStore(tmp_path, IDENTITY).writer() as writer, pytest.raises(InvalidInputError, match=message):
        writer.add(key, tensors)


MEMORY = """
import sys
import torch
from cdas_fast.training.activation_store import ActivationStore, base_key

def resident():
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":") for line in status)
    return [int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

torch.set_num_threads(1)
torch.ones(2**20, dtype=torch.int16)[::1024].sum()
store = ActivationStore(sys.argv[1], {})
before = resident()
keys = [base_key([number], 0) for number in range(64)]
assert store.find(keys) == set(keys)
tensors = [store.get(key)["hidden"] for key in keys]
of_every_page = [int(tensor.view(torch.int16)[::1024].sum()) for tensor in tensors]
assert of_every_page == [2**10 * number for number in range(64)]
print(*(after - earlier for after, earlier in zip(resident(), before)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_views_take_no_anonymous_memory(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, {}).writer() as writer:
        for number in range(64):
            tensor = torch.full((2**20,), number, dtype=torch.int16).view(torch.bfloat16)
            writer.add(base_key([number], 0), {"hidden": tensor})
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    anonymous, of_files = map(int, done.stdout.split())
    assert of_files > 100 * 2**20
    assert anonymous < 24 * 2**20
