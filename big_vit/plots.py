"""Curves and grids of images as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from big_vit import metrics


def canvas(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes [rows, columns]); width and height are those of one axis, in inches."""
    # An explicit canvas: importing pyplot would pick a backend and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout='constrained', dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def curves(runs: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Loss, accuracy and learning rate over the steps, one line for each run and split.

    Args:
      runs: rows of `metrics.read` by the name of the run.
    """
    figure, axes = canvas(3, 1, 5.0, 3.6)
    panels = (('loss', ('loss',)), ('accuracy', ('accuracy',)), ('learning rate', ('lr',)))
    for axis, (title, wanted) in zip(axes[0], panels, strict=True):
        for i, (run, rows) in enumerate(runs.items()):
            names = {n for row in rows for n in row if n.rpartition('/')[2] in wanted}
            names |= set(metrics.headlines(rows)) if title == 'accuracy' else set()
            for name in sorted(names):
                points = [(row['step'], row[name]) for row in rows if name in row]
                split = name.partition('/')[0]
                held_out = split != 'train'
                axis.plot(
                    *zip(*points, strict=True),
                    color=f'C{i}',
                    lw=1.8 if held_out else 0.9,
                    alpha=1.0 if held_out else 0.55,
                    marker='o' if held_out else None,
                    ms=3,
                    label=f'{run} {split}'.strip(),
                )
        axis.set_title(title)
        axis.set_xlabel('step')
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def grid(
    images: UInt8[np.ndarray, 'count height width channels'],
    labels: Int[np.ndarray, ' count'],
    path: str | Path,
    columns: int = 10,
) -> None:
    """Images with their labels, row by row."""
    rows = -(-len(images) // columns)
    figure, axes = canvas(columns, rows, 1.0, 1.15)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        shown = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
        axis.imshow(shown, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axis.set_title(str(label), fontsize=7, pad=2)
    figure.savefig(path)


def picture_rows(rows: list[tuple[str, list[np.ndarray], list[str]]], path: str | Path) -> None:
    """Rows of pictures, each row with its name and each picture with its title.

    Args:
      rows: (name, pictures [h, w, c] of any sizes and types, titles). Those that are not bytes
        are stretched, the same for all of a row.
    """
    columns = max(len(pictures) for _, pictures, _ in rows)
    figure, axes = canvas(columns, len(rows), 1.7, 1.95)
    for line, (name, pictures, titles) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=9)
        for axis, picture, text in zip(line, as_bytes(pictures), titles, strict=False):
            grey = picture.shape[-1] < 3
            shown = picture[..., 0] if grey else picture[..., :3]
            axis.imshow(shown, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
            axis.set_title(text, fontsize=7, pad=2)
    figure.savefig(path)


def as_bytes(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures of any type as bytes, stretched alike; the outermost 0.5 % of values are cut off."""
    if not pictures or all(picture.dtype == np.uint8 for picture in pictures):
        return pictures
    values = np.concatenate([np.ravel(picture) for picture in pictures]).astype(np.float32)
    low, high = np.quantile(values, [0.005, 0.995])
    scale = 255 / max(float(high - low), 1e-9)
    return [
        np.rint(np.clip((np.asarray(picture, np.float32) - low) * scale, 0, 255)).astype(np.uint8)
        for picture in pictures
    ]


