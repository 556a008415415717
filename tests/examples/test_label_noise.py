import numpy as np
import pytest
import sklearn.datasets
from sam_examples.data import flip_labels, label_record, load_digits


def test_digits_splits_are_fixed_stratified_and_disjoint():
    first, second = load_digits(noise=0.3, seed=0), load_digits(noise=0.3, seed=1)
    splits = {name: getattr(first, name) for name in ("train", "valid", "test")}
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 1025,
        "valid": 386,
        "test": 386,
    }
    assert first.train.image_shape == (8, 8, 1)
    for name, split in splits.items():
        np.testing.assert_array_equal(split.images, getattr(second, name).images)
    for split in (first.valid, first.test):
        assert set(np.bincount(split.labels)) <= set(range(36, 42))
    images = np.concatenate([split.images.reshape(-1, 64) for split in splits.values()])
    everything = sklearn.datasets.load_digits().data
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


def test_a_seed_draws_the_same_noise_in_every_version():
    """So that runs with noisy labels can be compared; a golden value."""
    labels = np.arange(1_000, dtype=np.int32) % 10
    noisy = flip_labels(labels, 0.4, 10, 5)
    np.testing.assert_array_equal(noisy[:12], [7, 1, 1, 3, 8, 5, 6, 7, 8, 0, 9, 1])
    assert label_record(load_digits(noise=0.4, seed=5)) == {
        "num_labels": 1025,
        "num_flipped": 410,
        "labels_sha256": (
            "75f4e4c1e38bac42dadd0b6f511f344e38b3fba16b2fb33842a54494c5f2834d"
        ),
    }


def test_the_record_tells_noise_of_another_seed_apart():
    records = [label_record(load_digits(noise=0.4, seed=seed)) for seed in (5, 6)]
    assert records[0]["num_flipped"] == records[1]["num_flipped"]
    assert records[0]["labels_sha256"] != records[1]["labels_sha256"]
    assert label_record(load_digits())["num_flipped"] == 0


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan")])
def test_noise_outside_the_unit_interval_is_refused(noise):
    with pytest.raises(ValueError, match=f"from 0 to 1, got {noise}"):
        load_digits(noise)


def test_noise_needs_another_class():
    labels = np.zeros(4, np.int32)
    np.testing.assert_array_equal(flip_labels(labels, 0.0, 1, 0), labels)
    with pytest.raises(ValueError, match=r"labels of 1 class .* set noise to 0"):
        flip_labels(labels, 0.5, 1, 0)
