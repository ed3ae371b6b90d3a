"""The built-in phantom: brain-like axial slices made from formulas, so that everything can be tried without data.

A head is a set of smooth functions of (x, y, z), x to the left-right, y to the front, z up, the head about
[-1, 1] wide. One subject is one draw of their parameters; its slices are cuts at rising z, so neighboring
slices resemble each other as real ones do.

- The outline is an egg (rounder behind, narrower in front) with a few low harmonics, shrinking towards the
  top; inside it lie scalp, skull and fluid, each a band of the distance to the outline.
- The cortex is folded by a sum F of plane waves in a coordinate system bent by slower waves. Sulci are the
  set |F| / |grad F| < w, let in from the brain's surface to a limited depth; gray matter is a ribbon of even thickness
  around surface and sulci; the rest is white matter. The fissure is the sulcus that never ends, near x = 0.
- Ventricles are two bent horns with caps in front and behind, and a slit below them; caudate, thalamus and
  putamen lie beside them.
- Classes: `young` and `old`. Old heads have wide ventricles and sulci, a thin cortex and less contrast; the two
  distributions overlap a little, as in people.
- Intensities are T1-like, times a smooth coil profile; noise is Rician: the modulus of a complex signal.

Edges are one pixel wide whatever the size, so 32 x 32 and 512 x 512 are the same heads. Everything is a
function of (seed, split, subject, slice); nothing depends on the number of images asked for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaedist.data.format.image_files import Picture
from vaedist.data.sources import Item, Problem, SourceSettings

OPTIONS = frozenset({"count"})
CLASSES = ("young", "old")
SLICES = 16
"""Slices per subject: 9,664 / 1,120 / 544 images are 604 / 70 / 34 whole subjects."""
COUNT: Mapping[str, int] = {"train": 1024, "validate": 128, "test": 128}
SIZE = 64

Field = NDArray[Any]
"""float32 (H, W)."""


def recognizes(_path: Path) -> int:
    return 0  # asked for by name: `vaedist-shard phantom`


def _generator(*identity: object) -> np.random.Generator:
    text = "\x1f".join(str(part) for part in identity).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest)))


@dataclass(frozen=True)
class Head:
    """The anatomy of one subject: every number that its slices share."""

    age: float  # 0 (young) to 1 (old): drives ventricles, sulci, cortex and contrast
    width: float
    length: float
    tilt: float
    shift: tuple[float, float]
    harmonics: NDArray[np.float64]  # (4, 2) amplitude and phase of the outline's harmonics 2..5
    skull: float
    scalp: float
    waves: NDArray[np.float64]  # (9, 5) wave vector x, y, z, phase, amplitude of the folding
    bend: NDArray[np.float64]  # (4, 6) wave vector x, y, z, phase, displacement x, y
    horn: float  # half distance of the ventricles
    lean: float  # left-right difference of the ventricles
    contrast: tuple[float, float, float]  # fluid, gray, white
    first: float  # z of the lowest slice
    last: float


@functools.lru_cache(maxsize=4096)
def head(seed: int, split: str, subject: int) -> Head:
    """Anatomy of a subject."""
    rng = _generator("phantom head", seed, split, subject)
    young = _class_of(subject) == "young"
    age = float(np.clip((rng.normal(0.18, 0.10) if young else rng.normal(0.78, 0.12)), 0, 1))
    direction = rng.normal(size=(9, 3)) * (1.0, 1.0, 0.45)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    vectors = direction * rng.uniform(11.0, 17.0, (9, 1))
    waves = np.hstack([vectors, rng.uniform(0, 2 * np.pi, (9, 1)), rng.uniform(0.7, 1.3, (9, 1))])
    vectors = np.hstack([rng.normal(0, 3.2, (4, 2)), rng.normal(0, 2.0, (4, 1))])
    bend = np.hstack([vectors, rng.uniform(0, 2 * np.pi, (4, 1)), rng.normal(0, 0.07, (4, 2))])
    amplitudes = rng.normal(0, 1, 4) * (0.014, 0.012, 0.007, 0.005)
    harmonics = np.stack([amplitudes, rng.uniform(0, 2 * np.pi, 4)], axis=1)
    return Head(
        age=age,
        width=float(rng.uniform(0.70, 0.79)),
        length=float(rng.uniform(0.86, 0.95)),
        tilt=float(rng.normal(0, 0.05)),
        shift=(float(rng.normal(0, 0.015)), float(rng.normal(0, 0.015))),
        harmonics=harmonics,
        skull=float(rng.uniform(0.050, 0.075)),
        scalp=float(rng.uniform(0.045, 0.070)),
        waves=waves,
        bend=bend,
        horn=float(rng.uniform(0.085, 0.105)),
        lean=float(rng.normal(0, 0.08)),
        contrast=(
            float(rng.uniform(0.13, 0.18)),
            float(rng.uniform(0.46, 0.52)),
            float(rng.uniform(0.76, 0.82) - 0.06 * age),
        ),
        first=float(rng.uniform(-0.12, -0.04)),
        last=float(rng.uniform(0.66, 0.74)),
    )


def _class_of(subject: int) -> str:
    return CLASSES[subject % 2]  # both halves are equal


@dataclass(frozen=True)
class _Plane:
    """The pixels of one slice in the head's coordinates."""

    x: Field
    y: Field
    z: float
    pixel: float

    def inside(self, distance: Field, soft: float = 1.0) -> Field:
        """1 where a signed distance is negative, 0 where positive, an edge of `soft` pixels between."""
        return np.clip(0.5 - distance / np.float32(soft * self.pixel), 0, 1)


