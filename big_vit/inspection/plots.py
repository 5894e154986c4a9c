"""Figures to save or to show in a notebook: curves, image grids, weights and attention."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from big_vit import metrics
from big_vit.inspection import line_styles, weight_statistics


class Picture:
    """A finished figure, which a notebook displays when it is the last value of a cell."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure

    def save(self, path: str | Path) -> None:
        """Write a PNG file."""
        self.figure.savefig(path)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format='png')
        return buffer.getvalue()


def canvas(columns: int, rows: int, width: float, height: float) -> tuple[Any, Any]:
    """Return (figure, axes [rows, columns]); width and height are those of one axis, in inches."""
    # An explicit canvas: importing pyplot would pick a backend and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout='constrained', dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def curves(runs: dict[str, list[dict[str, Any]]], slots: dict[str, int] | None = None) -> Picture:
    """Plot loss, accuracy, rank of features and learning rate, one line per run and split.

    Of these there are only panels for what the runs have.

    Args:
      runs: rows of `metrics.read` by the name of the run.
      slots: of colour and dash in `line_styles`, by the name of the run; by default in order.
    """
    height = max(3.6, min(0.2 * len(runs), 6.0))
    there = {run: {name for row in rows for name in row} for run, rows in runs.items()}
    shares = {run: {*filter(metrics.is_share, metrics.headlines(r))} for run, r in runs.items()}
    wanted = {
        'loss': {run: _called(names, 'loss') for run, names in there.items()},
        'accuracy': {run: _called(names, 'accuracy') | shares[run] for run, names in there.items()},
        'rank of the features': {run: _called(names, 'rankme') for run, names in there.items()},
        'learning rate': {run: _called(names, 'lr') for run, names in there.items()},
    }
    panels = {title: names for title, names in wanted.items() if any(names.values())}
    figure, axes = canvas(max(len(panels), 1), 1, 5.0, height)
    entries: dict[str, Any] = {}
    for axis, (title, names) in zip(axes[0], panels.items(), strict=False):
        for i, (run, rows) in enumerate(runs.items()):
            colour, dash = line_styles.style(slots[run] if slots else i)
            for name in sorted(names[run]):
                points = [(row['step'], row[name]) for row in rows if name in row]
                split = name.partition('/')[0]
                held_out = split != 'train'
                (line,) = axis.plot(
                    *zip(*points, strict=True),
                    color=line_styles.LIGHT[colour],
                    ls=(0, line_styles.DASHES[dash]) if line_styles.DASHES[dash] else '-',
                    lw=1.8 if held_out else 0.9,
                    alpha=1.0 if held_out else 0.55,
                    marker='o' if held_out else None,
                    ms=3,
                    label=f'{run} {split}'.strip(),
                )
                entries.setdefault(run, line)
        axis.set_title(title)
        axis.set_xlabel('step')
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
        if len(runs) == 1 and axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    if len(runs) > 1:  # Runs only: dots are evaluations, thin lines the training.
        figure.legend(
            list(entries.values()), list(entries), loc='outside right center', frameon=False,
            fontsize=8, ncols=1 + int(0.17 * (len(entries) - 1) / height),
        )  # fmt: skip
    return Picture(figure)


def _called(names: set[str], key: str) -> set[str]:
    return {name for name in names if name.rpartition('/')[2] == key}


