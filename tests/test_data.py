import io
import pickle

import data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import flip_labels, load_cifar10, load_digits, normalize

PER_FILE = 6


def make_examples(seed):
    """Images [N, 32, 32, 3] and labels of one file."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (PER_FILE, 32, 32, 3), np.uint8)
    return images, rng.integers(0, 10, PER_FILE)


def as_rows(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


class PythonTwoPickler(pickle._Pickler):
    """Writes `bytes` as Python 2 wrote `str`, in which the archive was published."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch[bytes] = save_string


class PythonTwoArray:
    """Pickles as NumPy 1 did: other names of modules, integers for flags."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        reconstruct = np.empty(0).__reduce__()[0]
        state = (1, self.array.shape, PythonTwoDtype(), False, self.array.tobytes())
        return reconstruct, (np.ndarray, (0,), b"b"), state


class PythonTwoDtype:
    def __reduce__(self):
        state = (3, b"|", None, None, None, -1, -1, 0)
        return np.dtype, (b"u1", 0, 1), state


def python_two(images, labels):
    file = io.BytesIO()
    content = {
        b"batch_label": b"training batch",
        b"labels": labels.tolist(),
        b"data": PythonTwoArray(as_rows(images)),
        b"filenames": [b"a.png"] * len(labels),
    }
    PythonTwoPickler(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def python_three(images, labels, protocol):
    content = {"data": as_rows(images), "labels": labels.tolist()}
    return pickle.dumps(content, protocol)


def binary(images, labels):
    records = np.concatenate([labels[:, None].astype(np.uint8), as_rows(images)], 1)
    return records.tobytes()


PICKLES = {
    "python2": python_two,
    "protocol2": lambda *example: python_three(*example, 2),
    "protocol5": lambda *example: python_three(*example, 5),
}


def write_pickles(directory, encode=python_two):
    directory.mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, name in enumerate(names):
        (directory / name).write_bytes(encode(*make_examples(seed)))
    return directory


def write_binaries(directory):
    directory.mkdir()
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for seed, name in enumerate(names):
        (directory / name).write_bytes(binary(*make_examples(seed)))
    return directory


def load(directory, **kwargs):
    return load_cifar10(directory, num_valid=4, images_per_file=PER_FILE, **kwargs)


def check_cifar10(dataset):
    images, labels = zip(*(make_examples(seed) for seed in range(6)), strict=True)
    splits = (dataset.train, dataset.valid, dataset.test)
    np.testing.assert_array_equal(
        np.concatenate([split.images for split in splits]), np.concatenate(images)
    )
    np.testing.assert_array_equal(
        np.concatenate([split.labels for split in splits]), np.concatenate(labels)
    )
    assert [len(split.labels) for split in splits] == [26, 4, 6]
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32


@pytest.mark.parametrize("encode", PICKLES.values(), ids=PICKLES)
def test_cifar10_is_read_from_pickles(tmp_path, encode):
    check_cifar10(load(write_pickles(tmp_path / "any name", encode)))


def test_cifar10_is_read_from_binary_files(tmp_path):
    check_cifar10(load(write_binaries(tmp_path / "any name")))


@pytest.mark.parametrize("write", [write_pickles, write_binaries])
def test_cifar10_may_lie_in_its_published_directory(tmp_path, write):
    kind = "py" if write is write_pickles else "bin"
    write(tmp_path / f"cifar-10-batches-{kind}")
    check_cifar10(load(str(tmp_path)))


def test_cifar10_labels_can_be_noisy_in_training_only(tmp_path):
    directory = write_binaries(tmp_path / "binary")
    clean, noisy = load(directory), load(directory, noise=0.5, seed=3)
    assert np.sum(clean.train.labels != noisy.train.labels) == 13
    np.testing.assert_array_equal(clean.valid.labels, noisy.valid.labels)
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)


def test_a_missing_data_set_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*data_batch_1\.bin"):
        load(tmp_path / "nowhere")
    directory = write_pickles(tmp_path / "pickles")
    (directory / "data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 is missing.*unpack"):
        load(directory)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b""]
)
def test_a_binary_file_of_the_wrong_size_is_named(tmp_path, change):
    path = write_binaries(tmp_path / "binary") / "data_batch_4.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"data_batch_4\.bin has .* expected 18,438"):
        load(path.parent)


@pytest.mark.parametrize("name", ["test_batch.bin", "test_batch"])
def test_impossible_labels_are_refused(tmp_path, name):
    images, labels = make_examples(0)
    labels[2] = 17
    write, encode = (
        (write_pickles, python_two)
        if name == "test_batch"
        else (write_binaries, binary)
    )
    path = write(tmp_path / "cifar") / name
    path.write_bytes(encode(images, labels))
    with pytest.raises(
        ValueError, match=rf"{name} has labels .* to 17; expected 0 to 9"
    ):
        load(path.parent)


class Intruder:
    def __reduce__(self):
        return print, ("code ran",)


IMAGES, LABELS = make_examples(0)
WRONG_PICKLES = {
    "truncated": (python_two(IMAGES, LABELS)[:-100], "is truncated or no"),
    "empty": (b"", "is truncated or no"),
    "text": (b"not a pickle", "is truncated or no"),
    "code": (pickle.dumps(Intruder()), r"asks for builtins\.print"),
    "list": (pickle.dumps([1]), "holds a list"),
    "cifar100": (
        pickle.dumps({"data": as_rows(IMAGES), "fine_labels": LABELS.tolist()}),
        "has no 'labels' but data, fine_labels",
    ),
    "rows": (python_two(IMAGES[:5], LABELS[:5]), r"'data' of shape \(5, 3072\)"),
    "float": (
        pickle.dumps({"data": as_rows(IMAGES) / 255, "labels": LABELS.tolist()}),
        "type float64",
    ),
    "labels": (python_two(IMAGES, LABELS[:5]), r"'labels' of shape \(5,\)"),
}


@pytest.mark.parametrize(
    ("content", "message"), WRONG_PICKLES.values(), ids=WRONG_PICKLES
)
def test_a_wrong_pickle_is_named_and_runs_no_code(tmp_path, capsys, content, message):
    path = write_pickles(tmp_path / "pickles") / "data_batch_2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_2 .*{message}.*; expected a"):
        load(path.parent)
    assert capsys.readouterr().out == ""


def test_digits_splits_are_fixed_stratified_and_disjoint():
    first, second = load_digits(noise=0.3, seed=0), load_digits(noise=0.3, seed=1)
    splits = {name: getattr(first, name) for name in ("train", "valid", "test")}
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 1025,
        "valid": 386,
        "test": 386,
    }
    for name, split in splits.items():
        np.testing.assert_array_equal(split.images, getattr(second, name).images)
    for split in (first.valid, first.test):
        assert set(np.bincount(split.labels)) <= set(range(36, 42))
    images = np.concatenate([split.images.reshape(-1, 64) for split in splits.values()])
    everything = data.sklearn.datasets.load_digits().data
    np.testing.assert_array_equal(
        np.unique(images, axis=0), np.unique(everything, axis=0).astype(np.float32)
    )


def test_label_noise_is_exact_seeded_and_only_in_training_labels():
    clean, noisy = load_digits(), load_digits(noise=0.4, seed=5)
    assert np.sum(clean.train.labels != noisy.train.labels) == 410
    np.testing.assert_array_equal(clean.valid.labels, noisy.valid.labels)
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)
    again, other = load_digits(noise=0.4, seed=5), load_digits(noise=0.4, seed=6)
    np.testing.assert_array_equal(noisy.train.labels, again.train.labels)
    assert np.any(noisy.train.labels != other.train.labels)


def test_a_flipped_label_is_any_other_class():
    labels = np.full(9_000, 3, np.int32)
    counts = np.bincount(flip_labels(labels, 1.0, 10, 0), minlength=10)
    assert counts[3] == 0
    np.testing.assert_allclose(np.delete(counts, 3), 1_000, atol=120)
    np.testing.assert_array_equal(labels, 3)


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan")])
def test_noise_outside_the_unit_interval_is_refused(noise):
    with pytest.raises(ValueError, match=f"from 0 to 1, got {noise}"):
        load_digits(noise)


def test_normalized_images_have_mean_zero_and_deviation_one():
    dataset = load_digits()
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    np.testing.assert_allclose(jnp.mean(images), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.std(images), 1, atol=1e-4)


def test_cifar10_statistics_are_per_channel(tmp_path):
    dataset = load(write_binaries(tmp_path / "binary"))
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    expected = (dataset.train.images[2, 3, 4, 1] - 122.95) / 62.09
    np.testing.assert_allclose(images[2, 3, 4, 1], expected, rtol=1e-5)


def test_augmentation_is_deterministic_and_differs_between_images():
    images = jnp.tile(
        jax.random.normal(jax.random.key(0), (1, 32, 32, 3)), (16, 1, 1, 1)
    )
    augment = jax.jit(data.augment)
    first = augment(jax.random.key(1), images)
    assert (first.shape, first.dtype) == (images.shape, images.dtype)
    np.testing.assert_array_equal(first, augment(jax.random.key(1), images))
    assert not jnp.array_equal(first, augment(jax.random.key(2), images))
    # By chance two of them may be alike.
    assert len({image.tobytes() for image in np.asarray(first)}) > 8


def test_crops_move_by_up_to_four_pixels_and_flips_mirror():
    image = jnp.arange(1.0, 1 + 32 * 32).reshape(32, 32, 1)
    keys = jax.random.split(jax.random.key(0), 500)
    crops = jax.jit(jax.vmap(data._crop, (0, None)))(keys, image)
    # The central pixel says where the crop was taken.
    rows, columns = np.divmod(np.asarray(crops[:, 16, 16, 0]) - 1, 32)
    assert set(rows - 16) == set(columns - 16) == set(range(-4, 5))
    np.testing.assert_array_equal(
        crops[0, 8:24, 8:24, 0],
        image[
            int(rows[0]) - 8 : int(rows[0]) + 8,
            int(columns[0]) - 8 : int(columns[0]) + 8,
            0,
        ],
    )
    flips = jax.jit(jax.vmap(data._flip, (0, None)))(keys, image)
    mirrored = np.asarray(flips[:, 0, 0, 0]) == 32
    np.testing.assert_array_equal(flips[mirrored][0], image[:, ::-1])
    np.testing.assert_array_equal(flips[~mirrored][0], image)
    assert 0.4 < mirrored.mean() < 0.6


def test_cutout_removes_a_square_from_half_of_the_images():
    keys = jax.random.split(jax.random.key(0), 2_000)
    images = jax.jit(jax.vmap(data._cut_out, (0, None)))(keys, jnp.ones((32, 32, 3)))
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


def test_augmentation_crops_flips_and_cuts_out():
    ramp = jnp.broadcast_to(jnp.arange(1.0, 33).reshape(1, 1, 32, 1), (64, 32, 32, 1))
    images = np.asarray(jax.jit(data.augment)(jax.random.key(0), ramp))[..., 0]
    # Padding reaches four pixels in, so that only Cutout makes zeros further inside.
    whole = images[(images[:, 5:-5, 5:-5] > 0).all(axis=(1, 2))]
    assert 16 < len(whole) < 48
    rows = whole[:, 16]
    assert {*(rows[:, 16] - rows[:, 15])} == {-1.0, 1.0}
    assert len({*rows[:, 16]}) > 4
    assert {*whole[:, 0].any(axis=1)} == {False, True}