def render(anatomy: Head, height: float, size: int, rng: np.random.Generator) -> Picture:
    """One slice, (size, size) uint8.

    Args:
        anatomy: The subject.
        height: 0 (lowest slice) to 1 (highest).
        size: Pixels per side.
        rng: Of this slice: noise, coil profile, gain.
    """
    pixel = 2.0 / size
    line = ((np.arange(size) + 0.5) * pixel - 1.0).astype(np.float32)
    across, down = line[None, :], -line[:, None]
    cos, sin = np.float32(np.cos(anatomy.tilt)), np.float32(np.sin(anatomy.tilt))
    x = cos * (across - anatomy.shift[0]) + sin * (down - anatomy.shift[1])
    y = cos * (down - anatomy.shift[1]) - sin * (across - anatomy.shift[0])
    plane = _Plane(x, y, anatomy.first + (anatomy.last - anatomy.first) * height, pixel)
    return _scan(_tissues(anatomy, plane), plane, rng)


def _tissues(anatomy: Head, plane: _Plane) -> Field:
    """The slice before it is scanned, in [0, 1]."""
    x, y, z, inside = plane.x, plane.y, plane.z, plane.inside
    depth = _depth(anatomy, plane)
    scalp, skull = anatomy.scalp, anatomy.skull
    gap = 0.012 + 0.030 * anatomy.age
    fluid, gray, white = anatomy.contrast
    image = np.float32(0.68) * inside(-depth)
    image = _over(image, 0.05, inside(scalp - depth))
    image = _over(image, fluid, inside(scalp + skull - depth))
    marrow = scalp + 0.5 * skull
    image = _over(image, 0.30, inside(np.abs(depth - marrow) - 0.13 * skull) * np.float32(0.9))

    # Cortex.
    surface = depth - np.float32(scalp + skull + gap)  # 0 at the brain's surface, positive in it
    reach = np.float32(0.19 + 0.02 * anatomy.age)
    sulcus = _folding(anatomy, plane) + np.maximum(surface - reach, 0) * np.float32(1.3)
    fissure_x = np.abs(x + np.float32(0.012) * np.sin(7 * y + np.float32(anatomy.waves[0, 3])))
    low = float(np.clip(1.0 - z / 0.42, 0, 1))  # 1 at the level of the ventricles, 0 above them
    fissure = fissure_x + np.float32(low) * np.maximum(np.float32(0.42) - np.abs(y + np.float32(0.02)), 0)
    gyrus = np.minimum(sulcus, fissure)
    opening = np.float32(0.004 + 0.017 * anatomy.age)
    ribbon = np.float32(0.056 - 0.012 * anatomy.age)
    brain = inside(-surface)
    thickness = np.minimum(surface, gyrus - opening)  # distance to the nearest fluid of the cortex
    tissue = np.float32(gray) + np.float32(white - gray) * inside(ribbon - thickness, 1.5)

    # Deep gray matter and the ventricles, below the crown only.
    outer, inner = np.float32(1.0 + anatomy.lean), np.float32(1.0 - anatomy.lean)
    side: Field = (outer * np.maximum(x, 0) - inner * np.minimum(x, 0)).astype(np.float32)
    wide = 0.020 + 0.062 * anatomy.age
    core = np.float32(np.clip(1.15 - z / 0.36, 0, 1))
    nuclei = [
        (1.04, (0.125, -0.10, 0.085, 0.135)),
        (1.02, (0.285, 0.03, 0.060, 0.185)),
        (1.06, (0.130 + wide, 0.24, 0.052, 0.105)),
    ]
    for brightness, ellipse in nuclei if core > 0 else ():
        tissue = _over(tissue, gray * brightness, inside(_ellipse(side, y, *ellipse)) * core)
    image = _over(image, tissue, brain * inside(opening - gyrus, 1.5))
    if z < 0.46:
        closing = 1.0 if z < 0.25 else (0.46 - z) / 0.21
        body = wide * (0.55 + 0.45 * closing)
        arc = np.float32(anatomy.horn + wide) + np.float32(0.55) * (y - np.float32(0.06)) ** 2
        span = np.abs(y + np.float32(0.03)) - np.float32((0.20 + 0.12 * anatomy.age) * np.sqrt(closing))
        taper = np.float32(body) * (1 + np.float32(0.5) * np.tanh(4 * (np.abs(y) - np.float32(0.15))))
        horn = np.hypot(side - arc, np.maximum(span, 0)) - taper
        image = _over(image, fluid, inside(horn) * brain)
    if z < 0.12:
        half_width = np.float32(0.010 + 0.022 * anatomy.age)
        slit = np.maximum(fissure_x - half_width, np.abs(y + np.float32(0.10)) - 0.13)
        image = _over(image, fluid, inside(slit) * brain)
    return image