def grid(
    images: UInt8[np.ndarray, 'count height width channels'],
    labels: list[str],
    columns: int = 10,
) -> Picture:
    """Show images with their labels, row by row."""
    rows = -(-len(images) // columns)
    figure, axes = canvas(columns, rows, 1.0, 1.15)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, label in zip(axes.flat, images, labels, strict=False):
        shown = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
        axis.imshow(shown, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
        axis.set_title(label, fontsize=7, pad=2, parse_math=False)
    return Picture(figure)


WIDTH = 1.7  # Of a picture among others, in inches.


def picture_rows(
    rows: list[tuple[str, list[np.ndarray], list[str]]], width: float = WIDTH
) -> Picture:
    """Show rows of pictures with a name per row and a title per picture.

    Args:
      rows: (name, pictures [h, w, c] of any size and type, titles). Pictures that are not uint8 are
        rescaled, all pictures of a row alike.
      width: of a picture, in inches.
    """
    columns = max(len(pictures) for _, pictures, _ in rows)
    figure, axes = canvas(columns, len(rows), width, width + 0.25)
    for line, (name, pictures, titles) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=9)
        for axis, picture, text in zip(line, as_bytes(pictures), titles, strict=False):
            grey = picture.shape[-1] < 3
            shown = picture[..., 0] if grey else picture[..., :3]
            smooth = 'antialiased' if width > WIDTH else 'nearest'  # Letters are not enlarged.
            axis.imshow(shown, cmap='gray', vmin=0, vmax=255, interpolation=smooth)
            # A class may be called $5.
            axis.set_title(text, fontsize=7, pad=2, parse_math=False)
    return Picture(figure)


def as_bytes(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Rescale pictures of any type to uint8 alike, clipping the outermost 0.5 % of values."""
    if not pictures or all(picture.dtype == np.uint8 for picture in pictures):
        return pictures
    values = np.concatenate([np.ravel(picture) for picture in pictures]).astype(np.float32)
    low, high = np.quantile(values, [0.005, 0.995])
    scale = 255 / max(float(high - low), 1e-9)
    return [
        np.rint(np.clip((np.asarray(picture, np.float32) - low) * scale, 0, 255)).astype(np.uint8)
        for picture in pictures
    ]


def stretched(
    components: Float[np.ndarray, 'count rows columns channels'],
) -> list[np.ndarray]:
    """Rescale each component to uint8 on its own: signs and lengths of components mean nothing."""
    low = components.min((1, 2, 3), keepdims=True)
    high = components.max((1, 2, 3), keepdims=True)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return list(np.rint(255 * scaled).astype(np.uint8))


def signed(values: Float[np.ndarray, 'rows columns']) -> UInt8[np.ndarray, 'rows columns 3']:
    """Map values from -1 (blue) over 0 (white) to 1 (red)."""
    from matplotlib import colormaps

    colours = colormaps['RdBu_r']((np.clip(values, -1, 1) + 1) / 2)[..., :3]
    return np.rint(255 * colours).astype(np.uint8)


def components(kernel: Float[np.ndarray, '...']) -> Picture:
    """Show the principal components of a patch embedding, in rows of seven."""
    pictures = stretched(weight_statistics.components(kernel))
    rows = [
        ('', pictures[i : i + 7], [str(i + k + 1) for k in range(7)])
        for i in range(0, len(pictures), 7)
    ]
    return picture_rows(rows)


def some_of(count: int, most: int) -> list[int]:
    """Return at most `most` of 0..count-1, evenly spaced, including both ends."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most)).tolist()})


def similarity(cosine: Float[np.ndarray, 'rows columns rows columns']) -> Picture:
    """Show the cosine of some positions of the grid with all positions."""
    rows, columns = (some_of(n, 7) for n in cosine.shape[:2])
    figure, axes = canvas(len(columns), len(rows), 0.95, 0.95)
    for line, row in zip(axes, rows, strict=True):
        for axis, column in zip(line, columns, strict=True):
            shown = axis.imshow(
                cosine[row, column], vmin=-1, vmax=1, cmap='RdBu_r', interpolation='nearest'
            )
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle('cosine of each position with all positions', fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return Picture(figure)


def heat(
    image: UInt8[np.ndarray, 'height width channels'], share: Float[np.ndarray, 'rows columns']
) -> UInt8[np.ndarray, 'height width 3']:
    """Overlay a grey image with a map of its patches, from dark violet (least) to yellow."""
    import cv2
    from matplotlib import colormaps

    low, high = float(share.min()), float(share.max())
    scaled = (share - low) / max(high - low, 1e-12)
    size = image.shape[1], image.shape[0]
    upsampled = cv2.resize(scaled.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    colour = colormaps['inferno'](np.clip(upsampled, 0, 1))[..., :3]
    # Added rather than multiplied, so that the map shows on black images and the image under a
    # bright map.
    grey = image.mean(-1, keepdims=True) / 255
    return np.rint(255 * (0.6 * colour + 0.4 * grey)).astype(np.uint8)


def attention_panels(
    image: UInt8[np.ndarray, 'height width channels'],
    weights: Float[np.ndarray, 'depth heads tokens tokens'],
    grid: tuple[int, int],
    prefix: int,
) -> list[tuple[str, np.ndarray]]:
    """Return (title, picture) of the image, of the attention of some blocks, and of the rollout."""
    panels = [('image', image)]
    for block in some_of(len(weights), 4):
        share = weight_statistics.patch_attention(weights[block].mean(0), prefix, grid)
        panels.append((f'block {block + 1}', heat(image, share)))
    share = weight_statistics.patch_attention(weight_statistics.rollout(weights), prefix, grid)
    return [*panels, ('rollout', heat(image, share))]


def attention(rows: list[list[tuple[str, np.ndarray]]]) -> Picture:
    """Show the results of `attention_panels`, one row per image."""
    return picture_rows([('', [p for _, p in row], [t for t, _ in row]) for row in rows])


def lines(panels: dict[str, dict[str, Float[np.ndarray, ' depth']]]) -> Picture:
    """Plot one panel per title, with a line over the blocks for each name."""
    figure, axes = canvas(len(panels), 1, 4.6, 3.6)
    for axis, (title, by_name) in zip(axes[0], panels.items(), strict=True):
        for name, values in by_name.items():
            axis.plot(np.arange(1, len(values) + 1), values, marker='o', ms=3, lw=1.4, label=name)
        _style_axis(axis, title, 'block')
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(bottom=0)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside right center', frameon=False, fontsize=8)
    return Picture(figure)


def _style_axis(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(below)
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)


def spectra(values: dict[str, Float[np.ndarray, 'depth rank']]) -> Picture:
    """Plot the singular values of each kind of kernel, one line per block, the first darkest."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = min(len(values), 3)
    figure, axes = canvas(columns, -(-len(values) // columns), 3.6, 2.9)
    depth = max(len(by_block) for by_block in values.values())
    colours = colormaps['viridis'](np.linspace(0, 0.92, depth))
    for axis in axes.flat[len(values) :]:
        axis.set_axis_off()
    for axis, (part, by_block) in zip(axes.flat, values.items(), strict=False):
        for colour, row in zip(colours, by_block, strict=False):
            axis.plot(np.arange(1, len(row) + 1), row, color=colour, lw=1.2)
        _style_axis(axis, part, 'singular value')
        # Rounding leaves tiny values in place of zeros, which would fill most of a log scale.
        axis.set_yscale('log')
        axis.set_ylim(bottom=max(float(by_block.min()) * 0.7, float(by_block.max()) * 1e-4, 1e-12))
    scale = ScalarMappable(Normalize(1, max(depth, 2)), colormaps['viridis'])
    bar = figure.colorbar(scale, ax=axes, shrink=0.7, label='block')
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return Picture(figure)


def distances(values: Float[np.ndarray, 'depth heads']) -> Picture:
    """Plot the mean attention distance of each head of each block, in pixels."""
    figure, axes = canvas(1, 1, 5.4, 3.6)
    axis, blocks = axes[0, 0], np.arange(1, len(values) + 1)
    axis.plot(
        np.repeat(blocks, values.shape[1]), values.ravel(), 'o', ms=5, alpha=0.6, mew=0,
        label='a head',
    )  # fmt: skip
    axis.plot(blocks, values.mean(1), color='0.35', lw=1.2, label='mean of the heads')
    _style_axis(axis, 'mean attention distance', 'block')
    axis.set_ylabel('pixels')
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
    return Picture(figure)


def comparison(differences: weight_statistics.Comparison) -> Picture:
    """Plot the relative change of each array: a map for the blocks, bars for the rest."""
    from matplotlib.colors import LogNorm

    change = {name: difference.relative for name, difference in differences.both.items()}
    blocks = weight_statistics.by_block(change)
    rest = {
        name: value for name, value in change.items() if weight_statistics.split_block(name) is None
    }
    figure, axes = canvas(2, 1, 5.6, max(3.2, 0.28 * max(len(blocks), len(rest))))
    left, right = axes[0]
    # A log scale has no place for unchanged arrays (0), nor for those that grew from zero (inf).
    finite = [v for v in change.values() if 0 < v < np.inf]
    low, high = (min(finite), max(finite)) if finite else (1e-3, 1.0)
    norm = LogNorm(low, max(high, low * 1.01))
    if blocks:
        table = np.stack(list(blocks.values()))
        heat_map = left.imshow(table, norm=norm, cmap='viridis', aspect='auto')
        left.set_xticks(range(table.shape[1]), range(1, table.shape[1] + 1), fontsize=7)
        left.set_yticks(range(len(blocks)), [_short(name) for name in blocks], fontsize=7)
        left.set_xlabel('block')
        figure.colorbar(heat_map, ax=left, label='relative change')
    else:
        left.set_axis_off()
    places = np.arange(len(rest))
    right.barh(places, [v if v < np.inf else high for v in rest.values()], height=0.7)
    right.set_yticks(places, [_short(name) for name in rest], fontsize=7)
    right.invert_yaxis()
    _style_axis(right, 'outside the blocks', 'relative change')
    left.set_title('in the blocks', fontsize=10)
    return Picture(figure)


def _short(name: str) -> str:
    """Abbreviate the long words in a parameter path."""
    for long, short in (
        ('MultiHeadDotProductAttention_0', 'attention'),
        ('MlpBlock_0', 'mlp'),
        ('Transformer/', ''),
    ):
        name = name.replace(long, short)
    return name