def components(
    kernel: Float[np.ndarray, '*lead rows columns channels width'], count: int = 28
) -> list[np.ndarray]:
    """The principal components of a patch embedding's kernels, largest first, as pictures.

    As figure 7 of the ViT paper (arXiv 2010.11929). Each is [rows, columns, 3], or of other than
    three channels [rows, columns, 1], their mean; of several frames the middle one.
    """
    frames = kernel.reshape(-1, *kernel.shape[-4:])
    kernel = np.asarray(frames[len(frames) // 2], np.float64)
    if kernel.shape[2] != 3:
        kernel = kernel.mean(2, keepdims=True)
    flat = kernel.reshape(-1, kernel.shape[3])
    left, _, _ = np.linalg.svd(flat - flat.mean(1, keepdims=True), full_matrices=False)
    pictures = left.T[:count].reshape(-1, *kernel.shape[:3])
    # Each is stretched for itself: signs and lengths of components mean nothing.
    low = pictures.min((1, 2, 3), keepdims=True)
    high = pictures.max((1, 2, 3), keepdims=True)
    return list(np.rint(255 * (pictures - low) / np.maximum(high - low, 1e-12)).astype(np.uint8))


def embedding(kernel: Float[np.ndarray, '...'], path: str | Path) -> None:
    """The components of a patch embedding, in rows of seven."""
    pictures = components(kernel)
    rows = [
        ('', pictures[i : i + 7], [str(i + k + 1) for k in range(7)])
        for i in range(0, len(pictures), 7)
    ]
    picture_rows(rows, path)


def similarity(
    table: Float[np.ndarray, 'tokens width'], grid: tuple[int, int], path: str | Path
) -> None:
    """How alike the positions are: for some of the grid, the cosine with each of the others."""
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    chosen = [np.unique(np.linspace(0, n - 1, min(n, 7)).round().astype(int)) for n in grid]
    figure, axes = canvas(len(chosen[1]), len(chosen[0]), 0.95, 0.95)
    for line, row in zip(axes, chosen[0], strict=True):
        for axis, column in zip(line, chosen[1], strict=True):
            cosine = (unit @ unit[row * grid[1] + column]).reshape(grid)
            shown = axis.imshow(cosine, vmin=-1, vmax=1, cmap='RdBu_r', interpolation='nearest')
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle('cosine of each position with all positions', fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(path)


def rollout(
    weights: Float[np.ndarray, 'depth heads tokens tokens'],
) -> Float[np.ndarray, 'tokens tokens']:
    """How much each token of the last block has of each input token (arXiv 2005.00928).

    The mean over heads, half of it the residual, multiplied through the blocks.
    """
    mixed = np.eye(weights.shape[-1])
    for block in np.asarray(weights, np.float64).mean(1):
        mixed = (block + np.eye(len(block))) / 2 @ mixed
    return mixed


def heat(
    image: UInt8[np.ndarray, 'height width channels'], share: Float[np.ndarray, 'rows columns']
) -> UInt8[np.ndarray, 'height width 3']:
    """An image under a map of its patches, the darker the smaller their share."""
    import cv2

    rgb = np.repeat(image[..., :1], 3, 2) if image.shape[2] < 3 else image[..., :3]
    top = share / max(float(share.max()), 1e-12)
    size = image.shape[1], image.shape[0]
    wide = cv2.resize(top.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.rint(rgb * (0.15 + 0.85 * np.clip(wide, 0, 1)[..., None])).astype(np.uint8)


def attention(
    images: UInt8[np.ndarray, 'count height width channels'],
    weights: Float[np.ndarray, 'depth count heads tokens tokens'],
    grid: tuple[int, int],
    prefix: int,
    path: str | Path,
) -> None:
    """A row for each image: itself, what some blocks look at, and the rollout.

    Looked at by the class token, or, without one, by all patches on average.
    """
    depth = len(weights)
    blocks = sorted({*np.linspace(0, depth - 1, min(depth, 4)).round().astype(int).tolist()})
    rows = []
    for i, image in enumerate(images):

        def share(matrix: np.ndarray) -> np.ndarray:
            own = matrix[0] if prefix else matrix.mean(0)
            return own[prefix:].reshape(grid)

        maps = [share(weights[block, i].mean(0)) for block in blocks]
        maps.append(share(rollout(weights[:, i])))
        titles = ['image', *(f'block {block + 1}' for block in blocks), 'rollout']
        rows.append(('', [image, *(heat(image, one) for one in maps)], titles))
    picture_rows(rows, path)
