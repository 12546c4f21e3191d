"""Which pictures are nearly the same, told from thumbnails of 64 grey values.

Found are copies that were encoded anew or resized, and frames of a film that hardly moved; not found are mirrored,
turned, cropped and much brightened copies. A difference hash alone would not do: among the built-in images, crops of
two photographs, are different ones with the same 64 bits.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 8  # of a thumbnail, in pixels
# Of copies at JPEG quality 30 to 90 and 0.5 to 1.3 times the size at most 5 of the 64 bits of the average hash differ.
HASH_BITS = 6
# Their grey values differ on average by less than one level and 0.06 of the picture's contrast (standard deviation);
# of the 20 million pairs of built-in images none is within both limits. In low contrast rounding alone makes up to 0.3.
CONTRAST_SHARE, LEAST_LEVELS, MOST_LEVELS = 0.09, 0.5, 3.0


def thumbnail(image: Image.Image) -> bytes:
    """The picture as SIDE x SIDE grey values, row by row."""
    return image.convert("L").resize((SIDE, SIDE)).tobytes()


def find_alike(thumbnails: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """thumbnails uint8 [N, 64], others uint8 [M, 64] -> for each of the N the indices of the others nearly the same.

    All pairs are compared, by an average hash first: 118,000 with 5,000 take a second.
    """
    limits = (CONTRAST_SHARE * thumbnails.std(1)).clip(LEAST_LEVELS, MOST_LEVELS)
    hashes = _average_hashes(others)
    for picture, mine, limit in zip(thumbnails, _average_hashes(thumbnails), limits, strict=True):
        near = np.flatnonzero(np.bitwise_count(hashes ^ mine) <= HASH_BITS)
        yield near[np.abs(others[near] - picture.astype(np.int16)).mean(1) <= limit]


def _average_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint64 [N]: a bit for each pixel that is brighter than the mean."""
    bits = thumbnails > thumbnails.mean(1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64).ravel()
