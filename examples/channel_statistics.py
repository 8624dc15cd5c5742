"""Channel means and standard deviations of images, in one pass and little memory.

    python examples/channel_statistics.py                 a folder of generated images
    python examples/channel_statistics.py FOLDER          its images (with Pillow) and .npy files, at any depth
    python examples/channel_statistics.py FILE.npz        all arrays in it

Arrays are (H, W, C) or (N, H, W, C), of 8 or 16 bits or floats. What is printed is in the range 0 to 1 for integers.
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


def arrays_in(place: Path) -> Iterator[np.ndarray]:
    """Give the images one by one: of an .npz file, or of a folder in the order of its names."""
    if place.suffix == ".npz":
        with np.load(place) as archive:
            yield from (archive[name] for name in archive.files)
        return
    for path in sorted(place.rglob("*")):
        if path.suffix == ".npy":
            yield np.load(path, mmap_mode="r")
        elif path.suffix == ".npz":
            yield from arrays_in(path)
        elif path.suffix.lower() in PICTURES:
            from PIL import Image

            with Image.open(path) as picture:
                yield np.asarray(picture.convert("RGB"))


def generate(folder: Path) -> None:
    """Write some images of different sizes."""
    rng = np.random.default_rng(0)
    for i in range(20):
        height, width = rng.integers(200, 400, 2)
        image = rng.normal((120, 110, 90), (60, 50, 40), (height, width, 3))
        np.save(folder / f"{i:02}.npy", image.clip(0, 255).astype(np.uint8))


def statistics_of(place: Path) -> tuple[fastbn.Moments, float]:
    """Moments of all pixels, and the value that stands for 1."""
    moments, scale = None, 1.0
    for image in arrays_in(place):
        if moments is None:
            moments = fastbn.Moments.empty(image.shape[-1])
            scale = float(np.iinfo(image.dtype).max) if image.dtype.kind in "iu" else 1.0
        moments.update(image, axis=-1)
    if moments is None:
        raise SystemExit(f"no images in {place}")
    return moments, scale


def main(arguments: list[str]) -> None:
    """Print one line a channel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", nargs="?", type=Path, help="folder or .npz file")
    place = parser.parse_args(arguments).place
    with tempfile.TemporaryDirectory() as folder:
        if place is None:
            place = Path(folder)
            generate(place)
        moments, scale = statistics_of(place)
    print(f"{moments.count} pixels")
    for channel, (mean, std) in enumerate(zip(moments.mean / scale, moments.std() / scale, strict=True)):
        print(f"channel {channel}: mean {mean:.4f}, std {std:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