def _depth(anatomy: Head, plane: _Plane) -> Field:
    """Distance to the head's outline, growing inwards, in units of the half width."""
    x, y = plane.x, plane.y
    dome = float(np.sqrt(1.0 - 0.95 * max(plane.z, 0.0) ** 2))
    narrow = 1.0 - 0.10 * y - 0.06 * y * y
    radius = np.sqrt((x / (anatomy.width * narrow)) ** 2 + (y / anatomy.length) ** 2) + np.float32(1e-6)
    angle = np.arctan2(y, x)
    ripple = np.ones_like(radius)
    for order, (amplitude, phase) in enumerate(anatomy.harmonics, start=2):
        ripple += np.float32(amplitude) * np.cos(order * angle + np.float32(phase))
    return (np.float32(dome) * ripple - radius) * np.float32(anatomy.width)


def _folding(anatomy: Head, plane: _Plane) -> Field:
    """|F| / |grad F| of a sum F of plane waves in a bent coordinate system: 0 in the middle of a sulcus."""
    x, y, z = plane.x, plane.y, plane.z
    bent_x, bent_y = x, y
    for kx, ky, kz, phase, dx, dy in anatomy.bend.astype(np.float32):
        wave = np.sin(kx * x + ky * y + np.float32(kz * z + phase))
        bent_x, bent_y = bent_x + dx * wave, bent_y + dy * wave
    fold, slope_x, slope_y = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for kx, ky, kz, phase, amplitude in anatomy.waves.astype(np.float32):
        angle = kx * bent_x + ky * bent_y + np.float32(kz * z + phase)
        fold += amplitude * np.sin(angle)
        slope = amplitude * np.cos(angle)
        slope_x += kx * slope
        slope_y += ky * slope
    gradient: Field = np.sqrt(slope_x * slope_x + slope_y * slope_y + np.float32(64.0))
    return np.abs(fold) / gradient


def _scan(image: Field, plane: _Plane, rng: np.random.Generator) -> Picture:
    """The slice as a scanner measures it: coil profile, gain, Rician noise."""
    x, y = plane.x, plane.y
    tilt = rng.normal(0, 0.06, 5).astype(np.float32)
    coil = 1 + tilt[0] * x + tilt[1] * y + tilt[2] * x * y + tilt[3] * (x * x) + tilt[4] * (y * y)
    signal = image * coil * np.float32(rng.uniform(0.94, 1.06))
    noise = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(rng.uniform(0.012, 0.026))
    measured = np.hypot(signal + noise[0], noise[1])
    return np.rint(np.clip(measured, 0, 1) * 255).astype(np.uint8)


def _over(below: Field, value: float | Field, cover: Field) -> Field:
    """`value` laid over `below` with opacity `cover`."""
    return below + (np.asarray(value, np.float32) - below) * cover


def _ellipse(x: Field, y: Field, cx: float, cy: float, a: float, b: float) -> Field:
    """About the signed distance to an axis-parallel ellipse."""
    return (np.sqrt(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2) - np.float32(1)) * np.float32(min(a, b))


class PhantomSource:
    def __init__(self, seed: int, size: int, count: Mapping[str, int]) -> None:
        self._seed, self._size, self._count = seed, size, dict(count)

    def items(self) -> Iterator[Item | Problem]:
        for split, count in self._count.items():
            for i in range(count):
                subject, number = divmod(i, SLICES)
                name = f"{split}_{subject:05d}"
                key = f"{name}_slice_{number:02d}"
                yield Item(key, split, _class_of(subject), name, f"phantom {key}", (split, subject, number))

    def load(self, item: Item) -> Picture:
        split, subject, number = item.location
        anatomy = head(self._seed, split, subject)
        rng = _generator("phantom slice", self._seed, split, subject, number)
        height = (number + float(rng.uniform(0, 0.9))) / SLICES
        return render(anatomy, height, self._size, rng)


def open_source(_path: Path, settings: SourceSettings) -> PhantomSource:
    return PhantomSource(settings.seed, settings.size or SIZE, settings.count or COUNT)
