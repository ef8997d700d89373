"""PSNR and SSIM are those of the paper, held against the definition written out window by window."""

import math

import numpy as np
import pytest

from fluxcli.job.report.distance import WINDOW, psnr, ssim


def pair(height: int, width: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(height * width)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    far = ramp + random.integers(-noise, noise + 1, ramp.shape)
    return ramp.astype(np.uint8), far.clip(0, 255).astype(np.uint8)


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, section III.B, in float64."""
    at = np.arange(11) - 5
    line = np.exp(-(at**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for channel in range(3):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x, y = (image[top : top + 11, left : left + 11, channel].astype(float) for image in (a, b))
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
                both = (weights * (x - mean_x) * (y - mean_y)).sum()
                found.append(
                    ((2 * mean_x * mean_y + c1) * (2 * both + c2))
                    / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
                )
    return float(np.mean(found))


# Strips of 16 lines: one, one that is not full, several with a rest.
@pytest.mark.parametrize(("height", "width"), [(WINDOW, WINDOW), (26, 11), (27, 13), (45, 12)])
@pytest.mark.parametrize("noise", [1, 20, 200])
def test_ssim_is_the_definition(height: int, width: int, noise: int) -> None:
    a, b = pair(height, width, noise)
    assert ssim(a, b) == pytest.approx(plain_ssim(a, b), abs=1e-5)
    assert ssim(b, a) == pytest.approx(ssim(a, b), abs=1e-6)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_ssim_of_flat_images_is_that_of_their_brightness(value: int) -> None:
    a, b = (np.full((32, 32, 3), each, np.uint8) for each in (value, 100))
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((200 * value + c1) / (value**2 + 10_000 + c1), abs=1e-5)


@pytest.mark.parametrize("noise", [1, 20, 200])
def test_psnr_is_the_definition(noise: int) -> None:
    a, b = pair(45, 12, noise)
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)


def test_one_grey_level_in_one_place_of_the_largest_image_is_seen() -> None:
    a = np.zeros((4096, 4096, 3), np.uint8)
    b = a.copy()
    b[-1, -1, -1] = 1
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 * a.size), abs=1e-6)
    assert psnr(a, a) == math.inf
