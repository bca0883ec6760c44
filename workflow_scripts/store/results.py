"""The store: one Zarr group per class-level result, at a place that its recipe determines, committed whole or not at all.

``root/<stage>.zarr/<class>/<digest prefix>`` is two files, however many arrays there are: ``zarr.json``, a group whose
attributes are the record (the full recipe, what computed it and when, and a checksum per array), and ``arrays.zip``, a Zarr
zip store with the arrays, uncompressed and one chunk each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from struct import unpack
from typing import Any

import numpy as np

from workflow_scripts.errors import StoreError
from workflow_scripts.store.digests import PREFIX, digest
from workflow_scripts.store.files import TEMPORARY, explain_full_disk, sync_directory, sync_tree

RECORD = "zarr.json"
ARRAYS = "arrays.zip"


@dataclass(frozen=True)
class Result:
    """A class-level result: what it is made from, whether or not it exists yet.

    Attributes:
        recipe: everything that determines it, JSON-serialisable, including ``stage`` and ``class``.
    """

    stage: str
    class_name: str
    recipe: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the recipe, in hexadecimal."""
        return digest(self.recipe)

    @property
    def name(self) -> str:
        """What it is called for people: its class, and what else tells it from the stage's other results of that class."""
        recipe = self.recipe
        if "ipc" in recipe:
            return f"{self.class_name} IPC {recipe['ipc']} seed {recipe['seed']}"
        return f"{self.class_name} k {recipe['k']}" if "k" in recipe else self.class_name

    @property
    def place(self) -> str:
        """Path below the store's root."""
        return f"{self.stage}.zarr/{self.class_name}/{self.digest[:PREFIX]}"


@dataclass(frozen=True)
class Stored:
    """A result as read back: its arrays and its record."""

    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


