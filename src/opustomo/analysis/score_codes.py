"""How well codes tell composition, conformation and junk, and how much they tell about what they should not.

Owns: the metrics on arrays alone.  Codes are (P, zdim); "label-free" means that labels only score the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import adjusted_rand_score, r2_score, roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict, cross_val_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from opustomo.analysis.independence import independent_components

Codes = NDArray[np.floating]
Scores = dict[str, Any]

FOLDS = 5
NEIGHBOURS = 20
ACTIVE = 1e-4  # components with less than this fraction of the largest variance are collapsed


def active(codes: Codes) -> Codes:
    """The dimensions in use, at least one: those whose codes vary more than a tenth of the widest (Burda et al. 2016).

    A collapsed dimension carries the prior; mixtures and independent components would sort by its noise.
    """
    spread = codes.std(0)
    return codes[:, spread >= 0.1 * spread.max()]


def composition(codes: Codes, state: NDArray[np.int64], seed: int = 0) -> Scores:
    """Linear-probe AUC, label-free ARI of k-means and GMM, AUC of single independent components.

    state: (P,) with at least two values.  AUCs are one-versus-rest averaged over states; ``ica_auc`` takes for each
    state the component that singles it out best.
    """
    k = len(np.unique(state))
    sources = _sources(codes, seed)
    best = [max((_separation(s, state == value) for s in sources.T), default=0.5) for value in np.unique(state)]
    return {
        "auc": probe_auc(codes, state, seed),
        "kmeans_ari": float(adjusted_rand_score(state, kmeans_classes(codes, k, seed))),
        "gmm_ari": float(adjusted_rand_score(state, gmm_classes(codes, k, seed))),
        "ica_auc": float(np.mean(best)),
    }


def probe_auc(codes: Codes, state: NDArray[np.int64], seed: int = 0) -> float:
    """Cross-validated AUC of a logistic regression, mean over folds; NaN if a state has fewer than two particles."""
    folds = min(FOLDS, int(np.unique(state, return_counts=True)[1].min()))
    if folds < 2:
        return float("nan")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with _quiet():
        return float(np.mean(cross_val_score(model, codes, state, cv=split, scoring="roc_auc_ovr")))


def kmeans_classes(codes: Codes, k: int, seed: int = 0) -> NDArray[np.int64]:
    """Label-free classes (P,) of k-means."""
    with _quiet():
        return np.asarray(KMeans(k, n_init=20, random_state=seed).fit_predict(codes), np.int64)


def gmm_classes(codes: Codes, k: int, seed: int = 0) -> NDArray[np.int64]:
    """Label-free classes (P,) of a k-component Gaussian mixture.

    Covariances are shared or free, whichever has the better BIC.  A mixture can also sort by spread instead of place
    (codes of noisier particles scatter less): then its ARI is near 0 where that of k-means is not.
    """
    scaled = codes.astype(np.float64) / max(float(codes.std(0).max()), 1e-12)
    with _quiet():
        fits = [
            GaussianMixture(k, covariance_type=form, n_init=10, reg_covar=1e-4, random_state=seed).fit(scaled)
            for form in ("full", "tied")
        ]
    best = min(fits, key=lambda fit: fit.bic(scaled))
    return np.asarray(best.predict(scaled), np.int64)


def conformation(codes: Codes, value: NDArray[np.float64], seed: int = 0) -> Scores:
    """Correlation of a cross-validated ridge probe with ``value`` (P,), and of the best single component.

    ``pc_spearman``: absolute rank correlation of one principal component; ``ica_corr``: absolute correlation of one
    independent component.
    """
    predicted = _cross_validated(_ridge(), codes, value, seed)
    components = principal_components(codes)
    spearman = [abs(spearmanr(c, value).statistic) for c in components.T]
    pearson = [abs(_correlation(s, value)) for s in _sources(codes, seed).T]
    return {
        "probe_corr": _correlation(predicted, value),
        "pc_spearman": float(max(spearman, default=0.0)),
        "ica_corr": float(max(pearson, default=0.0)),
    }


def invariance(codes: Codes, nuisances: dict[str, NDArray[np.float64]], seed: int = 0) -> Scores:
    """Cross-validated R^2 with which each nuisance (P, d) is predicted by ridge regression and nearest neighbours.

    0 or below: nothing can be read from the code.  Constant nuisances are left out.  Names that end in ``_even`` do
    not enter ``max_r2`` but ``max_r2_even``.
    """
    scores: Scores = {}
    for name, value in nuisances.items():
        value = value.reshape(len(codes), -1)
        if np.ptp(value, axis=0).max() < 1e-9:
            continue
        knn = make_pipeline(StandardScaler(), KNeighborsRegressor(min(NEIGHBOURS, len(codes) // 2)))
        for method, model in (("ridge", _ridge()), ("knn", knn)):
            predicted = _cross_validated(model, codes, value, seed).reshape(value.shape)
            scores[f"{name}_{method}"] = float(r2_score(value, predicted, multioutput="variance_weighted"))
    even = [score for name, score in scores.items() if "_even_" in name]
    plain = [score for name, score in scores.items() if "_even_" not in name]
    extremes = {"max_r2": max(plain, default=float("nan")), "max_r2_even": max(even, default=float("nan"))}
    return scores | {name: value for name, value in extremes.items() if np.isfinite(value)}


def outlier_auc(codes: Codes, junk: NDArray[np.bool_]) -> float:
    """AUC with which the code's Mahalanobis distance from the median code tells junk from particles; label-free."""
    offset = codes.astype(np.float64) - np.median(codes, 0)
    covariance = np.atleast_2d(np.cov(offset.T))
    ridge = 1e-6 * max(float(np.trace(covariance)), 1e-12) * np.eye(len(covariance))
    distance = np.einsum("pi,pi->p", offset, np.linalg.solve(covariance + ridge, offset.T).T)
    return float(roc_auc_score(junk, distance))


def principal_components(codes: Codes) -> NDArray[np.float64]:
    """Scores (P, n) on the principal axes that carry variance, largest first; n may be 0."""
    centred = codes.astype(np.float64) - codes.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    keep = s**2 > ACTIVE * max(float(s[0]) ** 2, 1e-20)
    return (u * s)[:, keep]


def _sources(codes: Codes, seed: int) -> NDArray[np.float64]:
    """Independent components (P, n) of the principal components that carry variance; n may be 0."""
    components = principal_components(codes)
    # all in one unit, so that the search does not depend on that of the codes
    return independent_components(components / components[:, :1].std(), seed)[0] if components.size else components


def _separation(score: NDArray[np.float64], member: NDArray[np.bool_]) -> float:
    auc = float(roc_auc_score(member, score))
    return max(auc, 1 - auc)


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def _ridge() -> Any:
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))


def _cross_validated(model: Any, codes: Codes, value: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    split = KFold(min(FOLDS, len(codes)), shuffle=True, random_state=seed)
    # standardised targets: defocus in Angstrom and cosines then see the same range of ridge penalties
    scale = value.std(0) + 1e-12
    return np.asarray(cross_val_predict(model, codes, value / scale, cv=split)) * scale


@contextmanager
def _quiet() -> Iterator[None]:
    """Fits that stop early still score; the metric itself shows what they missed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
