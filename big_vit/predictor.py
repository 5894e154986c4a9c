"""A trained model that answers for what it is given: probabilities of classes, and features.

    model = big_vit.load('runs/fashion')
    model.predict(['a.jpg', 'b.png'], top=3)    # [[('boot', 0.98), ...], ...]
    model.embed(pil_images)                     # float32 [N, width]
    model(uint8_arrays)                         # probabilities, float32 [N, classes]

    clip = big_vit.load('runs/pairs').with_classes(['cat', 'dog'], ['a photo of a {}'])

What is given goes through the operations of the run's own evaluation, and through the loader of
evaluations, so answers are those that it scored, as fast.
"""

import collections
import copy
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int64

from big_vit import sharding, storage, trees
from big_vit.build import data as build_data
from big_vit.build.data import Data
from big_vit.build.model import build_streams
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.data import files, pipeline, to_device, transforms
from big_vit.data.moves import PLACED
from big_vit.data.sources.base import Columns, Source, select
from big_vit.data.sources.media import kind_of, loader
from big_vit.data.transforms import audio, text, video
from big_vit.data.transforms.operations import decoded_row
from big_vit.errors import UserError
from big_vit.evaluators import segmentation, sliding_window, zero_shot
from big_vit.inspection import loaded_model, objects
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.interop import class_names
from big_vit.models.two_towers import MOST_SCALE
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.task import Detections, Task

# A path, or a picture: an array uint8 [H, W] or [H, W, 1, 3 or 4], or an image of Pillow. For a
# model of words, a text; for one of several inputs, a dictionary of them by name.
Given = Any
# Examples that could not be read, and why, by their row.
Unread = dict[int, str]
# Operations on labels, which nothing that is asked about has.
_OF_LABELS = frozenset({'onehot', 'multihot', 'boxes'})
_KINDS: dict[str, dict[str, Any]] = {
    'video': video.OPERATIONS,
    'audio': audio.OPERATIONS,
    'text': text.OPERATIONS,
}
NOUNS = {'image': 'pictures', 'video': 'videos', 'audio': 'sounds', 'text': 'texts'}


class Answers(NamedTuple):
    """What a model says of some of the examples it was given.

    Attributes:
      rows: which of the examples, in order; those that cannot be read are missing.
      features: vectors before the head; of two towers, those that are compared.
      probabilities: of the classes; None if the model has none.
    """

    rows: Int64[np.ndarray, ' examples']
    features: Float[np.ndarray, 'examples width']
    probabilities: Float[np.ndarray, 'examples classes'] | None


class Seen(NamedTuple):
    """What a model finds in a picture.

    Attributes:
      row: which of the examples it is.
      size: height and width of the picture as it is stored.
      objects: arrays of all objects, likely or not; None of a model of pixels.
      labels: class of each pixel; None of a model of boxes.
    """

    row: int
    size: tuple[int, int]
    objects: Detections | None
    labels: Int[np.ndarray, 'height width'] | None

    def corners(self) -> Float[np.ndarray, 'objects 4']:
        """Return boxes of the objects, (x0, y0, x1, y1) in pixels."""
        assert self.objects is not None
        return objects.corners(np.asarray(self.objects.boxes), self.size)


