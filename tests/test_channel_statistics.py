"""The example that measures a folder of images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
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
