"""What happens to single images on the host: random crops to train, fixed to evaluate.

The sizes and shares are those of training on ImageNet (Szegedy et al., 2015, arXiv
1409.4842; He et al., 2016, arXiv 1512.03385).
"""

import numpy as np
from PIL import Image

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
# Evaluation keeps the middle 224 of 256 pixels, or as much of other sizes.
SHORT_SIDE = 256 / 224

Box = tuple[float, float, float, float]


def sample_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    attempts: int = 10,
) -> tuple[int, int, int, int]:
    """Draws a crop of random area, shape and place.

    The area is uniform, the logarithm of the aspect ratio is uniform, and the place is
    uniform where the crop fits. Where none of the attempts fits, which images far from
    square make likely, the crop is the largest one in the middle whose aspect ratio is
    in the range.

    Args:
      rng: draws the crop.
      width: of the image, in pixels.
      height: of the image, in pixels.
      scale: least and largest area, as shares of the image's.
      ratio: least and largest width over height.
      attempts: how many crops are drawn at most.

    Returns:
      Left, upper, right and lower edge, in pixels of the image.
    """
    for _ in range(attempts):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            upper = int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def random_resized_crop(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: int = 224,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> np.ndarray:
    """A random crop resized to a square, and mirrored with probability 1/2.

    Args:
      image: of any size, in RGB.
      rng: draws the crop and the flip.
      size: side of the result, in pixels.
      scale: least and largest area of the crop, as shares of the image's.
      ratio: least and largest width over height of the crop.

    Returns:
      `[size, size, 3]`, uint8, interpolated bilinearly with anti-aliasing.
    """
    box = sample_crop(rng, *image.size, scale=scale, ratio=ratio)
    flipped = rng.random() < 0.5
    pixels = _resized(image, size, box)
    return np.ascontiguousarray(pixels[:, ::-1]) if flipped else pixels


def center_crop(image: Image.Image, *, size: int = 224) -> np.ndarray:
    """The middle of an image whose shorter side is scaled to 256, for a size of 224.

    Args:
      image: of any size, in RGB.
      size: side of the result in pixels; the shorter side is scaled in proportion.

    Returns:
      `[size, size, 3]`, uint8, interpolated bilinearly with anti-aliasing.
    """
    width, height = image.size
    # The crop in pixels of the image: nothing around it has to be scaled.
    side = min(width, height) / SHORT_SIDE
    left, upper = (width - side) / 2, (height - side) / 2
    return _resized(image, size, (left, upper, left + side, upper + side))


def _resized(image: Image.Image, size: int, box: Box) -> np.ndarray:
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)
