"""A trained model that answers for pictures: probabilities of classes, and feature vectors.

    model = big_vit.load('runs/fashion')
    model.predict(['a.jpg', 'b.png'], top=3)    # [[('boot', 0.98), ...], ...]
    model.embed(pil_images)                     # float32 [N, width]
    model(uint8_arrays)                         # probabilities, float32 [N, classes]

Pictures go through the operations of the run's own evaluation, so answers are those that it scored.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int64

from big_vit import augment, sharding, trees
from big_vit.build.task import build_task
from big_vit.data import decode, files, pipeline, transforms
from big_vit.data.sources.base import Columns, Source
from big_vit.errors import UserError
from big_vit.inspection import loaded_model
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.interop import class_names
from big_vit.tasks.batch import Batch, model_inputs

# A path, an array uint8 [H, W] or [H, W, 1, 3 or 4], or an image of Pillow.
Picture = Any


class Answers(NamedTuple):
    """What a model says of some of the pictures it was given.

    Attributes:
      rows: which of the pictures, in order; those that cannot be read are missing.
      features: vectors before the head.
      probabilities: of the classes; None if the model has no head.
    """

    rows: Int64[np.ndarray, ' pictures']
    features: Float[np.ndarray, 'pictures width']
    probabilities: Float[np.ndarray, 'pictures classes'] | None


def load(
    path: str | Path,
    *,
    which: str | None = None,
    transform: str | None = None,
    batch_size: int = 64,
    labels: str | Path | None = None,
) -> 'Predictor':
    """Load a checkpoint of ours, or weights of another codebase, to ask it about pictures.

    Args:
      path: a workdir (its newest checkpoint), a `checkpoints/STEP` folder, or a foreign file.
      which: 'params' or 'ema'; by default 'ema' where there is one, as evaluations do.
      transform: operations for pictures, instead of those of the run's evaluation.
      batch_size: pictures that are computed at a time, over all devices.
      labels: a file with the names of the classes: one a line, or JSON (`interop.class_names`).

    Raises:
      UserError: there is no such model, it does not read pictures, its evaluations do not say how
        pictures are prepared, or the names are not those of its classes.
    """
    return Predictor(loaded_model.load(str(path), which), transform, batch_size, labels)


class Predictor:
    """A model, with what prepares pictures for it and the names of its classes.

    Attributes:
      name: of the checkpoint or file.
      class_names: of the head, in order; their numbers where classes have no names.
      transform: the operations by which pictures are prepared.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        transform: str | None = None,
        batch_size: int = 64,
        labels: str | Path | None = None,
    ):
        self._loaded, self.name, self._key = loaded, loaded.path, f'{loaded.path}: evals'
        prepared = loaded.preparation(transform)
        self.transform, self._host_text = prepared.text, prepared.host_text
        self._on_devices = prepared.device
        self._mesh = sharding.make_mesh(1, -1, 1)
        self._batch_size = batch_size
        self._step = self._make_step()
        self._params = jax.tree.map(
            lambda leaf: sharding.place(np.asarray(leaf), sharding.replicated(self._mesh)),
            loaded.params,
        )
        self.class_names = self._names(labels)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, nested NumPy arrays."""
        return self._loaded.params

    def _names(self, labels: str | Path | None) -> tuple[str, ...]:
        kernel = trees.flatten(self._loaded.params).get('head/kernel')
        count = 0 if kernel is None else kernel.shape[-1]
        names = self._loaded.class_names or ()
        if labels is not None:
            try:
                names = class_names.of_file(Path(labels).expanduser(), count, names)
            except UserError as error:
                raise UserError(f'--labels {error} ({self.name})') from None
        elif self._loaded.foreign_weights is not None:
            names = self._loaded.foreign_weights.meta.get('class_descriptions') or names
        return tuple(
            names[number] if number < len(names) and names[number] else str(number)
            for number in range(count)
        )

    def _make_step(self) -> Any:
        """Jit (params, batch) -> (features, probabilities or None), replicated on all devices."""
        model, config = self._loaded.scoring_model(self._mesh), self._loaded.config
        has_head = 'head/kernel' in trees.flatten(self._loaded.params)
        weights = self._loaded.foreign_weights
        alone = weights is not None and bool(weights.meta.get('multi_label'))
        if config is not None:
            alone = build_task(config.task).logits_loss == 'sigmoid'
        operations = [function for _, function in self._on_devices]
        prepare = augment.compose(operations) if operations else None

        def step(params: Any, batch: Batch) -> tuple[Array, Array | None]:
            if prepare is not None:
                batch = prepare(batch, jax.random.key(0))  # Nothing here draws.
            logits, extra = model.apply({'params': params}, model_inputs(batch))
            features = extra['pre_logits'].astype(jnp.float32)
            features = features.reshape(features.shape[0], -1)
            if not has_head:
                return features, None
            squash = jax.nn.sigmoid if alone else jax.nn.softmax
            return features, squash(logits.astype(jnp.float32))

        return jax.jit(
            step,
            in_shardings=(sharding.replicated(self._mesh), sharding.batch_sharding(self._mesh)),
            out_shardings=sharding.replicated(self._mesh),
        )

    def answers(self, pictures: Sequence[Picture], skip_bad: bool = False) -> Iterator[Answers]:
        """Yield what the model says of pictures, batch by batch, in order.

        Args:
          skip_bad: leave out pictures that cannot be read or decoded.

        Raises:
          UserError: a picture cannot be read (with `skip_bad`: none of the first can), or does not
            fit the model.
        """
        if not len(pictures):
            return
        unreadable: set[int] = set()
        source = _source(pictures, self._channels())
        if skip_bad:
            source = replace(source, load=self._load_readable(source, unreadable))
        host = self._fitting(source, skip_bad)
        devices = self._mesh.size
        batch_size = math.ceil(min(self._batch_size, len(pictures)) / devices) * devices
        start, place = 0, sharding.batch_sharding(self._mesh)
        for batch in pipeline.eval_batches(source, host, batch_size=batch_size, skip_bad=skip_bad):
            mask = batch['mask'] > 0
            mask &= [start + row not in unreadable for row in range(batch_size)]
            with jax.set_mesh(self._mesh):
                placed = {
                    name: sharding.place(column, place)
                    for name, column in batch.items()
                    if name in ('image', 'label')
                }
                features, probabilities = jax.device_get(self._step(self._params, placed))
            yield Answers(
                start + np.flatnonzero(mask),
                np.asarray(features)[mask],
                None if probabilities is None else np.asarray(probabilities)[mask],
            )
            start += batch_size

    def _load_readable(
        self, source: Source, unreadable: set[int]
    ) -> Callable[[np.ndarray], Columns]:
        """Load plain grey for what is no picture, and note its row, so that a batch is complete."""
        grey = np.full((*(2 * side for side in self._loaded.image_size), 3), 128, np.uint8)
        blank = decode.Encoded(cv2.imencode('.png', grey)[1].tobytes())

        def load_one(index: int) -> Any:
            try:
                (image,) = source.load(np.array([index]))['image']
                _ = image.shape  # Of a file: what its header says.
                return image
            except (transforms.BadExampleError, decode.DecodeError, OSError):
                unreadable.add(index)
                return blank

        def load(index: np.ndarray) -> Columns:
            images = [load_one(int(i)) for i in index]
            return {'image': images, 'label': np.zeros(len(index), np.int32)}

        return load

    def problem(self, picture: Picture) -> str:
        """Say why a picture that `answers` left out cannot be read; '' if it can."""
        source = _source([picture], self._channels())
        host = transforms.parse(self._host_text, size=self._loaded.image_size, key=self._key)
        try:
            host(source.load(np.zeros(1, np.int64)), np.zeros(1, np.uint64))
        except (transforms.BadExampleError, OSError) as error:
            return str(getattr(error, 'strerror', None) or error)
        return ''

    def _channels(self) -> int:
        """Return to how many channels files are decoded: in colour, if the transform takes that."""
        channels, size = self._loaded.channels, self._loaded.image_size
        host = transforms.parse(self._host_text, size=size, key=self._key)
        grey = np.full((1, *(2 * side for side in size), 3), 128, np.uint8)
        try:
            made = host({'image': grey, 'label': np.zeros(1, np.int32)}, np.zeros(1, np.uint64))
        except UserError:
            return channels
        return 3 if made['image'][0].shape[-1] == channels else channels

    def _fitting(self, source: Source, skip_bad: bool) -> transforms.Transform:
        """Return what prepares these pictures, after a resize where the run's data needed none."""
        size, first = self._loaded.image_size, None
        for text in (self._host_text, f'resize(size) | {self._host_text}'.rstrip(' |')):
            host = transforms.parse(text, size=size, key=self._key)
            try:
                transforms.check(host, source, size, skip_bad=skip_bad)
            except UserError as error:
                first = first or error
                continue
            return host
        assert first is not None
        raise first

    def __call__(self, images: Sequence[Picture]) -> Float[np.ndarray, 'pictures classes']:
        """Compute the probability of each class for each picture.

        Raises:
          UserError: the model has no head, or a picture cannot be read.
        """
        self.require_classes()
        answers = [a.probabilities for a in self.answers(images) if a.probabilities is not None]
        return np.concatenate(answers) if answers else np.zeros((0, len(self.class_names)))

    def embed(self, images: Sequence[Picture]) -> Float[np.ndarray, 'pictures width']:
        """Compute the vector before the head for each picture; UserError if one cannot be read."""
        answers = [answer.features for answer in self.answers(images)]
        return np.concatenate(answers) if answers else np.zeros((0, 0), np.float32)

    def predict(self, images: Sequence[Picture], top: int = 5) -> list[list[tuple[str, float]]]:
        """Name the most probable classes of each picture, the most probable first.

        Raises:
          UserError: the model has no head, or a picture cannot be read.
        """
        return [self.ranked(row, top) for row in self(images)]

    def ranked(
        self, probabilities: Float[np.ndarray, ' classes'], top: int
    ) -> list[tuple[str, float]]:
        """Return the names and probabilities of the most probable classes."""
        best = np.argsort(-probabilities, kind='stable')[:top]
        return [(self.class_names[number], float(probabilities[number])) for number in best]

    def require_classes(self) -> None:
        """Raise UserError if the model has no head."""
        if not self.class_names:
            raise UserError(
                f'{self._loaded.path}: has no head that tells classes; ask for its features '
                '(--embed, model.embed), or train a head with transfer'
            )


