"""The data sets of the examples, from local files, and the pipeline that feeds them.

Each comes as a training, a validation and a test split. Whatever is chosen, is chosen
on the validation split; the test split is for reporting. Here are images; text is in
`parallel_text`, `spelt_numbers`, `subwords` and `token_batches`.
"""

from sam_examples.data.augmentation import augment, normalize, normalized
from sam_examples.data.cifar import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    CIFAR100_MEAN,
    CIFAR100_STD,
    load_cifar10,
    load_cifar100,
)
from sam_examples.data.digits import load_digits
from sam_examples.data.image_folders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFolder,
    load_image_folders,
)
from sam_examples.data.label_noise import flip_labels, label_record
from sam_examples.data.pipeline import evaluation_batches, training_batches
from sam_examples.data.prefetch import prefetched
from sam_examples.data.splits import Dataset, Split
from sam_examples.data.transforms import center_crop, random_resized_crop, sample_crop

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Dataset",
    "ImageFolder",
    "Split",
    "augment",
    "center_crop",
    "evaluation_batches",
    "flip_labels",
    "label_record",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_image_folders",
    "normalize",
    "normalized",
    "prefetched",
    "random_resized_crop",
    "sample_crop",
    "training_batches",
]
