"""Results are committed whole or not at all, and damage is noticed when they are read."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from workflow_scripts.errors import StoreError
from workflow_scripts.store.digests import PREFIX, digest, file_digests
from workflow_scripts.store.files import write_atomically
from workflow_scripts.store.results import Result, Store, checksum

ARRAYS: dict[str, np.ndarray] = {
    "latents": np.linspace(-2, 2, 3 * 4 * 5 * 5, dtype=np.float16).reshape(3, 4, 5, 5),
    "images": (np.arange(3 * 8 * 8 * 3) % 251).astype(np.uint8).reshape(3, 8, 8, 3),
}
INFO = {"seconds": 1.5, "device": "cpu", "host": "here", "versions": {"zarr": zarr.__version__}}
KINDS: dict[str, np.ndarray] = {
    "float16": np.array([[0.5, -0.0], [65504, 6e-8]], dtype=np.float16),
    "float32": np.array([1e-45, 3.4e38, np.pi], dtype=np.float32),
    "float64": np.array([np.pi]),
    "zeros": np.zeros((2, 3), np.float32),
    "int64": np.array([-(2**63), 2**63 - 1]),
    "uint8": np.arange(256, dtype=np.uint8),
    "zero integers": np.zeros(4, np.int64),
    "nothing": np.zeros((0, 4, 2, 2), np.float16),
    "one number": np.array(2.5),
    "holes": np.array([np.nan, 1.0, np.inf], dtype=np.float32),
    "a transposed view": np.arange(24, dtype=np.float32).reshape(2, 3, 4).T,
    "every other": np.arange(24, dtype=np.float32)[::2],
}


def result(name: str = "ant", **parts: Any) -> Result:
    return Result("sample", name, {"stage": "sample", "class": name, "recipe": 1, "seed": 0, **parts})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def committed(store: Store) -> Store:
    store.commit(result(), ARRAYS, INFO)
    return store


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        np.testing.assert_array_equal(array, right[name])


# ---------------------------------------------------------------- names


def test_a_digest_is_that_of_the_canonical_json() -> None:
    expected = hashlib.sha256(b'{"a":[1,2.5,null],"b":{"c":true,"d":"x"}}').hexdigest()
    assert digest({"b": {"d": "x", "c": True}, "a": [1, 2.5, None]}) == expected
    assert digest({"a": 1}) != digest({"a": 1.5}) != digest({"a": "1.5"})
    with pytest.raises(ValueError):
        digest({"a": float("nan")})


def test_a_result_is_at_the_place_that_its_recipe_names(committed: Store) -> None:
    path = committed.root / "sample.zarr" / "ant" / result().digest[:PREFIX]
    assert committed.path(result()) == path
    assert (path / "zarr.json").is_file()
    assert committed.exists(result())
    assert not committed.exists(result("bee"))
    assert not committed.exists(result(seed=1))
    assert result(seed=1).place != result().place


# ---------------------------------------------------------------- commit and read


def test_what_is_committed_is_read_back(committed: Store) -> None:
    stored = committed.read(result())
    same(stored.arrays, ARRAYS)
    assert list(committed.read(result(), "images").arrays) == ["images"]


@pytest.mark.parametrize("array", KINDS.values(), ids=KINDS)
def test_any_array_is_read_back_to_the_bit(array: np.ndarray, store: Store) -> None:
    store.commit(result(), {"x": array}, {})
    again = store.read(result()).arrays["x"]
    assert (again.dtype, again.shape) == (array.dtype, array.shape)
    assert again.tobytes() == array.tobytes()


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "folder per array"])
def test_an_array_is_mapped_without_reading_it_whole(packed: bool, committed: Store) -> None:
    if not packed:
        unpack(committed.path(result()))
    for name, array in ARRAYS.items():
        mapped = committed.mapped(result(), name)
        assert isinstance(mapped, np.memmap) and mapped.dtype == array.dtype
        np.testing.assert_array_equal(mapped, array)
        np.testing.assert_array_equal(mapped[[2, 0]], array[[2, 0]])
    for wanted, name in ((result(), "other"), (result("bee"), "images")):
        with pytest.raises(StoreError, match="stillhouse verify"):
            committed.mapped(wanted, name)


def test_the_record_says_where_a_result_comes_from(committed: Store) -> None:
    record = committed.record(result())
    assert record == committed.read(result()).record
    assert record["recipe"] == result().recipe
    assert record["digest"] == result().digest == digest(record["recipe"])
    assert record["checksums"] == {name: checksum(array) for name, array in ARRAYS.items()}
    assert {key: record[key] for key in INFO} == INFO
    assert record["created"].endswith("Z")


def test_zarr_itself_can_read_a_result(committed: Store) -> None:
    path = committed.path(result())
    assert zarr.open_group(str(path), mode="r").attrs["digest"] == result().digest
    with ZipStore(path / "arrays.zip", mode="r") as packed:
        group = zarr.open_group(packed, mode="r")
        assert set(group.array_keys()) == set(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(np.asarray(group[name][...]), array)


def test_one_chunk_per_array_and_two_files(committed: Store) -> None:
    path = committed.path(result())
    assert [file.name for file in files(path)] == ["arrays.zip", "zarr.json"]
    with zipfile.ZipFile(path / "arrays.zip") as packed:
        assert sorted(packed.namelist()) == [
            "images/c.0.0.0.0",
            "images/zarr.json",
            "latents/c.0.0.0.0",
            "latents/zarr.json",
            "zarr.json",
        ]
        for name, array in ARRAYS.items():
            metadata = json.loads(packed.read(f"{name}/zarr.json"))
            assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == list(array.shape)
            assert metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
        assert json.loads(packed.read("latents/zarr.json"))["fill_value"] == "NaN", "a hole shows"
        assert "consolidated_metadata" not in json.loads(packed.read("zarr.json"))


def unpack(path: Path) -> None:
    """Lay a result out as it was once: a folder per array beside the record."""
    with zipfile.ZipFile(path / "arrays.zip") as packed:
        for name in packed.namelist():
            if name != "zarr.json":
                packed.extract(name, path)
    (path / "arrays.zip").unlink()


def test_results_with_a_folder_per_array_are_read(committed: Store) -> None:
    unpack(committed.path(result()))
    same(committed.read(result()).arrays, ARRAYS)
    assert list(committed.read(result(), "images").arrays) == ["images"]


def test_nothing_is_shared_between_results(committed: Store) -> None:
    committed.commit(result("bee"), ARRAYS, INFO)
    committed.commit(result(seed=1), ARRAYS, INFO)
    found = {file.relative_to(committed.root).parts[:3] for file in files(committed.root)}
    assert found == {Path(r.place).parts for r in (result(), result("bee"), result(seed=1))}


@pytest.mark.parametrize("name", ["two words", "käfer", "犬", 'n\'00 "q"', "a.b", "0", "con%20"])
def test_classes_may_have_any_name_that_a_folder_has(name: str, store: Store) -> None:
    store.commit(result(name), ARRAYS, INFO)
    same(store.read(result(name)).arrays, ARRAYS)


def test_the_first_of_two_commits_stays(committed: Store) -> None:
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files(committed.root)}
    committed.commit(result(), ARRAYS, INFO | {"host": "elsewhere"})
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files(committed.root)} == before


def test_a_commit_replaces_what_remains_of_a_result_without_its_record(committed: Store) -> None:
    (committed.path(result()) / "zarr.json").unlink()
    assert not committed.exists(result())
    committed.commit(result(), ARRAYS, INFO)
    same(committed.read(result()).arrays, ARRAYS)


# ---------------------------------------------------------------- damage


def damaged(committed: Store) -> None:
    with pytest.raises(StoreError) as caught:
        committed.read(result())
    message = str(caught.value)
    assert "class ant" in message
    assert str(committed.path(result())) in message
    assert "stillhouse verify" in message


@pytest.mark.parametrize("name", list(ARRAYS))
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_bit_is_noticed(place: float, name: str, committed: Store) -> None:
    path = committed.path(result()) / "arrays.zip"
    content = bytearray(path.read_bytes())
    array = ARRAYS[name].tobytes()
    content[content.index(array) + round(place * (len(array) - 1))] ^= 1
    path.write_bytes(content)
    damaged(committed)
    other = next(key for key in ARRAYS if key != name)
    np.testing.assert_array_equal(committed.read(result(), other).arrays[other], ARRAYS[other])


def member(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    """Change a file in the zip (None: leave it out), so that the zip itself is in order."""

    def repack(path: Path) -> None:
        with zipfile.ZipFile(path / "arrays.zip") as packed:
            content = {key: packed.read(key) for key in packed.namelist()}
        with zipfile.ZipFile(path / "arrays.zip", "w") as packed:
            for key, old in content.items():
                if (new := change(old) if key == name else old) is not None:
                    packed.writestr(key, new)

    return repack


IMAGES, METADATA = "images/c.0.0.0.0", "images/zarr.json"
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated chunk": member(IMAGES, lambda old: old[:100]),
    "empty chunk": member(IMAGES, lambda old: b""),
    "longer chunk": member(IMAGES, lambda old: bytes(10_000)),
    "missing chunk": member(IMAGES, lambda old: None),
    "missing chunk of floats": member("latents/c.0.0.0.0", lambda old: None),
    "missing metadata of an array": member(METADATA, lambda old: None),
    "empty metadata of an array": member(METADATA, lambda old: b""),
    "truncated metadata of an array": member(METADATA, lambda old: old[:80]),
    "other metadata of an array": member(METADATA, lambda old: b"{}"),
    "metadata that is a list": member(METADATA, lambda old: b"[]"),
    "missing arrays": lambda path: (path / "arrays.zip").unlink(),
    "empty arrays": lambda path: os.truncate(path / "arrays.zip", 0),
    "truncated arrays": lambda path: os.truncate(path / "arrays.zip", 300),
    "arrays that are no zip": lambda path: (path / "arrays.zip").write_bytes(bytes(300)),
    "missing record": lambda path: (path / "zarr.json").unlink(),
    "empty record": lambda path: os.truncate(path / "zarr.json", 0),
    "truncated record": lambda path: os.truncate(path / "zarr.json", 80),
    "record without content": lambda path: (path / "zarr.json").write_text("{}"),
    "record that is a list": lambda path: (path / "zarr.json").write_text("[]"),
    "record that is no text": lambda path: (path / "zarr.json").write_bytes(b"\xff\xfe\x00"),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed(damage: Callable[[Path], Any], committed: Store) -> None:
    damage(committed.path(result()))
    damaged(committed)


@pytest.mark.parametrize(
    "damage", ["missing record", "empty record", "record without content", "record that is a list"]
)
def test_a_damaged_record_is_explained_when_read_alone(damage: str, committed: Store) -> None:
    DAMAGE[damage](committed.path(result()))
    with pytest.raises(StoreError, match="class ant"):
        committed.record(result())


def test_flipped_bits_in_metadata_never_give_other_arrays(committed: Store) -> None:
    """Whatever happens to a byte of a result, reading gives the arrays that were stored, or a StoreError."""
    random = np.random.default_rng(0)
    path = committed.path(result())
    unexplained = []
    for file, count in ((path / "arrays.zip", 150), (path / "zarr.json", 60)):
        content = file.read_bytes()
        for at in random.choice(len(content), count, replace=False):
            broken = bytearray(content)
            broken[at] ^= 1 << int(random.integers(7))
            file.write_bytes(broken)
            try:
                same(committed.read(result()).arrays, ARRAYS)
            except StoreError:
                pass
            except Exception as error:
                unexplained.append((str(file.relative_to(path)), bytes(broken[max(0, at - 12) : at + 12]), repr(error)))
        file.write_bytes(content)
    assert not unexplained, "\n".join(map(str, unexplained))


def test_a_record_of_something_else_is_noticed(committed: Store) -> None:
    committed.commit(result(seed=1), {"images": ARRAYS["images"]}, INFO)
    shutil.rmtree(committed.path(result()))
    shutil.copytree(committed.path(result(seed=1)), committed.path(result()))
    damaged(committed)


# ---------------------------------------------------------------- small files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "down" / "score.json"
    write_atomically(path, "first")
    for name in ("fsync", "replace"):
        owner = os if name == "fsync" else Path
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                write_atomically(path, "second")
        assert [file.name for file in path.parent.iterdir()] == ["score.json"]
        assert path.read_text() == "first"
    write_atomically(path, b"second")
    assert path.read_text() == "second"


@pytest.mark.parametrize("where", ["file/score.json", "file/deep/score.json"])
def test_a_folder_that_is_a_file_is_explained(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"score\.json: cannot be written"):
        write_atomically(tmp_path / where, "text")


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_a_files_digest_is_that_of_its_bytes(size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (bytes(size), b"\1" * size, b"\1" * (size + 1)):
        path.write_bytes(content)
        for _ in range(2):
            assert file_digests([path], tmp_path / "cache")[0] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("note", ["", "{", "[]", '{"seen": 3}', '{"sha256": 3}', "null"])
def test_a_damaged_note_of_a_files_digest_does_no_harm(note: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 << 20))
    first = file_digests([path], tmp_path / "cache")[0]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(note)
    assert file_digests([path], tmp_path / "cache")[0] == first
