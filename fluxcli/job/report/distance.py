"""How far two images are apart, in the two measures that need no network: PSNR, and SSIM as Wang, Bovik, Sheikh and
Simoncelli defined it ("Image quality assessment: from error visibility to structural similarity", 2004)."""

import math

import numpy as np

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
_Planes = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

_PEAK = 255.0
_SIGMA, _RADIUS = 1.5, 5  # the paper's window: Gaussian, 11x11
WINDOW = 2 * _RADIUS + 1
_TAPS = np.exp(-((np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2) / 2)
_TAPS = (_TAPS / _TAPS.sum()).astype(np.float32)
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2  # the paper's K1 and K2
_MIDDLE = np.float32(128)  # taken off before squares are summed in float32, which holds small numbers better
_STRIP = 16  # lines at once: what is in work stays in a core's cache, and small beside the image


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of uint8 [H, W, 3] images of one size, in dB: over all pixels and channels at once.
    Infinite where they are equal."""
    total = 0.0
    for start in range(0, len(a), _STRIP):
        difference = np.subtract(a[start : start + _STRIP], b[start : start + _STRIP], dtype=np.float32).ravel()
        total += float(difference @ difference)
    return 10 * math.log10(_PEAK * _PEAK / (total / a.size)) if total else math.inf


def ssim(a: Pixels, b: Pixels) -> float:
    """Structural similarity of uint8 [H, W, 3] images of one size, at least `WINDOW` on each side: the mean over every
    window inside the image and over the channels. 1 where they are equal."""
    height, width, channels = a.shape
    inner = height - 2 * _RADIUS
    total = 0.0
    for top in range(0, inner, _STRIP):
        lines = slice(top, min(top + _STRIP, inner) + 2 * _RADIUS)
        total += _strip(_planes(a[lines]), _planes(b[lines]))
    return total / (inner * (width - 2 * _RADIUS) * channels)


def _planes(pixels: Pixels) -> _Planes:
    """[C, H, W], around zero."""
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0), dtype=np.float32) - _MIDDLE


def _strip(a: _Planes, b: _Planes) -> float:
    """The sum of SSIM over a strip's windows."""
    moments = np.stack([a, b, a * a + b * b, a * b])
    mean_a, mean_b, squares, product = _weighted(_weighted(moments, -2), -1)
    covariance = product - mean_a * mean_b
    variances = squares - mean_a * mean_a - mean_b * mean_b
    mean_a += _MIDDLE
    mean_b += _MIDDLE
    above = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    below = (mean_a * mean_a + mean_b * mean_b + _C1) * (variances + _C2)
    return float(np.sum(above / below, dtype=np.float64))


def _weighted(x: _Planes, axis: int) -> _Planes:
    """The Gaussian window's means along one of the last two axes, where it lies wholly inside."""
    inner = x.shape[axis] - 2 * _RADIUS

    def at(tap: int) -> _Planes:
        return x[..., tap : tap + inner, :] if axis == -2 else x[..., tap : tap + inner]

    out: _Planes = at(_RADIUS) * _TAPS[_RADIUS]
    both = np.empty_like(out)
    for tap in range(_RADIUS):  # the window is symmetric
        np.add(at(tap), at(WINDOW - 1 - tap), out=both)
        both *= _TAPS[tap]
        out += both
    return out
