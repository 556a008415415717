"""The input pipeline: which batches there are, in which order, and for whom."""

import functools

import numpy as np
import pytest
from data_files import write_image_folders
from sam_examples.data import (
    Split,
    evaluation_batches,
    load_image_folders,
    random_resized_crop,
    training_batches,
)
from sam_examples.data.transforms import center_crop
from scipy import stats

N = 22


def make_split(count=N):
    """Images that say which example they are of."""
    images = np.zeros((count, 2, 3, 1), np.uint8) + np.arange(count)[
        :, None, None, None
    ].astype(np.uint8)
    return Split(images, 100 + np.arange(count, dtype=np.int32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = write_image_folders(tmp_path_factory.mktemp("data") / "imagenet")
    return load_image_folders(directory, image_size=16).train


def batches(split, batch_size=4, epochs=3, seed=0, **given):
    return training_batches(
        split, batch_size=batch_size, epochs=epochs, seed=seed, **given
    )


def examples(dataset):
    """The examples `[steps, B]` that the batches have."""
    return np.stack([dataset[i].labels - 100 for i in range(len(dataset))])


def joined(parts, step):
    columns = zip(*(part[step] for part in parts), strict=True)
    return Split(*(np.concatenate(column) for column in columns))


def assert_equal(batch, expected):
    np.testing.assert_array_equal(batch.images, expected.images)
    np.testing.assert_array_equal(batch.labels, expected.labels)


def noisy(image, rng):
    """A random transform of an image in memory."""
    return np.asarray(image, np.float64) + rng.normal(size=image.shape)


def test_an_epoch_has_all_examples_but_an_incomplete_batch():
    dataset = batches(make_split())
    assert len(dataset) == 3 * 5
    batch = dataset[7]
    assert isinstance(batch, Split)
    assert (batch.images.shape, batch.images.dtype) == ((4, 2, 3, 1), np.uint8)
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0], batch.labels - 100)
    of_epochs = examples(dataset).reshape(3, 20)
    assert [len(set(epoch)) for epoch in of_epochs] == [20] * 3
    left_out = {frozenset(set(range(N)) - set(epoch)) for epoch in of_epochs}
    assert len(left_out) > 1
    whole = examples(batches(make_split(20), epochs=1))
    assert sorted(whole.ravel()) == list(range(20))


def test_the_order_is_seeded_and_another_one_each_epoch():
    order = examples(batches(make_split()))
    np.testing.assert_array_equal(order, examples(batches(make_split())))
    others = [
        *order.reshape(3, 20),
        *examples(batches(make_split(), seed=1)).reshape(3, 20),
        np.arange(20),
    ]
    assert len({tuple(other) for other in others}) == len(others)


def test_a_seed_draws_the_same_order_in_every_version():
    """So that a checkpoint of another day goes on with the right batches."""
    order = examples(batches(make_split(), seed=7))
    np.testing.assert_array_equal(order[[0, 14]], [[17, 20, 4, 7], [4, 3, 11, 14]])
    # Which labels are noise is drawn from the bare seed.
    bare = np.random.default_rng(7).permutation(N)
    assert np.any(order[0] != bare[:4])


def test_every_place_of_an_epoch_is_taken_by_every_example():
    """Where rows and columns add up, the sum is 4/3 of a chi-squared variable."""
    order = examples(batches(make_split(4), batch_size=4, epochs=4_000, seed=1))
    counts = np.stack([np.bincount(column, minlength=4) for column in order.T])
    statistic = np.sum((counts - 1_000) ** 2 / 1_000) * 3 / 4
    assert stats.chi2(9).sf(statistic) > 0.01


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("transform", [None, noisy])
def test_processes_have_the_rows_of_one(process_count, transform):
    alone = batches(make_split(), transform=transform)
    parts = [
        batches(
            make_split(),
            transform=transform,
            process_index=index,
            process_count=process_count,
        )
        for index in range(process_count)
    ]
    for step in (0, 4, 5, 14):
        assert_equal(joined(parts, step), alone[step])
        assert len(parts[0][step].labels) == 4 // process_count


def test_processes_crop_images_of_a_folder_as_one(folder):
    alone = batches(folder)
    parts = [batches(folder, process_index=i, process_count=2) for i in range(2)]
    for step in (14, 0, 6):
        assert_equal(joined(parts, step), alone[step])


