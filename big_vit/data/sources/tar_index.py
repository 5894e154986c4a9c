"""The index of tar shards: where the media of their samples lie, and what labels they have."""

import concurrent.futures
import json
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.sources import media, sidecars, tar_samples

# The kinds of media by their numbers in an index.
KINDS = list(media.KINDS)

Index = dict[str, np.ndarray]


def indexed(
    shards: list[files.Stored],
    label_column: str,
    text_column: str | None = None,
    labelled: bool = True,
) -> Index:
    """Index the samples of some shards; the index is built once and memory-mapped from then on.

    Returns:
      {'shard', 'offset', 'size', 'kind', 'label'}: arrays [samples]; 'words': (offset, size) of
      the member `text_column` of each, [samples, 2], or [0, 2]; 'values': the label values as
      JSON, one a line; 'left': {ending: (number, example)} of what cannot be read, as JSON.

    Raises:
      UserError: a shard is damaged or cannot be read, or a sample is not as it should be.
    """

    def build() -> Index:
        sidecars.tell_walk(shards)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            indices = pool.map(
                lambda shard: _index(shard.place, label_column, text_column, labelled), shards
            )
            return _join(list(indices))

    options = f'{label_column}\0{text_column or ""}' + ('' if labelled else '\0unlabelled')
    mark = files.fingerprint_of(shards, options, 4)
    return files.kept_arrays('tar', mark, build)


def sidecar(shard: files.Place, label_column: str) -> tuple[dict[str, Any], sidecars.Arrays]:
    """Index a shard for all that may be asked of it.

    Returns:
      (facts, see `sidecars.joined_facts`, with 'counts' and 'unlabelled' by kind; arrays as of
      `indexed`, with 'in ENDING', int64 [samples, 2], for the members of each ending, and the
      label -1 where there is none).

    Raises:
      UserError: the shard is damaged or cannot be read, or a sample is not as it should be.
    """
    found, left, _ = tar_samples.walk(shard, label_column, None, labelled=False)
    samples = [sample for sample, _ in found]
    kinds = np.array([KINDS.index(sample.kind) for sample in samples], np.uint8)
    values: dict[int | str, int] = {}
    labels = [-1 if s.label is None else values.setdefault(s.label, len(values)) for s in samples]
    arrays: sidecars.Arrays = {
        'offset': np.array([sample.offset for sample in samples], np.uint64),
        'size': np.array([sample.size for sample in samples], np.uint32),
        'kind': kinds,
        'label': np.array(labels, np.int32),
        'values': _pack_values(list(values)),
    }
    endings: dict[str, list[int]] = {}
    for ending in sorted({ending for _, parts in found for ending in parts}):
        where = [parts.get(ending, (-1, 0)) for _, parts in found]
        arrays[f'in {ending}'] = np.array(where, np.int64).reshape(-1, 2)
        there = kinds[arrays[f'in {ending}'][:, 0] >= 0]
        endings[ending] = np.bincount(there, minlength=len(KINDS)).tolist()
    bare = kinds[arrays['label'] < 0]
    facts = {
        'values': list(values),
        'left': left,
        'endings': endings,
        'counts': np.bincount(kinds, minlength=len(KINDS)).tolist(),
        'unlabelled': np.bincount(bare, minlength=len(KINDS)).tolist(),
    }
    return facts, arrays


def _index(shard: files.Place, label_column: str, text_column: str | None, labelled: bool) -> Index:
    """Index a shard, whose samples are members with one name up to its first dot."""
    found, left, unlabelled_text = tar_samples.walk(shard, label_column, text_column, labelled)
    if unlabelled_text is not None and not found:
        raise unlabelled_text
    samples = [sample for sample, _ in found]
    values: dict[int | str, int] = {}
    labels = [0 if sample.label is None else sample.label for sample in samples]
    texts = [sample.text for sample in samples if sample.text is not None]
    return {
        'offset': np.array([sample.offset for sample in samples], np.uint64),
        'size': np.array([sample.size for sample in samples], np.uint32),
        'kind': np.array([KINDS.index(sample.kind) for sample in samples], np.uint8),
        'label': np.array([values.setdefault(x, len(values)) for x in labels], np.int32),
        'words': np.array(texts, np.uint64).reshape(len(texts), 2),
        'values': _pack_values(list(values)),
        'left': np.frombuffer(json.dumps(left).encode(), np.uint8),
    }


def _pack_values(values: list[Any]) -> np.ndarray:
    return np.frombuffer('\n'.join(map(json.dumps, values)).encode(), np.uint8)


def unpack_values(values: np.ndarray) -> list[Any]:
    """Return the label values of an index; its labels are places among them."""
    return [json.loads(line) for line in bytes(values).decode().splitlines()]


def _join(indices: list[Index]) -> Index:
    """Concatenate the indices of several shards, with one numbering of their labels."""
    values_of = [unpack_values(index['values']) for index in indices]
    values = sorted({value for values in values_of for value in values}, key=json.dumps)
    number = {value: i for i, value in enumerate(values)}
    labels = [
        np.array([number[value] for value in values], np.int32)[index['label']]
        for values, index in zip(values_of, indices, strict=True)
    ]
    shards = [np.full(len(index['size']), i, np.uint32) for i, index in enumerate(indices)]
    left = sidecars.joined_left(json.loads(bytes(index['left'])) for index in indices)
    return {
        'shard': np.concatenate(shards),
        **{n: np.concatenate([i[n] for i in indices]) for n in ('offset', 'size', 'kind', 'words')},
        'label': np.concatenate(labels),
        'values': _pack_values(values),
        'left': np.frombuffer(json.dumps(left).encode(), np.uint8),
    }
