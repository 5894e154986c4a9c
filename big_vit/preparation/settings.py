"""What a preparation is asked to do, in plain values that workers elsewhere can be sent."""

from typing import Any, NamedTuple

# Why an example is left out, beside the `--where` rules. The first that applies counts.
UNREADABLE, SIDE, ASPECT, CAPTION = 'unreadable', 'min_side', 'max_aspect', 'caption'
EVALUATION, EXACT, NEAR = 'evaluation', 'exact', 'near'


class Given(NamedTuple):
    """A set of examples.

    Attributes:
      flag: that named it, for messages.
      source: a key of `SOURCES`.
      path: a file, folder, glob or URL.
      split: of these examples; None where there is one.
      image_column, text_column, label_column: as the config keys.
    """

    flag: str
    source: str
    path: str
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None


class Settings(NamedTuple):
    """What is left out, and what the rest becomes.

    Attributes:
      given: the examples.
      evaluations: sets that no example may be near to.
      min_side: least shorter side in pixels.
      max_aspect: most of longer side / shorter side; None for any.
      caption_chars, caption_words: (least, most) of the text; None for any.
      where: rules of columns, such as 'score>=5'.
      exact: what equal examples share: 'pixels', 'bytes', or 'off'.
      near: share of the 256 bits of two signatures that may differ; None keeps near duplicates.
      near_evaluation: the same where one is of an evaluation.
      embeddings: what `predict --embed` wrote, to make signatures of; none makes them of pixels.
      keep: 'largest' or 'first' of several that are alike.
      resize: most pixels of the shorter side; None keeps sizes.
      encode: 'jpeg', 'png' or 'webp'; None keeps the files that keep their size.
      quality: of JPEG and WebP.
      format: of the shards, 'tar' or 'parquet'.
      shard_samples: examples of a shard.
      name: of the split that is written.
    """

    given: Given
    evaluations: tuple[Given, ...] = ()
    min_side: int = 1
    max_aspect: float | None = None
    caption_chars: tuple[int, int] | None = None
    caption_words: tuple[int, int] | None = None
    where: tuple[str, ...] = ()
    exact: str = 'pixels'
    near: float | None = 0.15
    near_evaluation: float = 0.2
    embeddings: tuple[str, ...] = ()
    keep: str = 'largest'
    resize: int | None = None
    encode: str | None = None
    quality: int = 95
    format: str = 'tar'
    shard_samples: int = 10_000
    name: str = 'train'

    @property
    def reasons(self) -> list[str]:
        """What becomes of an example, by number: 0 is kept, others say why it is left out."""
        rules = [f'where {rule}' for rule in self.where]
        return ['kept', UNREADABLE, SIDE, ASPECT, CAPTION, *rules, EVALUATION, EXACT, NEAR]

    def as_dict(self) -> dict[str, Any]:
        return self._asdict() | {
            'given': self.given._asdict(),
            'evaluations': [given._asdict() for given in self.evaluations],
        }
