"""Channel means and standard deviations of images, in one pass and little memory.

    python examples/channel_statistics.py                 a folder of generated images
    python examples/channel_statistics.py FOLDER          its images (with Pillow) and .npy files, at any depth
    python examples/channel_statistics.py FILE.npz        all arrays in it

Arrays are (H, W, C) or (N, H, W, C), of 8 or 16 bits or floats. Integers count as parts of the largest of their dtype.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import fastbn

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")


def arrays_in(place: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Give the images one by one: of an .npz file, or of a folder in the order of its names."""
    if place.suffix == ".npz":
        with np.load(place) as archive:
            yield from ((place / name, archive[name]) for name in archive.files)
        return
    for path in sorted(place.rglob("*")):
        if path.suffix == ".npy":
            yield path, np.load(path, mmap_mode="r")
        elif path.suffix == ".npz":
            yield from arrays_in(path)
        elif path.suffix.lower() in PICTURES:
            yield path, picture_in(path)


def picture_in(path: Path) -> np.ndarray:
    """Red, green and blue of a picture; or the one channel of those with more than 8 bits."""
    from PIL import Image

    with Image.open(path) as picture:
        deep = picture.mode == "F" or picture.mode.startswith("I")
        return np.asarray(picture)[..., None] if deep else np.asarray(picture.convert("RGB"))


def generate(folder: Path) -> None:
    """Write some images of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(20):
        height, width = rng.integers(200, 400, 2)
        image = rng.normal((120, 110, 90), (60, 50, 40), (height, width, 3))
        np.save(folder / f"{i:02}.npy", image.clip(0, 255).astype(np.uint8))


def statistics_of(place: Path) -> fastbn.Moments:
    """Moments of all pixels, those of integers as parts of their dtype's largest value."""
    found: dict[np.dtype, fastbn.Moments] = {}
    for name, image in arrays_in(place):
        if image.ndim not in {3, 4}:
            raise SystemExit(f"{name}: expected (H, W, C) or (N, H, W, C), got shape {image.shape}")
        channels = len(next(iter(found.values())).mean) if found else image.shape[-1]
        if image.shape[-1] != channels:
            raise SystemExit(f"{name}: expected {channels} channels as before it, got {image.shape[-1]}")
        try:
            found.setdefault(image.dtype, fastbn.Moments.empty(channels)).update(image, axis=-1)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{name}: {error}") from None
    if not found:
        raise SystemExit(f"no images in {place}")
    return sum((scaled(moments, dtype) for dtype, moments in found.items()), fastbn.Moments.empty(channels))


def scaled(moments: fastbn.Moments, dtype: np.dtype) -> fastbn.Moments:
    """Moments of the values divided by the largest of an integer dtype."""
    largest = np.iinfo(dtype).max if dtype.kind in "iu" else 1
    return fastbn.Moments(moments.count, moments.mean / largest, moments.m2 / largest**2)


def main(arguments: list[str]) -> None:
    """Print one line a channel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", nargs="?", type=Path, help="folder or .npz file")
    place = parser.parse_args(arguments).place
    with tempfile.TemporaryDirectory() as folder:
        if place is None:
            place = Path(folder)
            generate(place)
        moments = statistics_of(place)
    print(f"{moments.count} pixels")
    for channel, (mean, std) in enumerate(zip(moments.mean, moments.std(), strict=True)):
        print(f"channel {channel}: mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