class Asked(NamedTuple):
    """Examples with what prepares them, from `Predictor.asked`.

    Attributes:
      blank: stands for those that cannot be read; None if that is an error.
    """

    data: Data
    blank: Columns | None

    def part(self, start: int, rows: int) -> 'Asked':
        """Return at most so many examples, from `start` on."""
        source = self.data.source
        source = select(source, min(rows, source.length - start), lambda row: row + start)
        return self._replace(data=self.data._replace(source=source))


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
      transform: operations for what is given, instead of those of the run's evaluation.
      batch_size: examples that are computed at a time, over all devices of this process.
      labels: a file with the names of the classes: one a line, or JSON (`interop.class_names`).

    Raises:
      UserError: there is no such model, its evaluation cannot be read, or the names are not those
        of its classes.
    """
    return Predictor(loaded_model.load(str(path), which), transform, batch_size, labels)


class Predictor:
    """A model, with what prepares examples for it and the names of its classes.

    Attributes:
      name: of the checkpoint or file.
      class_names: of the head, in order; their numbers where classes have no names.
      seen_names: of the classes of objects or of pixels, in order; () of a model of neither.
      transform: the operations by which examples are prepared.
      kinds: what an example is made of: 'image', 'video', 'audio', 'text'.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        transform: str | None = None,
        batch_size: int = 64,
        labels: str | Path | None = None,
    ):
        self._loaded, self.name, self._key = loaded, loaded.path, f'{loaded.path}: evals'
        self._task: Task | None = build_task(loaded.config.task) if loaded.config else None
        self._pairs = self._task is not None and 'pairs' in self._task.provides
        self._reads = _reads(loaded, self._pairs)
        skip = {*_OF_LABELS, *(text.OPERATIONS if self._pairs else ())}
        self._parsed = loaded.preparation(transform, skip)
        self.transform, self._host_text = self._parsed.text, self._parsed.host_text
        self.kinds = _kinds(self._parsed, self._reads)
        self._mesh = sharding.make_mesh(1, -1, 1, jax.local_devices())
        self._batch_size = batch_size
        self._params = jax.tree.map(
            lambda leaf: sharding.place(np.asarray(leaf), sharding.replicated(self._mesh)),
            loaded.params,
        )
        self.class_names = self._names(labels)
        self.seen_names = self._seen_names()
        self._words: np.ndarray | None = None
        self._steps: dict[Any, Any] = {}

    @property
    def noun(self) -> str:
        """What several examples are called."""
        return NOUNS[self.kinds[0]] if len(self.kinds) == 1 else 'examples'

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, nested NumPy arrays."""
        return self._loaded.params

    @property
    def config(self) -> Config | None:
        """The config of a run of ours; None for foreign weights."""
        return self._loaded.config

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the parameters, the same for equal models."""
        total = hashlib.sha256(self._loaded.part.encode())
        known = (self._loaded.sidecar or {}).get('content_hash')
        if known:
            total.update(known.encode())
        else:
            for name, leaf in trees.flatten(self._loaded.params).items():
                total.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
        return total.hexdigest()[:16]

    def _names(self, labels: str | Path | None) -> tuple[str, ...]:
        kernel = trees.flatten(self._loaded.params).get('head/kernel')
        count = 0 if kernel is None or not self._has_head else kernel.shape[-1]
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

    @property
    def sees(self) -> str | None:
        """What the model finds in pictures: 'boxes' of objects, classes of 'pixels', or nothing."""
        found = self._task.provides & {'boxes', 'pixels'} if self._task is not None else ()
        return next(iter(found), None)

    def _seen_names(self) -> tuple[str, ...]:
        names = (self._loaded.class_names or ()) if self.sees else ()
        return tuple(name or str(number) for number, name in enumerate(names))

    @property
    def _has_head(self) -> bool:
        head = 'head/kernel' in trees.flatten(self._loaded.params)
        return head and (self._task is None or 'logits' in self._task.provides)

    def with_classes(self, names: Sequence[str], prompts: Sequence[str] = ('{}',)) -> 'Predictor':
        """Return a model of pictures and words that tells classes apart by their names (CLIP).

        Args:
          names: of the classes.
          prompts: sentences in which {} stands for a name; a class is the mean of its sentences.

        Raises:
          UserError: the model does not compare with words, a name is there twice or alone, or a
            prompt has no {}.
        """
        names = tuple(names)
        if len(set(names)) < max(2, len(names)) or not all(names):
            raise UserError(f'classes: name two different ones or more, not {list(names)[:5]}')
        wrong = next((prompt for prompt in prompts if '{}' not in prompt), None)
        if wrong is not None or not prompts:
            raise UserError(
                f"prompts: {wrong!r} has no {{}} for the name of a class, as in 'a photo of a {{}}'"
            )
        vectors = self.embed_text(zero_shot.sentences(names, tuple(prompts), self.name))
        by_class = vectors.reshape(len(names), len(prompts), -1)
        model = copy.copy(self)
        model.class_names, model._steps = names, {}
        model._words = zero_shot.ensemble(by_class).astype(np.float32)
        return model

    def embed_text(self, texts: Sequence[str]) -> Float[np.ndarray, 'texts width']:
        """Compute the vectors of sentences that those of pictures are compared with.

        Raises:
          UserError: the model does not compare something with words.
        """
        config = self._loaded.config
        words = [s for s in build_streams(config) if s.tokenizer == 'words'] if config else []
        if config is None or not self._pairs or not words:
            raise UserError(
                f'{self.name}: does not compare pictures with words: take a run with two streams, '
                'one of words'
            )
        data = build_data.text_data(config, list(texts), self.name)
        return np.concatenate(
            [answers.features for answers in self._answers(Asked(data, None), None)]
        )

    def _step(self, data: Data) -> Any:
        """Jit (params, batch) -> (mask, features, probabilities or None), for inputs of a shape."""
        key = tuple(sorted((n, shape, str(kind)) for n, (shape, kind) in data.inputs.items()))
        if key not in self._steps:
            self._steps[key] = self._make_step(data)
        return self._steps[key]

    def _make_step(self, data: Data) -> Any:
        model = self._loaded.scoring_model(self._mesh, data.inputs)
        if any(stream.tokenizer == 'ragged' for stream in model.streams):
            raise UserError(
                f'{self.name}: its model reads several images packed together, and answers are '
                'of one example: export or transfer it to fixed sizes'
            )
        prepare = build_data.eval_device_operations(data)
        read = {stream.reads for stream in model.streams if stream.reads in data.inputs}
        names = [s.name for s in model.streams if s.reads in read] if self._pairs else []
        answer = functools.partial(self._outputs, name=names[0] if names else None)

        def step(params: Any, batch: Batch) -> tuple[Array, Array, Array | None]:
            logits, extra = model.apply({'params': params}, model_inputs(prepare(batch)))
            return batch['mask'], *answer(params, logits, extra)

        everywhere = sharding.replicated(self._mesh)
        where = everywhere, sharding.batch_sharding(self._mesh)
        return jax.jit(step, in_shardings=where, out_shardings=everywhere)

    def _outputs(
        self, params: Any, logits: Array, extra: dict[str, Array], name: str | None
    ) -> tuple[Array, Array | None]:
        """Features, and probabilities where there are classes.

        Args:
          name: of the stream, if streams are apart.
        """
        if name is not None:
            features, words = extra[name].astype(jnp.float32), self._words
            if words is None or words.shape[1] != features.shape[1]:
                return features, None
            scale = params['logit_scale']
            if 'logit_bias' not in params:
                scale = jnp.minimum(scale, math.log(MOST_SCALE))
            return features, jax.nn.softmax(jnp.exp(scale) * features @ words.T)
        features = extra['pre_logits'].astype(jnp.float32)
        features = features.reshape(features.shape[0], -1)
        if not self._has_head:
            return features, None
        weights = self._loaded.foreign_weights
        alone = weights is not None and bool(weights.meta.get('multi_label'))
        if self._task is not None:
            alone = self._task.logits_loss == 'sigmoid'
        squash = jax.nn.sigmoid if alone else jax.nn.softmax
        return features, squash(logits.astype(jnp.float32))

    def source(self, given: Sequence[Given]) -> Source:
        """Return examples as a source: their columns as datasets store them.

        Raises:
          UserError: something is given that the model does not take.
        """
        return _source(given, self.kinds, self._channels())

    def asked(self, examples: Source | Sequence[Given], skip_bad: bool = False) -> Asked:
        """Return examples with what prepares them, tried on the first that can be read.

        Args:
          examples: a source, whose labels are not read, or what `source` takes.
          skip_bad: whether some may be unreadable.

        Raises:
          UserError: none can be read (the first, without `skip_bad`), or they do not fit the model.
        """
        source = examples if isinstance(examples, Source) else self.source(examples)
        source, first = _opened(source, self.kinds), None
        for row in range(source.length if skip_bad else 1):
            try:
                data = self._fitting(source, row)
                blank = pipeline.load(source, data.transform, np.array([row]), 0, 0)
            except _Unreadable as error:
                first = first or error
                continue
            return Asked(data, blank if skip_bad else None)
        if first is None:
            raise UserError(f'{source.name}: has no examples')
        several = skip_bad and source.length > 1
        raise UserError(
            f'none of {source.length:,} {self.noun} can be read, {first}' if several else str(first)
        )

    def answers(
        self, examples: Asked | Source | Sequence[Given], unread: Unread | None = None
    ) -> Iterator[Answers]:
        """Yield what the model says of examples, batch by batch, in order.

        Args:
          examples: as for `asked`, or what that returned.
          unread: gets those that cannot be read, which are left out; None for an error.

        Raises:
          UserError: as `asked`; without `unread`, for any example.
        """
        if isinstance(examples, Asked):
            yield from self._answers(examples, unread)
        elif isinstance(examples, Source) or len(examples):
            yield from self._answers(self.asked(examples, unread is not None), unread)

    def _answers(self, asked: Asked, unread: Unread | None) -> Iterator[Answers]:
        """Yield answers, batch by batch."""
        for first, outputs in self._computed(asked, unread, self._step(asked.data)):
            mask, features, probabilities = outputs
            real = mask > 0
            if not np.isfinite(features[real]).all():
                raise self._not_finite()
            likely = None if probabilities is None else probabilities[real]
            yield Answers(first + np.flatnonzero(real), features[real], likely)

    def _not_finite(self) -> UserError:
        return UserError(
            f'{self.name}: makes numbers that are not finite: its run had diverged, or '
            'its transform does not fit; take another checkpoint'
        )

    def _computed(
        self, asked: Asked, unread: Unread | None, step: Any, most: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the first row of each batch and what a step makes of it, as NumPy arrays.

        It is at most three batches behind the loader, which works ahead.

        Args:
          step: of (params, batch).
          most: examples of a batch, if less than usual.
        """
        data, blank = asked
        devices, where = self._mesh.size, sharding.batch_sharding(self._mesh)
        # Few sizes, as each is compiled.
        size = min(most or self._batch_size, 1 << (data.source.length - 1).bit_length())
        size = math.ceil(size / devices) * devices

        def instead(row: int, error: Exception) -> Columns:
            if unread is None or blank is None:
                place = data.source.place(row)
                raise UserError(f'{place}: {storage.reason(error)}') from error
            unread[row] = storage.reason(error)
            return blank

        batches = pipeline.eval_batches(
            data.source,
            data.transform,
            batch_size=size,
            rows=to_device.local_rows(where, size),
            skip_bad=True,
            instead=instead,
        )
        start = 0
        waiting: collections.deque[tuple[int, Any]] = collections.deque()

        def fetch() -> tuple[int, Any]:
            first, outputs = waiting.popleft()
            return first, jax.device_get(outputs)

        with to_device.to_device(batches, where, batch_size=size) as on_device:
            for batch in on_device:
                with jax.set_mesh(self._mesh):
                    waiting.append((start, step(self._params, batch)))
                start += size
                if len(waiting) > 2:
                    yield fetch()
        while waiting:
            yield fetch()

    def see(
        self, examples: Asked | Source | Sequence[Given], unread: Unread | None = None
    ) -> Iterator[Seen]:
        """Yield what the model finds in each picture, in order.

        Pictures larger than the model's are looked at by windows where it tells classes of pixels.

        Args: as for `answers`.

        Raises:
          UserError: the model finds nothing in pictures; the transform crops or mirrors them; as
            `asked`; without `unread`, for any.
        """
        if self.sees is None:
            raise UserError(
                f'{self.name}: finds no objects and no classes of pixels: take a run with '
                "task.name='detection' or 'segmentation'"
            )
        if not isinstance(examples, Asked | Source) and not len(examples):
            return
        asked = (
            examples if isinstance(examples, Asked) else self.asked(examples, unread is not None)
        )
        transforms.need_whole(asked.data.transform)
        see = self._objects if self.sees == 'boxes' else self._pixels
        yield from see(asked, unread)

    def _jitted(self, data: Data, compute: Callable[[Any, Batch], Any]) -> Any:
        prepare = build_data.eval_device_operations(data)
        everywhere = sharding.replicated(self._mesh)
        where = everywhere, sharding.batch_sharding(self._mesh)

        def step(params: Any, batch: Batch) -> tuple[Array, Any]:
            batch = prepare(batch)
            return batch['mask'], compute(params, batch)

        return jax.jit(step, in_shardings=where, out_shardings=everywhere)

    def _objects(self, asked: Asked, unread: Unread | None) -> Iterator[Seen]:
        model = self._loaded.task_model(self._mesh, asked.data.inputs)
        assert self._task is not None and self._task.detect is not None
        step = self._jitted(asked.data, self._task.detect(model))
        for first, (mask, found) in self._computed(asked, unread, step):
            for row in np.flatnonzero(mask > 0).tolist():
                own = jax.tree.map(lambda x, row=row: x[row], found)
                if not all(np.isfinite(x).all() for x in (own.scores, own.boxes)):
                    raise self._not_finite()
                yield Seen(first + row, stored_size(asked.data.source, first + row), own, None)

    def _pixels(self, asked: Asked, unread: Unread | None) -> Iterator[Seen]:
        window, (shape, dtype) = self._loaded.image_size, asked.data.inputs['image']
        inputs = {**asked.data.inputs, 'image': ((*window, shape[2]), dtype)}
        model = self._loaded.task_model(self._mesh, inputs)
        assert self._task is not None and self._task.segment is not None
        segment = self._task.segment(model)
        stride = sliding_window.default_stride(window)

        def compute(params: Any, batch: Batch) -> tuple[Array, Array]:
            scores = sliding_window.scores(segment, params, batch, window, stride)
            return sliding_window.picture_sizes(batch), scores

        height, width = asked.data.example_spec.parts['image'][0][:2]
        step, canvas = self._jitted(asked.data, compute), (height, width)
        # Scores of all classes are large.
        for first, (mask, (sizes, scores)) in self._computed(asked, unread, step, most=1):
            for row in np.flatnonzero(mask > 0).tolist():
                if not np.isfinite(scores[row]).all():
                    raise self._not_finite()
                size = stored_size(asked.data.source, first + row)
                rows, columns = map(int, sizes[row])
                made = segmentation.at_size(scores[row], canvas, (rows, columns), size)
                yield Seen(first + row, size, None, made.argmax(-1))

    def _channels(self) -> int:
        """Return to how many channels files are decoded: in colour, if the transform takes that."""
        channels, size = self._loaded.channels, self._loaded.image_size
        host = transforms.parse(self._host_text, size=size, key=self._key)
        grey = np.full((1, *(2 * side for side in size), 3), 128, np.uint8)
        try:
            made = host({'image': grey, 'label': np.zeros(1, np.int32)}, np.zeros(1, np.uint64))
        except UserError:
            return channels
        return 3 if 'image' in made and made['image'][0].shape[-1] == channels else channels

    def _fitting(self, source: Source, row: int) -> Data:
        """Return what prepares these examples, after a resize where the run's data needed none.

        Args:
          row: of an example that can be read.

        Raises:
          _Unreadable: it cannot.
        """
        size, first = self._loaded.image_size, None
        example = select(source, 1, lambda at: at + row)
        try:
            example.load(np.zeros(1, np.int64))
        except (transforms.BadExampleError, OSError) as error:
            raise _Unreadable(f'{source.place(row)}: {storage.reason(error)}') from error
        for prefix in ('', 'resize(size)'):
            if prefix and 'image' not in self.kinds:
                break
            words = ' | '.join(filter(None, (prefix, self._host_text)))
            host = transforms.parse(words, size=size, key=self._key)
            host = replace(host, key=self._parsed.key, device=self._parsed.device)
            any_size = None if self.sees == 'pixels' else size  # Windows slide over pictures.
            try:
                data = build_data.fitting_data(example, host, any_size, self._reads)
            except UserError as error:
                if isinstance(error.__cause__, transforms.BadExampleError | OSError):
                    raise _Unreadable(str(error)) from error
                first = first or error
                continue
            return data._replace(source=source)
        assert first is not None
        raise first

    def __call__(self, images: Sequence[Given]) -> Float[np.ndarray, 'examples classes']:
        """Compute the probability of each class for each example.

        Raises:
          UserError: the model has no classes, or an example cannot be read.
        """
        self.require_classes()
        answers = [a.probabilities for a in self.answers(images) if a.probabilities is not None]
        empty = np.zeros((0, len(self.class_names)), np.float32)
        return np.concatenate(answers) if answers else empty

    def embed(self, images: Sequence[Given]) -> Float[np.ndarray, 'examples width']:
        """Compute the vector before the head for each example; UserError if one cannot be read.

        Of a model of two streams it is the vector, of length 1, that is compared with words.
        """
        answers = [answer.features for answer in self.answers(images)]
        return np.concatenate(answers) if answers else np.zeros((0, 0), np.float32)

    def predict(self, images: Sequence[Given], top: int = 5) -> list[list[tuple[str, float]]]:
        """Name the most probable classes of each example, the most probable first.

        Raises:
          UserError: the model has no classes, or an example cannot be read.
        """
        return [self.ranked(row, top) for row in self(images)]

    def ranked(
        self, probabilities: Float[np.ndarray, ' classes'], top: int
    ) -> list[tuple[str, float]]:
        """Return the names and probabilities of the most probable classes."""
        best = np.argsort(-probabilities, kind='stable')[:top]
        return [(self.class_names[number], float(probabilities[number])) for number in best]

    def require_classes(self) -> None:
        """Raise UserError if the model tells no classes apart."""
        if self.sees:
            raise UserError(
                f'{self._loaded.path}: finds {self.sees} in pictures, and has no class for a whole '
                'one: ask what it sees (model.see), or for its features (--embed, model.embed)'
            )
        if not self.class_names:
            raise UserError(
                f'{self._loaded.path}: compares pictures with words: name classes to choose from '
                '(--classes cat,dog, model.with_classes), or ask for vectors (--embed, model.embed)'
                if self._pairs
                else f'{self._loaded.path}: has no head that tells classes; ask for its features '
                '(--embed, model.embed), or train a head with transfer'
            )


class _Unreadable(UserError):
    """An example that cannot be read, rather than a transform that does not fit it."""


def _reads(loaded: LoadedModel, pairs: bool) -> tuple[str, ...]:
    """Return the parts of a batch that answers are made of; of two streams those not of words."""
    if loaded.config is None:
        return ('image',)
    streams = [s for s in build_streams(loaded.config) if not pairs or s.tokenizer != 'words']
    return tuple(dict.fromkeys(stream.reads for stream in streams))


def _kinds(transform: transforms.Transform, reads: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns of a source that a transform makes the parts of a batch of."""
    made = {kind for kind, known in _KINDS.items() if not known.keys().isdisjoint(transform.names)}
    parts = {'video': 'video', 'tokens': 'text'}
    made |= {parts[part] for part in reads if part in parts}
    if not made & {'audio', 'video'} and not {*reads} <= parts.keys():
        made.add('image')  # What is no sound's and no video's.
    return tuple(kind for kind in NOUNS if kind in made)


def stored_size(source: Source, row: int) -> tuple[int, int]:
    """Return height and width of a picture as it is stored."""
    height, width = source.load(np.array([row], np.int64))['image'][0].shape[:2]
    return int(height), int(width)


def stored_picture(source: Source, row: int) -> np.ndarray:
    """Return the pixels of a picture as it is stored, [height, width, channels]."""
    return np.asarray(decoded_row(source.load(np.array([row], np.int64))['image'], 0))


def _opened(source: Source, kinds: tuple[str, ...]) -> Source:
    """Read the headers of encoded images, drop other media, and let labels be 0."""
    others = {'image', *_KINDS}.difference(kinds) | PLACED

    def load(index: np.ndarray) -> Columns:
        columns = {name: x for name, x in source.load(index).items() if name not in others}
        columns['label'] = np.zeros(len(index), np.int32)
        return transforms.opened(columns, source.channels)

    return replace(source, load=load, num_classes=1, class_names=None, labels=None)


def _source(given: Sequence[Given], kinds: tuple[str, ...], channels: int) -> Source:
    """Make a source of what a user gives.

    Raises:
      UserError: something is not what the model takes, or files and arrays are mixed.
    """
    if isinstance(given, str | Path):
        raise UserError('give a list of examples, even for one: [path]')
    alone = kinds[0] if len(kinds) == 1 else None
    if len(given) and alone is None and not isinstance(given[0], Mapping):
        parts = ', '.join(f'{kind!r}: ...' for kind in kinds)
        raise UserError(f'the model takes {" and ".join(kinds)} together: give {{{parts}}}')
    is_file = [isinstance(one, str | Path) for one in given] if alone == 'image' else []
    if any(is_file) and not all(is_file):
        raise UserError('images: give paths, or pictures, not both at once')

    def read(row: int) -> dict[str, Any]:
        one = given[row]
        columns: Mapping[str, Any] = one if isinstance(one, Mapping) else {str(alone): one}
        return {kind: _read(kind, columns, channels) for kind in kinds}

    def load(index: np.ndarray) -> Columns:
        rows = [read(int(i)) for i in index]
        return {kind: [row[kind] for row in rows] for kind in kinds}

    def where(row: int) -> str:
        one = given[row]
        return str(one) if isinstance(one, str | Path) and alone != 'text' else f'example {row}'

    return Source(
        name='what is given',
        split='',
        length=len(given),
        num_classes=1,
        image_shape=None,
        load=load,
        in_memory=False,
        channels=channels,
        where=where,
    )


def _read(kind: str, columns: Mapping[str, Any], channels: int) -> Any:
    """Return a column of an example: the bytes of a file, a text, or pixels."""
    if kind not in columns:
        raise UserError(f'the model takes {kind}, but there is only {", ".join(columns)}')
    value = columns[kind]
    if isinstance(value, bytes) and kind != 'text':
        return value
    is_path = isinstance(value, Path) or (isinstance(value, str) and kind != 'text')
    if is_path:
        name = str(value)
        is_other = kind_of(name) not in (None, kind)
        if is_other:
            raise UserError(f'{name}: is {kind_of(name)}, and the model takes {kind}')
        (content,) = loader(kind, lambda row: files.read(files.place(name, kind)))([0])
        return content
    if kind == 'image':
        return _pixels(value, channels)
    if kind == 'text' and isinstance(value, str):
        return value
    raise UserError(
        f'the model takes {kind}: give paths{" or texts" if kind == "text" else " or bytes"}, not '
        f'{type(value).__name__}'
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
