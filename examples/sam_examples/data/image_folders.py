"""ImageNet, or any images in a folder for each class."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sam_examples.data.label_noise import flip_labels
from sam_examples.data.splits import Dataset

# Of ImageNet's training images, by channel.
IMAGENET_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
IMAGENET_STD = np.array([58.395, 57.12, 57.375], np.float32)

SUFFIXES = (".jpeg", ".jpg", ".png")
VALID_SEED = 0  # Which images are held out does not depend on the run.


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images in files, read as they are needed; a random access source for Grain.

    Attributes:
      directory: where the files are.
      files: their paths below it, `N` of them.
      labels: `[N]`, int32.
      image_size: side in pixels of the images as a model sees them.
    """

    directory: Path
    files: Sequence[str]
    labels: np.ndarray
    image_size: int = 224

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image as a model sees it."""
        return self.image_size, self.image_size, 3

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.int32]:
        """Decodes an image; returns it at its own size, in RGB, with its label.

        Raises:
          ValueError: if Pillow cannot read the file.
        """
        path = self.directory / self.files[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), self.labels[index]
        # A damaged file can make a decoder raise almost anything.
        except Exception as error:
            raise ValueError(
                f"{path} is missing or no image that Pillow can read ({error}): "
                "restore it from the published archive, or delete it."
            ) from error

    def take(self, indices: np.ndarray) -> "ImageFolder":
        """The examples of these indices, in their order."""
        files = [self.files[i] for i in indices]
        return dataclasses.replace(self, files=files, labels=self.labels[indices])


def load_image_folders(
    data_dir: Path | str,
    noise: float = 0.0,
    seed: int = 0,
    *,
    image_size: int = 224,
    valid_share: float = 0.01,
) -> Dataset:
    """Loads ImageNet from a folder for each class.

    `train/<class>/` and `val/<class>/` hold the published training and validation
    images. Classes are numbered in the order of their folders' names. A fixed share of
    each class's training images becomes the validation split, drawn by a fixed seed;
    the published validation images become the test split.

    Args:
      data_dir: where `train` and `val` are.
      noise: share of the training labels to replace, see `flip_labels`.
      seed: draws which labels flip, and to what.
      image_size: side in pixels of the images as a model sees them.
      valid_share: share of each class to hold out, in [0, 1): of ImageNet's, 12,811
        images or so by default. At least one image, unless it is 0.

    Raises:
      FileNotFoundError: if a folder is missing or empty.
      ValueError: if the classes do not match, or an argument is out of range.
    """
    if not 0 <= valid_share < 1:
        raise ValueError(f"valid_share must be from 0 to below 1, got {valid_share}.")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
    train_dir, test_dir = (Path(data_dir) / name for name in ("train", "val"))
    classes = _class_names(train_dir)
    test_classes = _class_names(test_dir)
    unknown = sorted(set(test_classes) - set(classes))
    if unknown:
        raise ValueError(
            f"{test_dir / unknown[0]} is a class that {train_dir} does not have "
            f"({len(unknown)} such): name the folders of both alike."
        )
    ids = {name: i for i, name in enumerate(classes)}
    everything = _read_folder(train_dir, classes, ids, image_size)
    valid, train = _hold_out(everything, valid_share)
    noisy = flip_labels(train.labels, noise, len(classes), seed)
    return Dataset(
        name="imagenet",
        num_classes=len(classes),
        train=dataclasses.replace(train, labels=noisy),
        valid=valid,
        test=_read_folder(test_dir, test_classes, ids, image_size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_flipped=int(np.sum(noisy != train.labels)),
    )


def _class_names(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is missing; image folders are train/<class>/*.JPEG and "
            "val/<class>/*.JPEG: give the folder that has train and val in it."
        )
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    names = sorted(name for name in names if not name.startswith("."))
    if not names:
        raise FileNotFoundError(
            f"{directory} has no folders of classes: move its images into one folder "
            "for each class."
        )
    return names


def _read_folder(
    directory: Path, classes: Sequence[str], ids: dict[str, int], image_size: int
) -> ImageFolder:
    files: list[str] = []
    labels: list[int] = []
    for name in classes:
        found = sorted(
            f"{name}/{path.name}"
            for path in (directory / name).iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not found:
            raise FileNotFoundError(
                f"{directory / name} has no images ({', '.join(SUFFIXES)}): unpack the "
                "class again, or delete its folder."
            )
        files += found
        labels += [ids[name]] * len(found)
    return ImageFolder(directory, files, np.array(labels, np.int32), image_size)


def _hold_out(folder: ImageFolder, share: float) -> tuple[ImageFolder, ImageFolder]:
    """A share of each class, at least one image unless it is 0, and the rest."""
    rng = np.random.default_rng(VALID_SEED)
    held_out = np.zeros(len(folder), bool)
    for label in np.unique(folder.labels):
        members = np.flatnonzero(folder.labels == label)
        count = max(1, round(share * len(members))) if share else 0
        if count >= len(members):
            raise ValueError(
                f"{folder.directory / folder.files[members[0]]} is in a class of "
                f"{len(members)} images, which leaves none to train after {count} are "
                "held out: add images to the class, or lower valid_share."
            )
        held_out[rng.choice(members, count, replace=False)] = True
    indices = np.arange(len(folder))
    return folder.take(indices[held_out]), folder.take(indices[~held_out])
