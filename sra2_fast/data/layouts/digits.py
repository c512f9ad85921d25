"""scikit-learn's handwritten digits as latents: 1,797 real 8x8 scans, 10 classes, no download.

The set (E. Alpaydin, C. Kaynak, UCI "Optical Recognition of Handwritten Digits") is small enough to train on with a CPU
in minutes and real enough to show that training works. Grey levels 0..16 become z in [-1, 1]; one channel,
no posterior.
"""

from __future__ import annotations

import numpy as np

from ...errors import InputError
from ..source import DecodeInfo, LatentSource, digest

WHITE = 16.0


class DigitsSource(LatentSource):
    """The digits, held in memory (460 KB)."""

    name = "digits"
    num_classes = 10
    shape = (1, 8, 8)

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError("data: digits needs scikit-learn; pip install scikit-learn") from error
        digits = load_digits()
        self._values = digits.images.astype(np.float32)[:, None]
        self._labels = digits.target.astype(np.int64)
        self.num_samples = len(self._labels)
        self.class_names = [str(digit) for digit in range(10)]
        self.shift = np.full(1, WHITE / 2, dtype=np.float32)
        self.scale = np.full(1, 2 / WHITE, dtype=np.float32)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """indices: (n,) -> grey levels (n, 1, 8, 8) float32 from 0 to 16, labels (n,) int64."""
        return self._values[indices], self._labels[indices]

    def fingerprint(self) -> str:
        """Of all values and labels."""
        return digest(self.outline(), self._values, self._labels)

    def decode_info(self) -> DecodeInfo:
        """Grey levels are the image itself."""
        return DecodeInfo("grayscale", self.shift, self.scale, white=WHITE)
