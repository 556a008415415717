import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_examples.data import augment, load_digits, normalize


@functools.cache
def compiled(**parameters):
    return jax.jit(functools.partial(augment, **parameters))


def slowly(key, images, pad, flip, cutout_size, cutout_probability):
    """What `augment` is to do, image by image and pixel by pixel, on its draws."""
    images = np.array(images)
    batch, height, width, _ = images.shape
    crop_keys, flip_keys, cut_keys = jax.random.split(key, (3, batch))

    @jax.vmap
    def draw(crop_key, flip_key, cut_key):
        corner_key, apply_key = jax.random.split(cut_key)
        lowest = -(cutout_size // 2)
        limits = jnp.array([height + lowest, width + lowest])
        return (
            jax.random.randint(crop_key, (2,), 0, 2 * pad + 1),
            jax.random.bernoulli(flip_key),
            jax.random.randint(corner_key, (2,), lowest, limits),
            jax.random.bernoulli(apply_key, cutout_probability),
        )

    crops, flips, corners, cuts = map(np.asarray, draw(crop_keys, flip_keys, cut_keys))
    result = np.zeros_like(images)
    for n in range(batch):
        for i in range(height):
            for j in range(width):
                column = width - 1 - j if flip and flips[n] else j
                row = i + crops[n, 0] - pad
                column += crops[n, 1] - pad
                in_hole = (
                    0 <= i - corners[n, 0] < cutout_size
                    and 0 <= j - corners[n, 1] < cutout_size
                )
                inside = 0 <= row < height and 0 <= column < width
                if inside and not (cuts[n] and in_hole):
                    result[n, i, j] = images[n, row, column]
    return result


@pytest.mark.full
@pytest.mark.parametrize(
    "parameters",
    [
        {"pad": 4, "flip": True, "cutout_size": 16, "cutout_probability": 0.5},
        {"pad": 2, "flip": False, "cutout_size": 5, "cutout_probability": 1.0},
        {"pad": 0, "flip": True, "cutout_size": 4, "cutout_probability": 0.25},
        {"pad": 1, "flip": False, "cutout_size": 0, "cutout_probability": 0.5},
    ],
)
@pytest.mark.parametrize("shape", [(12, 20, 18, 2)])
def test_augmentation_is_that_of_a_slow_reference(parameters, shape):
    images = jax.random.normal(jax.random.key(0), shape)
    for seed in range(3):
        key = jax.random.key(seed)
        expected = slowly(key, images, **parameters)
        np.testing.assert_array_equal(compiled(**parameters)(key, images), expected)


@pytest.mark.full
def test_the_defaults_are_those_of_the_papers():
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    expected = slowly(jax.random.key(1), images, 4, True, 16, 0.5)
    np.testing.assert_array_equal(compiled()(jax.random.key(1), images), expected)


def test_nothing_is_done_where_all_is_off():
    images = jnp.ones((2, 4, 4, 1))
    off = {"pad": 0, "flip": False, "cutout_size": 0}
    np.testing.assert_array_equal(augment(jax.random.key(0), images, **off), images)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pad": -1}, "at least 0, got -1 and 16"),
        ({"cutout_size": -2}, "at least 0, got 4 and -2"),
        ({"cutout_probability": 1.5}, "from 0 to 1, got 1.5"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        augment(jax.random.key(0), jnp.ones((2, 4, 4, 1)), **parameters)


@pytest.mark.full
def test_augmentation_is_deterministic_and_differs_between_images():
    images = jnp.tile(
        jax.random.normal(jax.random.key(0), (1, 32, 32, 3)), (16, 1, 1, 1)
    )
    first = compiled()(jax.random.key(1), images)
    assert (first.shape, first.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(first, compiled()(jax.random.key(1), images))
    assert not jnp.array_equal(first, compiled()(jax.random.key(2), images))
    # By chance two of them may be alike.
    assert len({image.tobytes() for image in np.asarray(first)}) > 8


@pytest.mark.full
def test_crops_move_by_up_to_four_pixels_and_flips_mirror():
    image = jnp.arange(1.0, 1 + 32 * 32).reshape(32, 32, 1)
    images = jnp.broadcast_to(image, (500, 32, 32, 1))
    crops = compiled(flip=False, cutout_size=0)(jax.random.key(0), images)
    # The central pixel says where the crop was taken.
    rows, columns = np.divmod(np.asarray(crops[:, 16, 16, 0]) - 1, 32)
    assert set(rows - 16) == set(columns - 16) == set(range(-4, 5))
    flips = np.asarray(compiled(pad=0, cutout_size=0)(jax.random.key(0), images))
    mirrored = flips[:, 0, 0, 0] == 32
    np.testing.assert_array_equal(flips[mirrored][0], image[:, ::-1])
    np.testing.assert_array_equal(flips[~mirrored][0], image)
    assert 0.4 < mirrored.mean() < 0.6


@pytest.mark.full
def test_cutout_removes_a_square_from_half_of_the_images():
    images = jnp.ones((2_000, 32, 32, 3))
    images = compiled(pad=0, flip=False)(jax.random.key(0), images)
    holes = np.asarray(images == 0)
    assert np.array_equal(holes.all(axis=-1), holes.any(axis=-1))
    areas = holes[..., 0].sum(axis=(1, 2))
    assert 0.45 < np.mean(areas > 0) < 0.55
    heights, widths = holes[..., 0].any(2).sum(1), holes[..., 0].any(1).sum(1)
    np.testing.assert_array_equal(areas, heights * widths)
    cut = areas > 0
    assert (heights[cut].min(), heights[cut].max()) == (8, 16)
    # Corners are uniform on [-8, 24), so rows are cut by 8 to 16 pixels, 14 on average.
    np.testing.assert_allclose(areas[cut].mean(), 14.0**2, rtol=0.03)


def test_normalized_images_have_mean_zero_and_deviation_one():
    dataset = load_digits()
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    np.testing.assert_allclose(jnp.mean(images), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(images), 1, atol=1e-4)
