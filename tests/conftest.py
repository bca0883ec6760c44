"""Fixtures: one thread; a tiny backbone, tiny image folders, and sites that combine them with a results folder."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are CPUs, because the tests on a real SLURM wait now and then."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Sums of floats, and so scores on a CPU, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with random weights that knows the classes ``support.WIDE``. Copy it before you change it."""
    return support.make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test`` with the classes ``support.CLASSES``. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("images")
    support.make_folder(folder / "train", support.CLASSES, support.COUNT)
    support.make_folder(folder / "test", support.CLASSES, 4, offset=100)
    return folder


@pytest.fixture(scope="session")
def wide_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test`` with the classes ``support.WIDE``. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("wide")
    support.make_folder(folder / "train", support.WIDE, support.COUNT)
    support.make_folder(folder / "test", support.WIDE, 2, offset=100)
    return folder


@pytest.fixture
def site(tmp_path: Path, tiny_images: Path, tiny_backbone: Path) -> support.Site:
    """A test's own copy of the tiny images, and an empty results folder."""
    return _site(tmp_path, tiny_images, tiny_backbone)


@pytest.fixture
def wide_site(tmp_path: Path, wide_images: Path, tiny_backbone: Path) -> support.Site:
    """The same with eight classes."""
    return _site(tmp_path, wide_images, tiny_backbone)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_backbone: Path
) -> tuple[support.Site, support.Done]:
    """A site where the tiny run with every method is finished, and what that did. Copy it before you change it."""
    site = _site(tmp_path_factory.mktemp("finished"), tiny_images, tiny_backbone)
    return site, support.run_jobs(site.config())


@pytest.fixture
def copied(tmp_path: Path, finished: tuple[support.Site, support.Done]) -> support.Site:
    """A test's own copy of the finished site, images with their modification times included."""
    source = finished[0].results.parent
    shutil.copytree(source, tmp_path / "site", symlinks=True)
    there = tmp_path / "site"
    return support.Site(there / "train", there / "test", finished[0].backbone, there / "results")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> support.Programs:
    """Stage programs as processes of their own."""
    return support.Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def plan_site(tmp_path: Path) -> Callable[..., support.Site]:
    """Make a site that is good for planning only: its backbone's weights are a few letters."""

    def make(classes: tuple[str, ...] = support.CLASSES, name: str = "plan") -> support.Site:
        folder = tmp_path / name
        support.make_folder(folder / "train", classes, support.COUNT)
        support.make_folder(folder / "test", classes, 2, offset=100)
        return support.Site(
            folder / "train", folder / "test", support.fake_backbone(folder / "backbone"), folder / "results"
        )

    return make


def _site(folder: Path, images: Path, backbone: Path) -> support.Site:
    shutil.copytree(images, folder, dirs_exist_ok=True)
    return support.Site(folder / "train", folder / "test", backbone, folder / "results")
