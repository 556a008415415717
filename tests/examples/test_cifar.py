import pickle

import numpy as np
import pytest
from data_files import (
    PER_FILE,
    as_rows,
    binary,
    make_examples,
    python_three,
    python_two,
    write_binaries,
    write_cifar100_binaries,
    write_cifar100_pickles,
    write_pickles,
)
from sam_examples.data import load_cifar10, load_cifar100, normalize

PICKLES = {
    "python2": python_two,
    "protocol2": lambda *example: python_three(*example, 2),
    "protocol5": lambda *example: python_three(*example, 5),
}
WRITE_CIFAR100 = [write_cifar100_pickles, write_cifar100_binaries]


def load(directory, **kwargs):
    return load_cifar10(
        directory, **{"num_valid": 4, "images_per_file": PER_FILE, **kwargs}
    )


def load_100(directory, **kwargs):
    sizes = {"num_train_images": PER_FILE, "num_test_images": PER_FILE}
    return load_cifar100(directory, **{"num_valid": 2, **sizes, **kwargs})


def check_examples(dataset, examples, sizes):
    images, labels = zip(*examples, strict=True)
    splits = (dataset.train, dataset.valid, dataset.test)
    np.testing.assert_array_equal(
        np.concatenate([split.images for split in splits]), np.concatenate(images)
    )
    np.testing.assert_array_equal(
        np.concatenate([split.labels for split in splits]), np.concatenate(labels)
    )
    assert [len(split.labels) for split in splits] == sizes
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.image_shape == (32, 32, 3)


def check_cifar10(dataset):
    check_examples(dataset, [make_examples(seed) for seed in range(6)], [26, 4, 6])
    assert (dataset.name, dataset.num_classes) == ("cifar10", 10)


def check_cifar100(dataset):
    check_examples(dataset, [make_examples(seed, 100) for seed in range(2)], [4, 2, 6])
    assert (dataset.name, dataset.num_classes) == ("cifar100", 100)


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


@pytest.mark.parametrize("write", WRITE_CIFAR100)
def test_cifar100_is_read_with_its_fine_labels(tmp_path, write):
    check_cifar100(load_100(write(tmp_path / "any name")))


@pytest.mark.parametrize("write", WRITE_CIFAR100)
def test_cifar100_may_lie_in_its_published_directory(tmp_path, write):
    kind = "python" if write is write_cifar100_pickles else "binary"
    write(tmp_path / f"cifar-100-{kind}")
    check_cifar100(load_100(str(tmp_path)))


def test_labels_can_be_noisy_in_training_only(tmp_path):
    cifar10 = write_binaries(tmp_path / "10")
    cifar100 = write_cifar100_binaries(tmp_path / "100")
    for read, directory, count in ((load, cifar10, 13), (load_100, cifar100, 2)):
        clean, noisy = read(directory), read(directory, noise=0.5, seed=3)
        assert np.sum(clean.train.labels != noisy.train.labels) == count
        assert (clean.num_flipped, noisy.num_flipped) == (0, count)
        np.testing.assert_array_equal(clean.valid.labels, noisy.valid.labels)
        np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)


@pytest.mark.parametrize(
    ("read", "first", "name"),
    [(load, r"data_batch_1\.bin", "CIFAR-10"), (load_100, r"train\.bin", "CIFAR-100")],
)
def test_a_missing_data_set_is_named(tmp_path, read, first, name):
    message = rf"no {name} in .*nowhere: .*{first}, .* unpack"
    with pytest.raises(FileNotFoundError, match=message):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("read", "write", "name", "files"),
    [
        (load, write_pickles, "data_batch_1", "data_batch_2"),
        (load_100, write_cifar100_pickles, "test", "train, test"),
        (load_100, write_cifar100_binaries, "train.bin", "train.bin, test.bin"),
    ],
)
def test_a_missing_file_is_named(tmp_path, read, write, name, files):
    path = write(tmp_path / "cifar") / name
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing.*{files}.*unpack"):
        read(path.parent)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b""]
)
@pytest.mark.parametrize(
    ("read", "write", "name", "size"),
    [
        (load, write_binaries, "data_batch_4.bin", "18,438"),
        (load_100, write_cifar100_binaries, "test.bin", "18,444"),
    ],
)
def test_a_binary_file_of_the_wrong_size_is_named(
    tmp_path, change, read, write, name, size
):
    path = write(tmp_path / "binary") / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} has .* expected {size}"):
        read(path.parent)


def test_a_binary_file_of_the_other_archive_is_refused(tmp_path):
    path = write_cifar100_binaries(tmp_path / "binary") / "test.bin"
    path.write_bytes(binary(*make_examples(0)))
    with pytest.raises(ValueError, match=r"2 bytes of label.* none of CIFAR-100's"):
        load_100(path.parent)


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


def test_impossible_fine_labels_are_refused(tmp_path):
    images, labels = make_examples(0, 100)
    labels[2] = 100
    path = write_cifar100_binaries(tmp_path / "cifar") / "train.bin"
    path.write_bytes(binary(images, labels // 5, labels))
    with pytest.raises(ValueError, match=r"train.bin .* to 100; expected 0 to 99"):
        load_100(path.parent)


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


def test_a_pickle_of_cifar10_is_none_of_cifar100(tmp_path):
    path = write_cifar100_pickles(tmp_path / "pickles") / "train"
    path.write_bytes(python_two(IMAGES, LABELS))
    with pytest.raises(ValueError, match=r"train has no 'fine_labels' but batch_label"):
        load_100(path.parent)


@pytest.mark.parametrize(("num_valid", "got"), [(-1, "-1"), (30, "30"), (99, "99")])
def test_a_validation_split_that_leaves_no_training_images_is_refused(
    tmp_path, num_valid, got
):
    directory = write_binaries(tmp_path / "binary")
    with pytest.raises(ValueError, match=f"num_valid must be from 0 to 29.*got {got}"):
        load(directory, num_valid=num_valid)


@pytest.mark.parametrize(
    ("read", "write", "mean", "std"),
    [
        (load, write_binaries, 122.95, 62.09),
        (load_100, write_cifar100_binaries, 124.07, 65.39),
    ],
)
def test_statistics_are_per_channel(tmp_path, read, write, mean, std):
    dataset = read(write(tmp_path / "binary"))
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    expected = (dataset.train.images[2, 3, 4, 1] - mean) / std
    np.testing.assert_allclose(images[2, 3, 4, 1], expected, rtol=1e-5)
