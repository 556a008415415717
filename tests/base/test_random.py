import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam._base import random


def drawn(key, shape):
    return np.asarray(random.bits(random.words(jax.random.key(key), 1)[0], shape))


def test_bits_are_a_permutation():
    assert np.unique(drawn(0, (40, 50, 30))).size == 60_000


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3, 4)])
def test_bits_of_any_shape(shape):
    found = drawn(0, shape)
    assert found.shape == shape
    assert found.dtype == np.uint32
    # An entry's bits hang on its place in row-major order, not on the shape.
    np.testing.assert_array_equal(found.reshape(-1), drawn(0, (found.size,)))


def test_every_bit_is_fair_and_independent_of_the_others_and_of_its_neighbours():
    num = 1 << 16
    found = drawn(1, (num,))
    signs = 2.0 * (found[:, None] >> np.arange(32) & 1) - 1
    assert np.abs(signs.mean(0)).max() < 5 / np.sqrt(num)
    later = np.roll(signs, 1, axis=0)
    correlation = np.concatenate([signs, later], 1).T @ signs / num
    correlation[:32] -= np.eye(32)
    assert np.abs(correlation).max() < 6 / np.sqrt(num)


def test_draws_of_successive_keys_are_independent():
    num = 1 << 12
    ranks = np.stack([np.argsort(np.argsort(drawn(key, (num,)))) for key in range(20)])
    correlation = np.corrcoef(ranks) - np.eye(20)
    assert np.abs(correlation).max() < 5 / np.sqrt(num)
    chosen = ranks < num // 4
    overlap = (chosen.astype(float) @ chosen.T) / num - np.eye(20) / 4
    off = overlap[~np.eye(20, dtype=bool)]
    assert np.abs(off - 1 / 16).max() < 5 * np.sqrt(1 / 16 / num)


@pytest.mark.parametrize(
    "other", [(6, 8), (5 + 2**31, 7), (4, 9), (5, 8), (5 + 2**31, 6)]
)
def test_draws_of_other_words_are_not_moved_ones(other):
    first, second = (
        np.asarray(random.bits(random.with_origin(jnp.array(pair, "uint32")), (4096,)))
        for pair in ((5, 7), other)
    )
    for shift in (-1, 0, 1):
        assert np.mean(np.roll(first, shift) == second) < 0.01


def test_strides_of_more_than_16_bits():
    assert np.unique(drawn(0, (3, 1 << 16))).size == 3 << 16


def test_words_of_a_leaf_do_not_hang_on_how_many_follow():
    few, many = (random.words(jax.random.key(3), num) for num in (2, 9))
    np.testing.assert_array_equal(few, many[:2])
    assert jnp.issubdtype(few.dtype, jnp.uint32)


def test_leaves_share_one_barrier():
    """One for each leaf would take a kernel for each on a GPU."""

    def draw(key):
        return [random.bits(words, (4,)) for words in random.words(key, 3)]

    program = str(jax.make_jaxpr(draw)(jax.random.key(0)))
    assert program.count("optimization_barrier") == 1
