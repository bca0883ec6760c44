import itertools

import numpy as np
import pytest
import torch

from workflow_scripts.diffusion.noise import batch_noise, normals, seed_for, stream

KEYS = list(
    itertools.product((0, 1, 11, 2**40), ("n01440764", "n01440765", "1"), (0, 1, 11), ("start", "noise", "group"))
)


def test_streams_differ_by_every_part_and_are_reproducible() -> None:
    draws = {key: tuple(stream(*key).standard_normal(4)) for key in KEYS}
    assert len(set(draws.values())) == len(KEYS)
    assert draws == {key: tuple(stream(*key).standard_normal(4)) for key in reversed(KEYS)}


def test_seeds_differ_by_every_part_and_are_reproducible() -> None:
    seeds = {key: seed_for(*key) for key in KEYS}
    assert len(set(seeds.values())) == len(KEYS)
    assert all(0 <= seed < 2**31 for seed in seeds.values())
    assert seeds == {key: seed_for(*key) for key in KEYS}


def test_a_row_of_noise_is_the_streams_own() -> None:
    keys = [(0, "a", 0, "noise"), (0, "a", 1, "noise"), (3, "b", 1, "noise")]
    together = batch_noise([stream(*key) for key in keys], 5, 4, 2, 2)
    assert together.dtype == torch.float32
    assert together.shape == (3, 5, 4, 2, 2)
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(row, batch_noise([stream(*key)], 5, 4, 2, 2)[0])
        assert torch.equal(row, normals(stream(*key), 5, 4, 2, 2))


def test_later_draws_do_not_repeat_earlier_ones() -> None:
    generator = stream(0, "a", 0, "noise")
    assert not torch.equal(normals(generator, 8), normals(generator, 8))


def test_draws_are_standard_and_independent_normals() -> None:
    n, d = 400, 256
    x = batch_noise([stream(0, "class", index, "start") for index in range(n)], d).double()
    assert float(x.mean()) == pytest.approx(0, abs=5 / np.sqrt(n * d))
    assert float(x.var()) == pytest.approx(1, abs=5 * np.sqrt(2 / (n * d)))
    assert float(x.pow(4).mean()) == pytest.approx(3, abs=5 * np.sqrt(96 / (n * d)))
    # Off the diagonal, correlations of d draws have standard deviation 1 / sqrt(d): a shared stream would give 1.
    correlation = (x @ x.T / d)[~torch.eye(n, dtype=torch.bool)]
    assert float(correlation.abs().max()) < 6.5 / np.sqrt(d)
    assert float(correlation.std()) == pytest.approx(1 / np.sqrt(d), rel=0.05)


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # noqa: NPY002
    batch_noise([stream(0, "a", 0, "start")], 3)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
