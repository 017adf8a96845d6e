from __future__ import annotations

from pathlib import Path

import numpy as np
from confidence_rounds import simulated
from PIL import Image

from evaluation.confidence.calibration import calibration
from evaluation.confidence.diagram import CALIBRATED, HEAD, write_diagrams

BLUE, ORANGE = (tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) for colour in (CALIBRATED, HEAD))


def drawn(path: Path, num_slots: int) -> np.ndarray:
    """The pixels of diagrams of so many positions, [height, width, 3]."""
    logits = np.random.default_rng(0).normal(2.0, 1.0, (500, num_slots))
    rounds = simulated(logits, temperatures=(3.0,) * num_slots, seed=1)
    write_diagrams(path, calibration(rounds), calibration(rounds, (3.0,) * num_slots), "a title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def near(pixels: np.ndarray, colour: tuple[int, ...]) -> int:
    return int((np.abs(pixels.astype(int) - colour).max(axis=-1) < 40).sum())


def test_both_calibrations_are_drawn_whatever_the_number_of_positions(tmp_path: Path) -> None:
    pixels = {count: drawn(tmp_path / f"{count}.png", count) for count in (1, 4, 7)}
    assert all(near(found, ORANGE) > 100 and near(found, BLUE) > 100 for found in pixels.values())
    assert near(pixels[4], ORANGE) > 2 * near(pixels[1], ORANGE)
    assert pixels[1].shape[1] < pixels[4].shape[1] == pixels[7].shape[1]
    assert pixels[4].shape[0] < pixels[7].shape[0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1.png", "4.png", "7.png"]
