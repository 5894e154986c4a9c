"""A checkpoint to look at: ours or another codebase's weights, on one CPU, without its data."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from big_vit import checkpoint, interop, sharding, state, trees
from big_vit import config as config_lib
from big_vit.build.model import build_model, build_streams, parts_read
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.data import decode
from big_vit.errors import UserError
from big_vit.interop import Weights
from big_vit.models import tokenizers
from big_vit.models.vit import ViT, make_vit
from big_vit.pretrained.load import image_normalisation

# A photograph has 50 million pixels, a file of one 20 MB; beyond lie mistakes and bombs.
MOST_BYTES = 1 << 26
MOST_PIXELS = 1 << 27
# Of one image, all attention weights are in memory at once.
MOST_ATTENTION = 1 << 32


@dataclass(frozen=True)
class LoadedModel:
    """Parameters and what is known of their model.

    Attributes:
      where: its path, for people.
      params: nested NumPy arrays.
      which: 'params', or 'ema' for averaged ones.
      run: (workdir, step) of one of ours, else None.
      sidecar: what was saved beside it; {} of weights from elsewhere.
      weights: those from elsewhere, else None.
      shape: (height, width, channels) of its images where its data says so, not its config.
    """

    where: str
    params: dict[str, Any]
    which: str = 'params'
    run: tuple[epath.Path, int] | None = None
    sidecar: dict[str, Any] | None = None
    weights: Weights | None = None
    shape: tuple[int, ...] | None = None

    @functools.cached_property
    def config(self) -> Config | None:
        """The config of a run of ours; None of weights from elsewhere."""
        return config_lib.from_json(self.sidecar['config']) if self.sidecar else None

    def settings(self) -> dict[str, Any]:
        """What the config of a run of ours sets, by dotted key.

        Of a config that this version cannot read, all that is not empty.
        """
        saved = config_lib.flatten((self.sidecar or {}).get('config', {}))
        try:
            config = self.config
        except UserError:
            return {key: value for key, value in saved.items() if value is not None}
        return {key: value for key, value in saved.items() if config and config.sets(key)}

    @functools.cached_property
    def channels(self) -> int:
        """Of the images that the model takes, told from its first kernel."""
        if self.shape is not None:
            return self.shape[2]
        if self.config is None:
            assert self.weights is not None
            return self.weights.meta.get('channels') or 3
        flat = trees.flatten(self.params)
        shifted = 'embedding/projection/kernel'
        if shifted in flat:
            pixels = math.prod(build_streams(self.config)[0].patch_size)
            return flat[shifted].shape[-2] // (5 * pixels)
        first = [n for n in flat if n.startswith('stem/') and n.endswith('kernel')]
        for name in ('stem/conv_root/kernel', *first[:1], 'embedding/kernel'):
            if name in flat and flat[name].ndim == 4 and flat[name].shape[-2] in (1, 2, 3, 4):
                return flat[name].shape[-2]
        return 3

    @functools.cached_property
    def model(self) -> ViT:
        """Its model, of images, computing in float32.

        Raises:
          UserError: it reads something else than one image, or is not what its config says.
        """
        if self.config is None:
            assert self.weights is not None
            settings = {**self.weights.settings, 'dtype': jnp.float32, 'scan': False}
            return make_vit(**settings)
        config = self.config.replacing(
            {'model.dtype': 'float32', 'model.attention': 'xla', 'model.remat': 'none'}
        )
        if parts_read(config) != ('image',) or list(config.streams):
            reads = ', '.join(parts_read(config))
            raise UserError(f'{self.where}: its model reads {reads}, not one image')
        flat = trees.flatten(self.params)
        classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        shape = (*self.image_size, self.channels)
        made = build_model(config, classes, {'image': shape}, mesh)
        inputs: state.Inputs = {'image': (shape, np.dtype(np.uint8))}
        checkpoint.check_params(self.params, state.abstract_params(made, inputs), self.where)
        return build_task(config.task).trunk(made)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that it was trained with."""
        if self.shape is not None:
            return self.shape[0], self.shape[1]
        if self.config is not None:
            return self.config.image_size[0], self.config.image_size[1]
        assert self.weights is not None
        rows, columns = self.weights.meta['image_size']
        return rows, columns

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of its tokens.

        Raises:
          UserError: it has no such grid.
        """
        streams = self.model.streams if self.config is None else build_streams(self.config)
        if len(streams) > 1 or streams[0].reads != 'image':
            reads = ', '.join(stream.reads for stream in streams)
            raise UserError(f'{self.where}: its model reads {reads}, not one image')
        try:
            rows, columns = tokenizers.grid_of(streams[0], (*self.image_size, self.channels))
        except ValueError as error:
            raise UserError(f'{self.where}: {error}') from None
        return rows, columns

    def positions(self) -> Float[np.ndarray, 'tokens width'] | None:
        """The learned positions of its patches; None where there are none."""
        table = trees.flatten(self.params).get('pos_embedding')
        if table is None or table.ndim != 3:
            return None
        rows, columns = self.grid
        if self.config is None:
            assert self.weights is not None
            prefix = self.weights.settings['posemb_prefix']
        else:
            prefix = self.config.model.posemb_prefix
        if table.shape[1] != prefix + rows * columns:
            return None
        return np.asarray(table[0, prefix:], np.float32)

    def embedding(self) -> np.ndarray | None:
        """The kernel that makes tokens of patches; None where a patch is one pixel, or a word."""
        kernel = trees.flatten(self.params).get('embedding/kernel')
        if kernel is None or kernel.ndim < 4 or min(kernel.shape[-4:-2]) < 2:
            return None
        return np.asarray(kernel, np.float32)

    def picture(self, path: str | Path) -> UInt8[np.ndarray, 'height width channels']:
        """The middle of an image file, in the size and channels that the model takes.

        Raises:
          UserError: it is not an image, or too large.
        """
        import cv2

        file = Path(path).expanduser()
        try:
            if file.stat().st_size > MOST_BYTES:
                raise UserError(
                    f'--image {file}: is larger than {MOST_BYTES >> 20} MiB; make it smaller'
                )
            found = decode.Encoded(file.read_bytes())
            high, wide, _ = found.shape
            if high * wide > MOST_PIXELS:
                raise UserError(
                    f'--image {file}: {high}x{wide} pixels are more than {MOST_PIXELS:,}; scale it '
                    'down'
                )
            rows, columns = self.image_size
            scale = min(high / rows, wide / columns)
            side = max(1, round(rows * scale)), max(1, round(columns * scale))
            top, left = (high - side[0]) // 2, (wide - side[1]) // 2
            pixels = found.window(top, left, *side, (rows, columns))
        except OSError as error:
            why = error.strerror or error
            raise UserError(f'--image {file}: cannot be read: {why}; name a picture') from None
        except decode.DecodeError as error:
            raise UserError(f'--image {file}: {error}; name a JPEG, PNG or WebP picture') from None
        pixels = cv2.resize(
            np.ascontiguousarray(pixels), (columns, rows), interpolation=cv2.INTER_AREA
        )
        if self.channels == 1:
            return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
        if self.channels != 3:
            raise UserError(f'{self.where}: takes images of {self.channels} channels, no picture')
        return pixels

    def normalised(
        self, picture: UInt8[np.ndarray, 'height width channels']
    ) -> Float[np.ndarray, 'height width channels']:
        """A picture as the numbers that the model was trained on."""
        if self.config is not None:
            mean, std = image_normalisation(self.config, self.channels)
        else:
            assert self.weights is not None
            mean = self.weights.meta.get('mean') or (0.5,) * self.channels
            std = self.weights.meta.get('std') or (0.5,) * self.channels
        return ((picture / 255 - np.array(mean)) / np.array(std)).astype(np.float32)

    @functools.cached_property
    def _capture(self) -> Any:
        apply = functools.partial(self.model.apply, capture=('attention',))
        return jax.jit(lambda params, image: apply({'params': params}, image)[1]['attention'])

    def attention(
        self, image: Float[np.ndarray, 'height width channels']
    ) -> Float[np.ndarray, 'depth heads tokens tokens']:
        """The attention weights of all blocks and heads for one image, normalised.

        Raises:
          UserError: they would not fit into memory.
        """
        tokens = self.grid[0] * self.grid[1] + self.model.prefix_tokens
        needed = 4 * self.model.encoder.depth * self.model.encoder.num_heads * tokens**2
        if needed > MOST_ATTENTION:
            raise UserError(
                f'{self.where}: its attention to one image is {needed / 2**30:.1f} GiB, more than '
                f'{MOST_ATTENTION >> 30}; look at a smaller model'
            )
        found = self._capture(self.params, jnp.asarray(image)[None])
        return np.asarray(found, np.float32)[:, 0]


def load(path: str, which: str | None = None) -> LoadedModel:
    """Any checkpoint: a workdir (its newest), one `checkpoints/STEP`, or a file or folder of peers.

    Args:
      which: 'params' or 'ema' of one of ours; by default the averaged ones where there are any.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    weights = interop.load_init(path)
    if weights is not None:
        if which is not None:
            raise UserError(f'{path}: --which is for checkpoints of ours; this has one set only')
        return LoadedModel(path, weights.params, weights=weights)
    workdir, step = checkpoint.locate(path, 'WORKDIR')
    sidecar = checkpoint.read_sidecar(workdir, step)
    which = which or checkpoint.scored_part(sidecar)
    params, _ = checkpoint.load_params(workdir, step, which)
    where = f'{workdir}/checkpoints/{step}'
    return LoadedModel(where, params, which, (workdir, step), sidecar)
