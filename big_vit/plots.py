"""Curves and grids of images as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8


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
    panels = (('loss', ('loss',)), ('accuracy', ('accuracy', 'top1')), ('learning rate', ('lr',)))
    for axis, (title, wanted) in zip(axes[0], panels, strict=True):
        for i, (run, rows) in enumerate(runs.items()):
            names = sorted({n for row in rows for n in row if n.rpartition('/')[2] in wanted})
            for name in names:
                points = [(row['step'], row[name]) for row in rows if name in row]
                split = name.rpartition('/')[0]
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
