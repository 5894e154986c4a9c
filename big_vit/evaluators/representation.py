"""How much of its space a representation uses: ranks, spectrum and collapse, without labels.

Features are computed as for all evaluations that look at a frozen model; the laws are computed in
float64 on the host, from at most a few thousand examples that are spread evenly over the split.
Ranks compare checkpoints of one method, not methods (arXiv 2210.02885).
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from big_vit.errors import UserError
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures
from big_vit.evaluators.features import Features, choose_embedding
from big_vit.evaluators.requirements import requires

# Added to shares (RankMe, LiDAR) and to the covariance within pictures (LiDAR).
_RANKME_EPSILON, _LIDAR_EPSILON, _LIDAR_WITHIN = 1e-7, 1e-8, 1e-4

Rows = Float[np.ndarray, 'examples width']


@requires(
    'features',
    labels='none',
    of_data=True,
    scores=lambda views, **_: ('rankme', 'std', 'cosine', *(('lidar',) if views else ())),
)
def representation(
    evaluation: Evaluation,
    *,
    blocks: tuple[int, ...] | None = None,
    pool: str | None = None,
    examples: int = 2048,
    window: tuple[int, int] | None = None,
    views: str | None = None,
    lidar: tuple[int, int] = (200, 10),
) -> Evaluator:
    """Measure the spectrum of features, and with views how well they tell pictures apart.

    Args:
      blocks, pool: the features, as for `choose_embedding`.
      examples: most examples, spread evenly over the split.
      window: first and last eigenvalue of the slope, counted from 1; None for `middle`.
      views: random transform that makes the views for LiDAR; None for that of training, and no
        LiDAR if that is not random.
      lidar: most pictures, and views of each.

    Raises:
      UserError: `blocks`, `pool` or `views` do not fit the model.
    """
    key, (pictures, each) = evaluation.key, lidar
    embedding = choose_embedding(evaluation.model, blocks, pool, key)
    split = evaluation.sample(examples)
    seen = evaluation.views(pictures, each, views)

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            values = evaluation.compute_features(split, embedding, params, shared).values
            if len(values) < 2:
                raise UserError(f'config: {key}: has one example, whose features vary with nothing')
            found = {'rankme': rankme(values)}
            if seen is not None:
                viewed = evaluation.compute_features(seen, embedding, params, shared)
                found['lidar'] = lidar_rank(by_picture(viewed, each, key))
            found |= {'std': deviation(values), 'cosine': mean_cosine(values)}
            return {**found, **alpha(values, window), 'count': float(len(values))}

    return evaluate


def _effective_rank(shares: Float[np.ndarray, ' values']) -> float:
    return float(np.exp(-np.sum(shares * np.log(shares))))


def rankme(values: Rows) -> float:
    """Compute RankMe (arXiv 2210.02885): exp of the entropy of singular values, not centred."""
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    total = singular.sum()
    # Of zeros there is one direction at most.
    return _effective_rank(singular / total + _RANKME_EPSILON) if total else 1.0


def deviation(values: Rows) -> float:
    """Compute the mean over channels of the standard deviation, in units of the features' size.

    The unit is the root mean square of all values: 1 for features around the origin that vary alike
    in all channels, 0 for features that are the same for all examples.
    """
    wide = values.astype(np.float64)
    size = np.sqrt(np.square(wide).mean())
    return float(wide.std(axis=0).mean() / size) if size else 0.0


def mean_cosine(values: Rows) -> float:
    """Compute the mean cosine of the features of two different examples; zeros are like all."""
    wide = values.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(length > 0, length, 1)
    count, same = len(unit), np.square(unit).sum()
    if not same:
        return 1.0
    return float((np.square(unit.sum(axis=0)).sum() - same) / (count * (count - 1)))


def spectrum(values: Rows) -> Float[np.ndarray, ' values']:
    """Compute the eigenvalues of the centred covariance, the largest first.

    Left out are those below what rounding the features to float32 makes.
    """
    wide = values.astype(np.float64)
    singular = np.linalg.svd(wide - wide.mean(axis=0), compute_uv=False)
    noise = np.finfo(np.float32).eps * np.sqrt(np.square(wide).sum())
    return np.square(singular[singular > noise]) / (len(values) - 1)


def middle(count: int) -> tuple[int, int]:
    """Choose the window of a spectrum: without the first few eigenvalues and the smaller half."""
    return (5, count // 2) if count >= 16 else (1, count)


def alpha(values: Rows, window: tuple[int, int] | None = None) -> dict[str, float]:
    """Fit the decay of the spectrum, eigenvalue j ~ j^-alpha (alpha-ReQ, arXiv 2202.05808).

    By least squares of the logarithms over a window of eigenvalues.

    Args:
      window: first and last eigenvalue, counted from 1; None for `middle`.

    Returns:
      'alpha', 'alpha_r2' (the share of the variance that the line explains), 'alpha_first' and
      'alpha_last' (the window). NaN where the window has fewer than three eigenvalues.
    """
    eigenvalues = spectrum(values)
    first, last = window or middle(len(eigenvalues))
    last = min(last, len(eigenvalues))
    place = {'alpha_first': float(first), 'alpha_last': float(last)}
    if last < first + 2:
        return {'alpha': np.nan, 'alpha_r2': np.nan, **place}
    x, y = np.log(np.arange(first, last + 1)), np.log(eigenvalues[first - 1 : last])
    x, y = x - x.mean(), y - y.mean()
    slope = x @ y / (x @ x)
    rest, total = np.square(y - slope * x).sum(), y @ y
    return {'alpha': float(-slope), 'alpha_r2': float(1 - rest / total) if total else 1.0, **place}


def by_picture(viewed: Features, views: int, key: str) -> Float[np.ndarray, 'pictures views width']:
    """Group rows by picture, without pictures of which a view could not be made.

    Args:
      viewed: labels are numbers of rows before any was left out, `views` of a picture in turn.

    Raises:
      UserError: fewer than two pictures are left, or labels are not these numbers.
    """
    rows = viewed.labels
    if rows.ndim != 1 or (np.diff(rows) <= 0).any():
        raise UserError(f'config: {key}.views changes labels: leave out what does')
    whole = np.bincount(rows // views) == views
    if whole.sum() < 2:
        raise UserError(
            f'config: {key}: LiDAR compares pictures; {whole.sum()} of them can be read'
        )
    return viewed.values[whole[rows // views]].reshape(whole.sum(), views, -1)


def lidar_rank(values: Float[np.ndarray, 'pictures views width']) -> float:
    """Compute LiDAR (arXiv 2312.04000): the effective rank of linear discriminant analysis.

    Pictures are the classes, and views their examples: exp of the entropy of the eigenvalues of
    W^-1/2 B W^-1/2, with the covariances B of the pictures' means and W within pictures.
    """
    wide = values.astype(np.float64)
    pictures, views, width = wide.shape
    means = wide.mean(axis=1)
    about = means - means.mean(axis=0)
    inside = (wide - means[:, None]).reshape(-1, width)
    within = inside.T @ inside / (pictures * (views - 1)) + _LIDAR_WITHIN * np.eye(width)
    # Those of W^-1/2 B W^-1/2 are those of L^-1 B L^-T, W = L L^T, and squares of singular values.
    scaled = np.linalg.solve(np.linalg.cholesky(within), about.T / np.sqrt(pictures - 1))
    eigenvalues = np.zeros(width)
    singular = np.linalg.svd(scaled, compute_uv=False)
    eigenvalues[: len(singular)] = np.square(singular)
    total = eigenvalues.sum()
    return _effective_rank(eigenvalues / total + _LIDAR_EPSILON) if total else 1.0
