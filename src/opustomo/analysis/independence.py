"""Distinct changes on distinct axes: codes turned to independence (FastICA)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning


def independent_components(
    codes: NDArray[np.floating[Any]], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sources (P, K) of codes (P, K), of unit variance, and the mixing (K, K): ``codes - mean = sources @ mixing.T``.

    Codes of one dimension, or of hardly more particles than dimensions, stay as they are.
    """
    values, k = codes.astype(np.float64), codes.shape[1]
    if k < 2 or len(codes) <= 2 * k:
        return values, np.eye(k)
    with warnings.catch_warnings():  # a search that stops early still separates better than none
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(k, whiten="unit-variance", random_state=seed, max_iter=2000, tol=1e-3)
        return np.asarray(ica.fit_transform(values)), np.asarray(ica.mixing_)
