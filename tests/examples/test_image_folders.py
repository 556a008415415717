import re
import shutil

import numpy as np
import pytest
from data_files import make_picture, write_image_folders
from PIL import Image
from sam_examples.data import (
    center_crop,
    load_image_folders,
    random_resized_crop,
    sample_crop,
)
from scipy import stats


@pytest.fixture
def folders(tmp_path):
    return write_image_folders(tmp_path / "imagenet")


def files_of(split):
    return {f"{split.directory.name}/{file}" for file in split.files}


def test_images_are_read_from_folders_of_classes(folders):
    dataset = load_image_folders(str(folders))
    train, valid, test = dataset.train, dataset.valid, dataset.test
    assert (dataset.name, dataset.num_classes) == ("imagenet", 2)
    # 1 % of 12 rounds to none, and at least one of each class is held out.
    assert [len(split) for split in (train, valid, test)] == [22, 2, 4]
    written = {str(p.relative_to(folders)) for p in folders.rglob("*.JPEG")}
    assert files_of(train) | files_of(valid) | files_of(test) == written
    assert not files_of(train) & files_of(valid)
    for split in (train, valid, test):
        assert split.image_shape == (224, 224, 3)
        assert split.labels.dtype == np.int32
        assert len(split) == len(split.labels) == len(split.files)
        # Numbered in the order of the names, not of the file system.
        folder_ids = {"n01": 0, "n02": 1}
        assert [folder_ids[f.split("/")[0]] for f in split.files] == [*split.labels]
        for i in range(len(split)):
            image, label = split[i]
            with Image.open(split.directory / split.files[i]) as expected:
                np.testing.assert_array_equal(image, expected)
            assert label == split.labels[i]


def test_classes_are_numbered_in_the_order_of_their_names(tmp_path):
    """Which is neither that of the file system nor its reverse."""
    classes = ("n2", "n3", "n1")
    directory = write_image_folders(tmp_path / "imagenet", 2, 1, classes)
    test = load_image_folders(directory).test
    assert [f.split("/")[0] for f in test.files] == ["n1", "n2", "n3"]
    np.testing.assert_array_equal(test.labels, [0, 1, 2])


def test_the_validation_split_is_fixed_and_of_all_classes(folders):
    some = load_image_folders(folders, valid_share=0.25)
    same = load_image_folders(folders, noise=0.5, seed=3, valid_share=0.25)
    assert list(np.bincount(some.valid.labels)) == [3, 3]
    assert some.valid.files == same.valid.files
    assert some.train.files == same.train.files


def test_labels_can_be_noisy_in_training_only(folders):
    clean, noisy = load_image_folders(folders), load_image_folders(folders, 0.5, 3)
    assert np.sum(clean.train.labels != noisy.train.labels) == 11
    assert noisy.num_flipped == 11
    np.testing.assert_array_equal(clean.valid.labels, noisy.valid.labels)
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)


def test_images_of_any_mode_and_suffix_are_rgb(folders):
    folder = folders / "val" / "n01"
    shutil.rmtree(folder)
    folder.mkdir()
    gray = make_picture(0, 30, 20).convert("L")
    gray.save(folder / "gray.png")
    gray.convert("CMYK").save(folder / "print.jpg")
    gray.convert("RGBA").save(folder / "named wrongly.JPEG", "PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "._gray.png").write_text("no image")
    test = load_image_folders(folders).test
    assert [test.files[i] for i in range(3)] == [
        *("n01/gray.png", "n01/named wrongly.JPEG", "n01/print.jpg")
    ]
    for i in range(3):
        image = test[i][0]
        assert (image.mode, image.size) == ("RGB", (30, 20))
    np.testing.assert_array_equal(np.asarray(test[0][0])[..., 2], np.asarray(gray))


def test_nothing_is_decoded_before_it_is_needed_and_damage_is_named(folders):
    path = folders / "train" / "n01" / "n01_3.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    dataset = load_image_folders(folders)
    split = next(
        s for s in (dataset.train, dataset.valid) if "n01/n01_3.JPEG" in s.files
    )
    index = split.files.index("n01/n01_3.JPEG")
    with pytest.raises(ValueError, match=rf"{path} is missing or no image.* restore"):
        split[index]
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing or no image.* restore"):
        split[index]


MISSING = FileNotFoundError


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def flatten(root):
    for path in (root / "val").glob("*/*"):
        path.rename(root / "val" / path.name)
    for name in ("n01", "n02"):
        (root / "val" / name).rmdir()


def rename_class(root):
    (root / "val" / "n02").rename(root / "val" / "n03")


def empty_class(root):
    for path in (root / "train" / "n02").iterdir():
        path.rename(path.with_suffix(".webp"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove(), MISSING, "imagenet/train is missing.*train and val in it"),
        (remove("train"), MISSING, "imagenet/train is missing; image folders are"),
        (remove("val"), MISSING, "imagenet/val is missing; image folders are"),
        (flatten, MISSING, "imagenet/val has no folders.*one folder for each class"),
        (rename_class, ValueError, r"val/n03 is a class that .* not have \(1 such"),
        (empty_class, MISSING, r"train/n02 has no images \(\.jpeg.*delete its folder"),
    ],
)
def test_wrong_folders_are_named(folders, change, error, message):
    change(folders)
    with pytest.raises(error, match=message) as raised:
        load_image_folders(folders)
    assert "\n" not in str(raised.value)