def _source(pictures: Sequence[Picture], channels: int) -> Source:
    """Make a source of pictures that need no labels.

    Raises:
      UserError: something is no picture, or files and arrays are mixed.
    """
    are_files = [isinstance(picture, str | Path) for picture in pictures]
    if any(are_files) and not all(are_files):
        raise UserError('images: give paths, or pictures, not both at once')

    def read(picture: Picture) -> Any:
        if are_files[0]:
            return files.read(files.place(str(picture), 'images'))
        return _pixels(picture, channels)

    def load(index: np.ndarray) -> Columns:
        images = [read(pictures[int(i)]) for i in index]
        columns = {'image': images, 'label': np.zeros(len(index), np.int32)}
        return transforms.opened(columns, channels)

    def where(index: int) -> str:
        return str(pictures[index]) if are_files[0] else f'picture {index}'

    return Source(
        name='pictures',
        split='',
        length=len(pictures),
        num_classes=1,
        image_shape=None,
        load=load,
        in_memory=False,
        channels=channels,
        where=where,
    )


def _pixels(picture: Any, channels: int) -> np.ndarray:
    """Return an image of Pillow or an array as bytes [H, W, channels]."""
    if hasattr(picture, 'convert'):
        picture = picture.convert({1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels, 'RGB'))
    pixels = np.asarray(picture)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise UserError(
            f'images: an array must be uint8 [height, width, channels], not {pixels.dtype} '
            f'{list(pixels.shape)}'
        )
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise UserError(
            f'images: the model takes {channels} channel(s), the array has {pixels.shape[2]}'
        )
    return pixels
