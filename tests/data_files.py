"""Writes small files in the published formats, which stand in for the real ones."""

import io
import pickle

import numpy as np
from PIL import Image

PER_FILE = 6


def make_examples(seed, num_classes=10):
    """Images [N, 32, 32, 3] and labels of one file."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (PER_FILE, 32, 32, 3), np.uint8)
    return images, rng.integers(0, num_classes, PER_FILE)


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


def python_two(images, labels, coarse_labels=None):
    """A file of CIFAR-10, or of CIFAR-100 if there are coarse labels."""
    file = io.BytesIO()
    content = {
        b"batch_label": b"training batch",
        b"labels": labels.tolist(),
        b"data": PythonTwoArray(as_rows(images)),
        b"filenames": [b"a.png"] * len(labels),
    }
    if coarse_labels is not None:
        content[b"fine_labels"] = content.pop(b"labels")
        content[b"coarse_labels"] = coarse_labels.tolist()
    PythonTwoPickler(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def python_three(images, labels, protocol):
    content = {"data": as_rows(images), "labels": labels.tolist()}
    return pickle.dumps(content, protocol)


def binary(images, *labels):
    bytes_of_labels = np.stack(labels, 1).astype(np.uint8)
    return np.concatenate([bytes_of_labels, as_rows(images)], 1).tobytes()


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


def write_cifar100_pickles(directory):
    directory.mkdir()
    for seed, name in enumerate(["train", "test"]):
        images, labels = make_examples(seed, 100)
        content = python_two(images, labels, coarse_labels=labels // 5)
        (directory / name).write_bytes(content)
    names = {b"fine_label_names": [b"apple"], b"coarse_label_names": [b"fish"]}
    (directory / "meta").write_bytes(pickle.dumps(names, 2))
    return directory


def write_cifar100_binaries(directory):
    directory.mkdir()
    for seed, name in enumerate(["train.bin", "test.bin"]):
        images, labels = make_examples(seed, 100)
        (directory / name).write_bytes(binary(images, labels // 5, labels))
    (directory / "fine_label_names.txt").write_text("apple\n")
    return directory


def make_picture(seed, width, height):
    """A smooth picture, as photographs are, in RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_image_folders(directory, num_train=12, num_val=2, classes=("n02", "n01")):
    """ImageNet's layout: `train/<class>/*.JPEG` and `val/<class>/*.JPEG`."""
    seed = 0
    for part, count in (("train", num_train), ("val", num_val)):
        for name in classes:
            folder = directory / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = 40 + seed % 3 * 10, 30 + seed % 5 * 5
                make_picture(seed, width, height).save(folder / f"{name}_{i}.JPEG")
                seed += 1
    return directory