class Store:
    """Reads and commits results below one directory."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, result: Result) -> Path:
        """Return where a result is, or will be."""
        return self.root / result.place

    def exists(self, result: Result) -> bool:
        """Say whether a result is there; a result is never there in part."""
        return (self.path(result) / RECORD).exists()

    def commit(self, result: Result, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
        """Write a result beside its place, make it durable, and rename it into place.

        Two workers that commit the same result do no harm: the first to arrive stays.

        Args:
            info: JSON-serialisable facts for the record that do not determine the result (device, seconds, versions).

        Raises:
            StoreError: if the disk takes no more; nothing half-written stays.
        """
        import zarr  # imported here because it costs a planner that only asks what exists a second
        from zarr.storage import ZipStore

        final = self.path(result)
        temporary = final.parent / f"{TEMPORARY}{final.name}.{uuid.uuid4().hex}"
        record = {
            "digest": result.digest,
            "recipe": result.recipe,
            "checksums": {name: checksum(array) for name, array in arrays.items()},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **info,
        }
        with explain_full_disk(final):
            try:
                temporary.mkdir(parents=True)
                with ZipStore(temporary / ARRAYS, mode="w") as packed:
                    zarr.create_group(packed)
                    for name, array in arrays.items():
                        zarr.create_array(
                            packed,
                            name=name,
                            data=array,
                            chunks=tuple(max(1, side) for side in array.shape),
                            compressors=None,
                            fill_value=np.nan if array.dtype.kind == "f" else 0,
                            chunk_key_encoding={"name": "default", "separator": "."},
                            config={"write_empty_chunks": True},
                        )
                (temporary / RECORD).write_text(
                    json.dumps({"zarr_format": 3, "node_type": "group", "attributes": record})
                )
                sync_tree(temporary)
                _rename_unless_there(temporary, final)
                sync_directory(final.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def read(self, result: Result, *names: str) -> Stored:
        """Read a result's arrays (all of them, or those named) and its record, comparing checksums.

        Raises:
            StoreError: if it is not there, or is damaged.
        """
        import zarr
        from zarr.storage import LocalStore, ZipStore

        path = self.path(result)
        record = self.record(result)
        try:
            checksums = dict(record["checksums"])
            # Older results have a folder per array in place of the zip.
            kind = ZipStore if (path / ARRAYS).exists() else LocalStore
            with kind(path / ARRAYS if kind is ZipStore else path, read_only=True) as packed:
                arrays = {
                    name: np.asarray(zarr.open_array(packed, path=name, mode="r")[...]) for name in names or checksums
                }
        except Exception as error:  # damaged bytes raise whatever the libraries stumble on
            raise StoreError(
                f"{path}: {result.stage} of class {result.class_name} cannot be read ({error!r}). {_REMEDY}"
            ) from error
        for name, array in arrays.items():
            if checksum(array) != checksums[name]:
                raise StoreError(
                    f"{path}/{name}: {result.stage} of class {result.class_name} does not match its checksum. {_REMEDY}"
                )
        return Stored(arrays, record)

    def mapped(self, result: Result, name: str) -> np.ndarray:
        """Return an array mapped into memory, of which only those parts are read that are looked at.

        Checksums are not compared. Each mapping holds a file open.

        Raises:
            StoreError: if it is not there, or is damaged.
        """
        path = self.path(result)
        try:
            about, file, offset, size = _chunk(path, name)
            shape, kind = about["shape"], np.dtype(about["data_type"])
            if size != kind.itemsize * prod(shape):
                raise ValueError("its size is not that of its shape")
            return np.memmap(file, dtype=kind, mode="r", offset=offset, shape=tuple(shape))
        except Exception as error:  # as in read
            raise StoreError(
                f"{path}/{name}: {result.stage} of class {result.class_name} cannot be read ({error!r}). {_REMEDY}"
            ) from error

    def record(self, result: Result) -> dict[str, Any]:
        """Read a result's record alone.

        Raises:
            StoreError: if it is not there, is damaged, or is that of another result.
        """
        path = self.path(result)
        try:
            record: dict[str, Any] = json.loads((path / RECORD).read_text())["attributes"]
            found = record["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: {result.stage} of class {result.class_name} cannot be read ({error!r}). {_REMEDY}"
            ) from error
        if found != result.digest:
            raise StoreError(
                f"{path}: holds another result than {result.stage} of class {result.class_name}. {_REMEDY}"
            )
        return record

    def everything(self) -> Iterator[Path]:
        """Yield the directory of every result, and of every leftover of an interrupted commit."""
        for stage in sorted(self.root.glob("*.zarr")):
            for class_directory in sorted(path for path in stage.iterdir() if path.is_dir()):
                yield from sorted(path for path in class_directory.iterdir() if path.is_dir())


_REMEDY = "Run `stillhouse verify`, which sets damaged results aside, then run the same command again."


def checksum(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's type, shape and bytes."""
    sha256 = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    sha256.update(np.ascontiguousarray(array).data)
    return sha256.hexdigest()


def _chunk(path: Path, name: str) -> tuple[dict[str, Any], Path, int, int]:
    """Return an array's description, and the file, offset and size of its only chunk, which is not compressed."""
    if not (path / ARRAYS).exists():
        about = json.loads((path / name / RECORD).read_text())
        file = path / name / _key(about)
        return about, file, 0, file.stat().st_size
    with zipfile.ZipFile(path / ARRAYS) as packed, (path / ARRAYS).open("rb") as file_of_all:
        about = json.loads(packed.read(f"{name}/{RECORD}"))
        member = packed.getinfo(f"{name}/{_key(about)}")
        # The member's own header has 30 bytes, of which the last four are the lengths of its name and of an extra field.
        file_of_all.seek(member.header_offset + 26)
        return (
            about,
            path / ARRAYS,
            member.header_offset + 30 + sum(unpack("<HH", file_of_all.read(4))),
            member.file_size,
        )


def _key(about: Mapping[str, Any]) -> str:
    return ".".join(["c", *("0" for _ in about["shape"])])


def _rename_unless_there(temporary: Path, final: Path) -> None:
    """Rename a whole result into place; one that is there already stays, the remains of a damaged one do not."""
    try:
        temporary.rename(final)
    except OSError:
        if (final / RECORD).exists():
            shutil.rmtree(temporary)
        elif final.exists():
            final.rename(final.parent / f"{TEMPORARY}remains.{uuid.uuid4().hex}")
            _rename_unless_there(temporary, final)
        else:
            raise
