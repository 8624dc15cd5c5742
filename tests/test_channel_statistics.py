"""The example that measures a folder of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "channel_statistics.py"


def lines(*arguments: Path) -> list[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_it_runs_without_arguments():
    head, *channels = lines()
    assert head.endswith(" pixels")
    assert [line.partition(":")[0] for line in channels] == ["channel 0", "channel 1", "channel 2"]


def test_pictures_and_arrays_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 30, 3), np.uint8) for i in range(4)]
    (tmp_path / "more").mkdir()
    for i, image in enumerate(images[:2]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    np.save(tmp_path / "more" / "2.npy", images[2])
    np.savez(tmp_path / "3.npz", images[3])
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    expected = [
        f"channel {c}: mean {mean:.4f}, std {std:.4f}"
        for c, (mean, std) in enumerate(zip(pixels.mean(0), pixels.std(0), strict=True))
    ]
    assert lines(tmp_path) == [f"{len(pixels)} pixels", *expected]


def test_integers_of_several_sizes_and_floats_count_alike(tmp_path):
    rng = np.random.default_rng(0)
    deep, floats = rng.integers(0, 65536, (20, 30), np.uint16), rng.random((10, 30), np.float32)
    Image.fromarray(deep).save(tmp_path / "0.png")
    Image.fromarray(floats).save(tmp_path / "1.tif")
    np.save(tmp_path / "2.npy", rng.integers(0, 256, (40, 5, 1), np.uint8))
    pixels = np.concatenate([deep.ravel() / 65535, floats.ravel(), np.load(tmp_path / "2.npy").ravel() / 255])
    assert lines(tmp_path) == ["1100 pixels", f"channel 0: mean {pixels.mean():.4f}, std {pixels.std():.4f}"]


@pytest.mark.parametrize(
    "array, words",
    (
        (np.zeros((4, 5), np.uint8), "expected (H, W, C) or (N, H, W, C), got shape (4, 5)"),
        (np.zeros((4, 5, 2), np.uint8), "expected 3 channels as before it, got 2"),
        (np.zeros((4, 5, 3), np.int32), "int32"),
    ),
)
def test_what_is_no_image_is_named(tmp_path, array, words):
    np.save(tmp_path / "0.npy", np.zeros((4, 5, 3), np.uint8))
    np.save(tmp_path / "1.npy", array)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        lines(tmp_path)
    assert failed.value.stderr.startswith(f"{tmp_path / '1.npy'}: ")
    assert words in failed.value.stderr
    assert failed.value.stderr.count("\n") == 1