def test_a_process_transforms_no_examples_of_others():
    seen = []

    def spy(image, rng):
        seen.append(int(image[0, 0, 0]))
        return image

    dataset = batches(make_split(), transform=spy, process_index=1, process_count=2)
    assert seen == []
    rows = dataset[3].labels - 100
    assert seen == list(rows)
    np.testing.assert_array_equal(rows, examples(batches(make_split()))[3, 2:])


def test_random_transforms_follow_from_seed_epoch_and_example_alone():
    transformed = batches(make_split(20), transform=noisy)
    backwards = [transformed[i] for i in reversed(range(15))][::-1]
    noise = []
    for epoch in range(3):
        steps = range(5 * epoch, 5 * epoch + 5)
        for step in steps:
            assert_equal(backwards[step], transformed[step])
        rows = np.concatenate([transformed[step].labels - 100 for step in steps])
        images = np.concatenate([transformed[step].images for step in steps])
        added = images - rows[:, None, None, None]
        noise.append(added[np.argsort(rows)])
    other = batches(make_split(20), transform=noisy, seed=1)
    first = other[0].images - (other[0].labels - 100)[:, None, None, None]
    draws = np.concatenate([*noise, first]).ravel()
    assert len(np.unique(draws)) == draws.size
    np.testing.assert_array_equal(
        examples(transformed), examples(batches(make_split(20)))
    )


def test_images_of_a_folder_are_cropped_at_random(folder):
    batch = batches(folder, batch_size=20)[0]
    assert (batch.images.shape, batch.images.dtype) == ((20, 16, 16, 3), np.uint8)
    explicit = functools.partial(random_resized_crop, size=16)
    assert_equal(batches(folder, batch_size=20, transform=explicit)[0], batch)
    middle = functools.partial(center_crop, size=16)
    whole = batches(folder, batch_size=20, transform=lambda image, rng: middle(image))
    differ = np.any(whole[0].images != batch.images, axis=(1, 2, 3))
    assert differ.all()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_has_every_example_once_in_order(process_count):
    split = make_split()
    parts = [
        evaluation_batches(
            split, batch_size=8, process_index=index, process_count=process_count
        )
        for index in range(process_count)
    ]
    assert {len(part) for part in parts} == {3}
    pairs = [part[step] for step in range(3) for part in parts]
    weights = np.concatenate([weights for _, weights in pairs])
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.arange(24) < N)
    for field, values in split._asdict().items():
        found = np.concatenate([getattr(batch, field) for batch, _ in pairs])
        np.testing.assert_array_equal(found[:N], values)
        np.testing.assert_array_equal(found[N:], 0)
        assert found.dtype == values.dtype


def test_a_process_with_nothing_left_evaluates_zeros():
    part = evaluation_batches(
        make_split(17), batch_size=8, process_index=1, process_count=2
    )
    batch, weights = part[2]
    assert (batch.images.shape, weights.tolist()) == ((4, 2, 3, 1), [0.0] * 4)


def test_images_of_a_folder_are_evaluated_in_the_middle(folder):
    dataset = evaluation_batches(folder, batch_size=8)
    assert len(dataset) == 3
    batch, weights = dataset[2]
    assert (batch.images.shape, batch.images.dtype) == ((8, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(weights, [1] * 6 + [0] * 2)
    np.testing.assert_array_equal(batch.labels, [*folder.labels[16:], 0, 0])
    for i in range(6):
        expected = center_crop(folder[16 + i][0], size=16)
        np.testing.assert_array_equal(batch.images[i], expected)
    np.testing.assert_array_equal(batch.images[6:], 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 23}, "batch_size must be at most 22, .* got 23"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"process_count": 3}, "multiple of process_count = 3, got 4"),
        ({"process_index": 1}, r"process_index must be from 0 to .* = 0, got 1"),
        ({"process_index": -1}, r"process_index must be from 0 to .* = 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        batches(make_split(), **given)
    if not given.keys() & {"epochs", "seed"} and given != {"batch_size": 23}:
        with pytest.raises(ValueError, match=message):
            evaluation_batches(make_split(), **{"batch_size": 4, **given})
