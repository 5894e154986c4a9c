"""Load any checkpoint for inspection, ours or another codebase's, without its data."""

import functools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from big_vit import checkpoint, interop, sharding, state, storage, trees
from big_vit import config as config_lib
from big_vit.build.data import DEVICE_OPERATIONS, evaluation_transform
from big_vit.build.model import build_model, build_scored_model, build_streams, parts_read
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.data import decode, files, transforms
from big_vit.errors import UserError
from big_vit.interop import Weights, pictures
from big_vit.interop.weights import ORIGIN, PREPARED
from big_vit.models import tokenizers
from big_vit.models.vit import ViT, make_vit
from big_vit.pretrained.load import image_normalisation

# A photograph has at most 50 million pixels, in a file of 20 MB; larger ones are mistakes or
# decompression bombs.
MOST_BYTES = 1 << 26
MOST_PIXELS = 1 << 27
# Bytes. The attention weights of one image are held in memory all at once.
MOST_ATTENTION = 1 << 32

# Shape and type of each part that a model reads, without the batch.
Inputs = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class LoadedModel:
    """Parameters with everything known about their model.

    Attributes:
      path: for messages.
      params: nested NumPy arrays.
      part: 'params', or 'ema' for averaged parameters.
      run: (workdir, step) of a checkpoint of ours, else None.
      sidecar: metadata saved beside a checkpoint of ours; None for foreign weights.
      foreign_weights: weights of another codebase, else None.
      image_shape: (height, width, channels), if known from the data rather than the config.
    """

    path: str
    params: dict[str, Any]
    part: str = 'params'
    run: tuple[epath.Path, int] | None = None
    sidecar: dict[str, Any] | None = None
    foreign_weights: Weights | None = None
    image_shape: tuple[int, ...] | None = None

    @functools.cached_property
    def config(self) -> Config | None:
        """Config of a run of ours; None for foreign weights."""
        return config_lib.from_json(self.sidecar['config']) if self.sidecar else None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes of the head, in order, '' for one without; None if none is known."""
        if self.foreign_weights is not None:
            return self.foreign_weights.meta.get('class_names')
        return checkpoint.class_names(self.sidecar or {})

    @property
    def headline(self) -> str:
        """Training metric of the run's task; 'accuracy' if this version cannot read the config."""
        try:
            return build_task(self.config.task).headline if self.config else 'accuracy'
        except UserError:
            return 'accuracy'

    def settings(self) -> dict[str, Any]:
        """Return the config values that a run of ours sets, by dotted key.

        If this version cannot read the config, return every value that is not None.
        """
        saved = config_lib.flatten((self.sidecar or {}).get('config', {}))
        try:
            config = self.config
        except UserError:
            return {key: value for key, value in saved.items() if value is not None}
        return {key: value for key, value in saved.items() if config and config.sets(key)}

    @functools.cached_property
    def channels(self) -> int:
        """Number of image channels, inferred from the first kernel."""
        if self.image_shape is not None:
            return self.image_shape[2]
        if self.config is None:
            assert self.foreign_weights is not None
            return self.foreign_weights.meta.get('channels') or 3
        flat = trees.flatten(self.params)
        shifted_patches = 'embedding/projection/kernel'
        if shifted_patches in flat:
            pixels = math.prod(build_streams(self.config)[0].patch_size)
            return flat[shifted_patches].shape[-2] // (5 * pixels)
        first = [n for n in flat if n.startswith('stem/') and n.endswith('kernel')]
        for name in ('stem/conv_root/kernel', *first[:1], 'embedding/kernel'):
            if name in flat and flat[name].ndim == 4 and flat[name].shape[-2] in (1, 2, 3, 4):
                return flat[name].shape[-2]
        return 3

    @functools.cached_property
    def model(self) -> ViT:
        """The model for single images, computing in float32.

        Raises:
          UserError: the model does not read exactly one image, or its parameters do not match its
            config.
        """
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        return self._build({'model.dtype': 'float32', 'model.attention': 'xla'}, mesh)

    def scoring_model(self, mesh: jax.sharding.Mesh, inputs: Inputs) -> Any:
        """Return the model for the devices of a mesh, in its own types, as evaluations use it.

        Raises:
          UserError: the parameters do not match the config, or the inputs.
        """
        return self._build({}, mesh, inputs)

    def task_model(self, mesh: jax.sharding.Mesh, inputs: Inputs) -> Any:
        """Return the whole module that was trained, for the devices of a mesh.

        Raises:
          UserError: the parameters do not match the config, or the inputs.
        """
        return self._build({}, mesh, inputs, whole=True)

    def _build(
        self,
        changes: dict[str, Any],
        mesh: jax.sharding.Mesh,
        inputs: Inputs | None = None,
        whole: bool = False,
    ) -> Any:
        """The trunk, or the whole module that was trained."""
        if self.config is None:
            assert self.foreign_weights is not None
            settings = {**self.foreign_weights.settings, 'dtype': jnp.float32, 'scan': False}
            return make_vit(**settings)
        config = self.config.replacing({'model.remat': 'none', **changes})
        if inputs is None:
            if parts_read(config) != ('image',) or list(config.streams):
                reads = ', '.join(parts_read(config))
                raise UserError(f'{self.path}: its model reads {reads}, not one image')
            inputs = {'image': ((*self.image_size, self.channels), np.dtype(np.uint8))}
        flat = trees.flatten(self.params)
        # Heads of boxes and of pixels are tasks' own; their classes are those of the data.
        known = 0 if self.class_names is None else len(self.class_names)
        classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else known
        shapes = {name: shape for name, (shape, _) in inputs.items()}
        build = build_model if whole else build_scored_model
        model = build(config, classes, shapes, mesh)
        model_of_inputs = state.abstract_params(model, inputs)
        # Of streams that stay apart, those without an input have no parameters there.
        absent = {s.name for s in build_streams(config) if s.name and s.reads not in inputs}
        absent |= {f'shared_{name}' for name in absent}
        # Of what a task adds to its trunk nothing may be computed here.
        absent |= set(build_task(config.task).additions) - model_of_inputs.keys()
        saved = {name: leaf for name, leaf in self.params.items() if name not in absent}
        checkpoint.check_params(saved, model_of_inputs, self.path)
        return model

    def task_pictures(
        self, images: Float[np.ndarray, 'count height width channels']
    ) -> dict[str, Float[np.ndarray, 'count height width channels']]:
        """What the task of a run makes of normalised images (`Task.pictures`), by title.

        Patches are hidden alike whenever it is called; {} if the task makes nothing of them.
        """
        task = build_task(self.config.task) if self.config is not None else None
        if task is None or task.pictures is None:
            return {}
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        changes = {'model.dtype': 'float32', 'model.attention': 'xla'}
        made = task.pictures(self._build(changes, mesh, whole=True))
        titles: list[str] = []

        def values(params: Any, images: jax.Array) -> list[jax.Array]:
            pictures = made(params, images, jax.random.key(0))
            titles.extend(pictures)  # In this order, which a dictionary would not keep.
            return list(pictures.values())

        found = jax.jit(values)(self.params, jnp.asarray(images))
        return {title: np.asarray(x, np.float32) for title, x in zip(titles, found, strict=True)}

    @property
    def image_size(self) -> tuple[int, int]:
        """Image size (height, width) in training."""
        if self.image_shape is not None:
            return self.image_shape[0], self.image_shape[1]
        if self.config is not None:
            return self.config.image_size[0], self.config.image_size[1]
        assert self.foreign_weights is not None
        rows, columns = self.foreign_weights.meta['image_size']
        return rows, columns

    def preparation(
        self, text: str | None = None, skip: Collection[str] = transforms.EXTERNAL
    ) -> transforms.Transform:
        """Parse how pictures are prepared for the model, as its evaluation does.

        Args:
          text: operations instead of those of the evaluation.
          skip: names of operations to leave out.

        Raises:
          UserError: it cannot be read, or is random.
        """
        if self.config is None:
            assert self.foreign_weights is not None
            key = '--transform' if text else f'{self.path}: evals'
            parsed = transforms.parse(
                text or pictures.transform_of(self.foreign_weights.meta),
                size=self.image_size,
                key=key,
                device=DEVICE_OPERATIONS,
            )
            transforms.require_deterministic(parsed)
            return parsed
        origin, default = storage.place(self.path).parent.parent / ORIGIN, PREPARED
        if origin.exists():
            default = pictures.transform_of(json.loads(origin.read_text()))
        prepared = evaluation_transform(self.config, self.path, text, skip, default)
        assert prepared is not None
        return prepared

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Grid (rows, columns) of the tokens.

        Raises:
          UserError: the tokens do not form one grid.
        """
        streams = self.model.streams if self.config is None else build_streams(self.config)
        if len(streams) > 1 or streams[0].reads != 'image':
            reads = ', '.join(stream.reads for stream in streams)
            raise UserError(f'{self.path}: its model reads {reads}, not one image')
        try:
            rows, columns = tokenizers.grid_of(streams[0], (*self.image_size, self.channels))
        except ValueError as error:
            raise UserError(f'{self.path}: {error}') from None
        return rows, columns

    def positions(self) -> Float[np.ndarray, 'tokens width'] | None:
        """Return the learned positions of the patches, or None if there are none."""
        table = trees.flatten(self.params).get('pos_embedding')
        if table is None or table.ndim != 3:
            return None
        rows, columns = self.grid
        if self.config is None:
            assert self.foreign_weights is not None
            prefix = self.foreign_weights.settings['posemb_prefix']
        else:
            prefix = self.config.model.posemb_prefix
        if table.shape[1] != prefix + rows * columns:
            return None
        return np.asarray(table[0, prefix:], np.float32)

    def embedding(self) -> np.ndarray | None:
        """Return the patch embedding's kernel, or None if patches are single pixels or words."""
        kernel = trees.flatten(self.params).get('embedding/kernel')
        if kernel is None or kernel.ndim < 4 or min(kernel.shape[-4:-2]) < 2:
            return None
        return np.asarray(kernel, np.float32)

    def picture(self, path: str | Path) -> UInt8[np.ndarray, 'height width channels']:
        """Read an image file, cropped around its centre and resized to what the model takes.

        Raises:
          UserError: the file is not an image, or too large.
        """
        import cv2

        file = Path(path).expanduser()
        try:
            files.check_regular(file)
            if file.stat().st_size > MOST_BYTES:
                raise UserError(
                    f'--image {file}: is larger than {MOST_BYTES >> 20} MiB; make it smaller'
                )
            encoded = decode.Encoded(file.read_bytes())
            image_height, image_width, _ = encoded.shape
            if image_height * image_width > MOST_PIXELS:
                raise UserError(
                    f'--image {file}: {image_height}x{image_width} pixels are more than '
                    f'{MOST_PIXELS:,}; scale it down'
                )
            rows, columns = self.image_size
            scale = min(image_height / rows, image_width / columns)
            crop = max(1, round(rows * scale)), max(1, round(columns * scale))
            top, left = (image_height - crop[0]) // 2, (image_width - crop[1]) // 2
            pixels = encoded.window(top, left, *crop, (rows, columns))
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
            raise UserError(f'{self.path}: takes images of {self.channels} channels, no picture')
        return pixels

    def _normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation that images of training are normalised with, of pixels in 0..1."""
        if self.config is not None:
            mean, std = image_normalisation(self.config, self.channels)
        else:
            assert self.foreign_weights is not None
            mean = self.foreign_weights.meta.get('mean') or (0.5,) * self.channels
            std = self.foreign_weights.meta.get('std') or (0.5,) * self.channels
        return np.array(mean), np.array(std)

    def normalised(
        self, picture: UInt8[np.ndarray, 'height width channels']
    ) -> Float[np.ndarray, 'height width channels']:
        """Normalise a picture as in training."""
        mean, std = self._normalisation()
        return ((picture / 255 - mean) / std).astype(np.float32)

    def visible(
        self, normalised: Float[np.ndarray, '*lead channels']
    ) -> UInt8[np.ndarray, '*lead channels']:
        """The picture that `normalised` normalises; NaN becomes grey."""
        mean, std = self._normalisation()
        picture = np.nan_to_num(255 * (normalised * std + mean), nan=128.0)
        return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)

    @functools.cached_property
    def _capture(self) -> Any:
        apply = functools.partial(self.model.apply, capture=('attention',))
        return jax.jit(lambda params, image: apply({'params': params}, image)[1]['attention'])

    @functools.cached_property
    def _tokens(self) -> Any:
        return jax.jit(
            lambda params, image: self.model.apply({'params': params}, image)[1]['tokens']
        )

    def patch_tokens(
        self, image: Float[np.ndarray, 'height width channels']
    ) -> Float[np.ndarray, 'rows columns width']:
        """Compute the last tokens of the patches of one normalised image.

        Raises:
          UserError: the tokens do not form one grid.
        """
        rows, columns = self.grid
        tokens = self._tokens(self.params, jnp.asarray(image)[None])[0, self.model.prefix_tokens :]
        return np.asarray(tokens, np.float32).reshape(rows, columns, -1)

    def attention(
        self, image: Float[np.ndarray, 'height width channels']
    ) -> Float[np.ndarray, 'depth heads tokens tokens']:
        """Compute the attention probabilities of all blocks and heads for one normalised image.

        Raises:
          UserError: they would need more than MOST_ATTENTION bytes.
        """
        tokens = self.grid[0] * self.grid[1] + self.model.prefix_tokens
        needed = 4 * self.model.encoder.depth * self.model.encoder.num_heads * tokens**2
        if needed > MOST_ATTENTION:
            raise UserError(
                f'{self.path}: its attention to one image is {needed / 2**30:.1f} GiB, more than '
                f'{MOST_ATTENTION >> 30}; look at a smaller model'
            )
        weights = self._capture(self.params, jnp.asarray(image)[None])
        return np.asarray(weights, np.float32)[:, 0]


def load(path: str, part: str | None = None, key: str = 'WORKDIR') -> LoadedModel:
    """Load a checkpoint of ours or weights of another codebase.

    Args:
      path: a workdir (its newest checkpoint), a `checkpoints/STEP` folder, or a foreign file or
        folder.
      part: 'params' or 'ema' of a checkpoint of ours; by default 'ema' if it was saved.
      key: what the user gave the path as, for messages.

    Raises:
      UserError: there is no checkpoint, or it cannot be read.
    """
    weights = interop.load_init(path)
    if weights is not None:
        if part is not None:
            raise UserError(f'{path}: --which is for checkpoints of ours; this has one set only')
        return LoadedModel(path, weights.params, foreign_weights=weights)
    workdir, step = checkpoint.locate(path, key)
    sidecar = checkpoint.read_sidecar(workdir, step)
    part = part or checkpoint.scored_part(sidecar)
    params, _ = checkpoint.load_params(workdir, step, part)
    name = f'{workdir}/checkpoints/{step}'
    return LoadedModel(name, params, part, (workdir, step), sidecar)
