"""What the workloads work on: photographs, feature maps and patches of them, sentences, boxes as a detector leaves them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

SEED = 20261123


class MissingExtra(ImportError):
    """A package of the `bench` extra is not installed."""

    def __init__(self, package: str, use: str):
        super().__init__(f"{use} needs {package}, which is not installed: pip install 'hotloops[bench]'")


def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


def normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)


@functools.cache
def photographs() -> np.ndarray:
    """float32[2, 3, 427, 640]: the two photographs that scikit-learn ships (china.jpg, flower.jpg), normalised per colour."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError as error:
        raise MissingExtra("scikit-learn with pillow", "loading the photographs") from error
    pictures = np.stack(images).astype(np.float32).transpose(0, 3, 1, 2)
    mean, deviation = pictures.mean((0, 2, 3), keepdims=True), pictures.std((0, 2, 3), keepdims=True)
    return np.ascontiguousarray((pictures - mean) / deviation)


def photo_batch(N: int, H: int, W: int, random: np.random.Generator) -> np.ndarray:
    """float32[N, 3, H, W]: cut-outs of the photographs; a larger size than theirs is sampled from the whole picture."""
    pictures = photographs()
    height, width = pictures.shape[2:]
    batch = np.empty((N, 3, H, W), np.float32)
    for n in range(N):
        picture = pictures[n % len(pictures)]
        if height >= H and width >= W:
            y, x = random.integers(0, height - H + 1), random.integers(0, width - W + 1)
            batch[n] = picture[:, y : y + H, x : x + W]
        else:
            batch[n] = picture[:, np.arange(H) * height // H][:, :, np.arange(W) * width // W]
    return batch


def features(N: int, C: int, H: int, W: int, random: np.random.Generator) -> np.ndarray:
    """float32[N, C, H, W]: what a first layer makes of photographs: C mixtures of their colours, negative parts cut off."""
    if C == 3:
        return photo_batch(N, H, W, random)
    mixture = normal(random, C, 3)
    maps = np.einsum("cd,ndhw->nchw", mixture, photo_batch(N, H, W, random), optimize=True)
    return np.ascontiguousarray(np.maximum(maps, 0))  # einsum leaves the channels last


def patches(B: int, L: int, D: int, random: np.random.Generator) -> np.ndarray:
    """float32[B, L, D]: L patches of 16 x 16 pixels of a photograph, each put through one random projection to D numbers."""
    windows = np.lib.stride_tricks.sliding_window_view(photographs(), (3, 16, 16), axis=(1, 2, 3))[:, 0]
    which = np.arange(B) % len(windows)
    y, x = random.integers(0, windows.shape[1], (B, L)), random.integers(0, windows.shape[2], (B, L))
    pixels = windows[which[:, None], y, x].reshape(B * L, -1)
    return (pixels @ normal(random, pixels.shape[1], D, scale=pixels.shape[1] ** -0.5)).reshape(B, L, D)


def sentences(T: int, N: int, D: int, random: np.random.Generator) -> np.ndarray:
    """float32[T, N, D]: N texts of T words, frequent words more often (Zipf), as rows of one embedding table."""
    words = np.minimum(random.zipf(1.3, (T, N)), 5000) - 1
    return normal(random, 5000, D)[words]


def boxes(n: int, random: np.random.Generator, width: float = 1333, height: float = 800) -> np.ndarray:
    """float32[n, 4]: boxes x1 y1 x2 y2 with log-normal sides on a picture of 1333 x 800 pixels."""
    sides = np.exp(random.normal(4.0, 0.8, (n, 2)))
    corner = random.random((n, 2)) * [width, height]
    return np.concatenate([corner, corner + sides], 1).astype(np.float32)


def detections(n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(float32[n, 4], float32[n]): boxes in clusters of about ten around an object, and scores that are all different."""
    objects = boxes(max(1, n // 10), random)
    found = objects[random.integers(0, len(objects), n)]
    sides = found[:, 2:] - found[:, :2]
    found = found + np.concatenate([sides, sides], 1) * random.normal(0, 0.08, (n, 4))
    found[:, :2] = np.minimum(found[:, :2], found[:, 2:] - 1)
    return found.astype(np.float32), random.permutation(n).astype(np.float32) / n + np.float32(1e-4)


def recurrent(kind: str, T: int, N: int, D: int, H: int) -> dict[str, Any]:
    """A text, a first state and the weights of one layer, uniform in +-1/sqrt(H)."""
    random, gates = rng(), {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    shapes = [(gates * H, D), (gates * H, H), (gates * H,), (gates * H,)]
    weights = [random.uniform(-(H**-0.5), H**-0.5, shape).astype(np.float32) for shape in shapes]
    arrays = {"x": sentences(T, N, D, random), "h0": normal(random, 1, N, H, scale=0.1)}
    if kind == "lstm":
        arrays["c0"] = normal(random, 1, N, H, scale=0.1)
    return {**arrays, **dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True)), "gy": normal(random, T, N, H)}
