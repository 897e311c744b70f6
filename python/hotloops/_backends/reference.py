"""The NumPy specification as a backend: always there, for every element type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

NAME = "reference"
SPACE = "host"


def status() -> str:
    return ""


def broken() -> str:
    return ""


def describe() -> str:
    return f"NumPy {np.__version__}"


def prepare(record: Any, dtype: np.dtype) -> Callable[..., None]:
    function = record.reference

    def call(arrays: tuple[Any, ...], sizes: dict[str, int], scalars: dict[str, Any]) -> None:
        function(*arrays, **scalars)

    return call