def test_a_class_must_have_images_to_train_and_to_validate(folders):
    for path in (folders / "train" / "n02").glob("*_?.JPEG"):
        if path.name != "n02_4.JPEG":
            path.unlink()
    for path in (folders / "train" / "n02").glob("*_1?.JPEG"):
        path.unlink()
    with pytest.raises(ValueError, match=r"n02_4\.JPEG is in a class of 1 images"):
        load_image_folders(folders)


def test_classes_without_published_validation_images_are_allowed(folders):
    shutil.rmtree(folders / "val" / "n01")
    dataset = load_image_folders(folders)
    assert (dataset.num_classes, set(dataset.test.labels)) == (2, {1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"valid_share": -0.1}, "valid_share must be from 0 to below 1, got -0.1"),
        ({"valid_share": 1.0}, "valid_share must be from 0 to below 1, got 1.0"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ({"noise": 2.0}, "noise must be a share from 0 to 1, got 2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(folders, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image_folders(folders, **given)


def crops(width, height, count=3_000, **given):
    rng = np.random.default_rng(0)
    boxes = [sample_crop(rng, width, height, **given) for _ in range(count)]
    return np.array(boxes).T


def test_area_shape_and_place_of_crops_are_distributed_as_stated():
    """Where every crop fits, so that none is drawn again."""
    left, upper, right, lower = crops(10_000, 10_000, scale=(0.08, 0.7))
    widths, heights = right - left, lower - upper
    areas = widths * heights / 10_000**2
    assert stats.kstest(areas, stats.uniform(0.08, 0.62).cdf).pvalue > 0.01
    ends = np.log([3 / 4, 4 / 3])
    shapes = stats.uniform(ends[0], ends[1] - ends[0])
    assert stats.kstest(np.log(widths / heights), shapes.cdf).pvalue > 0.01
    assert stats.kstest(left / (10_000 - widths), stats.uniform().cdf).pvalue > 0.01
    assert stats.kstest(upper / (10_000 - heights), stats.uniform().cdf).pvalue > 0.01
    assert abs(np.corrcoef(areas, widths / heights)[0, 1]) < 0.05


def test_crops_that_do_not_fit_are_drawn_again():
    left, upper, right, lower = crops(5_000, 4_000)
    assert (min(left.min(), upper.min()), right.max() <= 5_000) == (0, True)
    assert lower.max() <= 4_000
    rng = np.random.default_rng(1)
    areas = 5_000 * 4_000 * rng.uniform(0.08, 1.0, 20_000)
    ratios = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 20_000))
    fits = (areas * ratios <= 5_000**2) & (areas / ratios <= 4_000**2)
    assert 0.7 < fits.mean() < 0.97
    drawn = (right - left) * (lower - upper)
    assert stats.ks_2samp(drawn, areas[fits]).pvalue > 0.01
    drawn = (right - left) / (lower - upper)
    assert stats.ks_2samp(drawn, ratios[fits]).pvalue > 0.01


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1_000, 10), (493, 0, 506, 10)),  # 10 x 4/3 is 13 wide.
        ((10, 1_000), (0, 493, 10, 506)),  # 10 / (3/4) is 13 high.
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_an_image_that_no_crop_fits_is_cropped_in_the_middle(size, box):
    assert sample_crop(np.random.default_rng(0), *size) == box


def test_where_no_crop_is_drawn_an_image_of_allowed_shape_stays_whole():
    rng = np.random.default_rng(0)
    assert sample_crop(rng, 400, 320, attempts=0) == (0, 0, 400, 320)


def test_a_random_crop_is_that_of_pillow_and_half_are_mirrored():
    picture = make_picture(0, 90, 70)
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    mirrored = []
    for _ in range(200):
        pixels = random_resized_crop(picture, rng, size=24)
        box = sample_crop(same, 90, 70)
        flip = same.random() < 0.5
        expected = picture.resize((24, 24), Image.Resampling.BILINEAR, box=box)
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(pixels, expected)
        mirrored.append(flip)
    assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)
    assert 0.4 < np.mean(mirrored) < 0.6


def test_evaluation_takes_the_middle_224_of_256_pixels():
    picture = make_picture(0, 320, 256)
    pixels = center_crop(picture)
    np.testing.assert_array_equal(pixels, np.asarray(picture)[16:240, 48:272])
    # Scaling the crop is scaling the whole, but for what is around the crop.
    picture = make_picture(1, 640, 512)
    halved = picture.resize((320, 256), Image.Resampling.BILINEAR)
    difference = center_crop(picture) - np.asarray(halved)[16:240, 48:272].astype(int)
    assert np.abs(difference[1:-1, 1:-1]).max() <= 1
    assert center_crop(make_picture(2, 30, 50), size=28).shape == (28, 28, 3)
