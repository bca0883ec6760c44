import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests/analytic.py


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
