"""Words to numbers."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data.transforms.operations import (
    BadExampleError,
    Columns,
    Draw,
    Operation,
    UnfitError,
    whole_number,
)

# Of byte_tokens, as ByT5 has them (arXiv 2105.13626): padding, end, unknown, then the bytes.
PADDING, END, FIRST_BYTE = 0, 1, 3
_HALF = re.compile('[\ud800-\udfff]')


def _need(columns: Columns) -> list[str]:
    if 'text' not in columns:
        raise UnfitError(f"needs 'text', but these examples have {', '.join(sorted(columns))}")
    for row, text in enumerate(columns['text']):
        # JSON can hold halves of characters, which no encoding takes.
        if not isinstance(text, str) or (not text.isascii() and _HALF.search(text)):
            raise BadExampleError(row, f'not a text ({text!r:.40})')
    return columns['text']


def lower() -> Operation:
    """Text in lower case."""

    def apply(columns: Columns, draw: Draw) -> Columns:
        return {**columns, 'text': [text.lower() for text in _need(columns)]}

    return Operation(apply)


def _padded(columns: Columns, rows: list[list[int]], length: int, padding: int) -> Columns:
    """'text' replaced by 'tokens' int32 [B, length] and 'text_mask' uint8, 1 where one is."""
    tokens = np.full((len(rows), length), padding, np.int32)
    mask = np.zeros((len(rows), length), np.uint8)
    for row, ids in enumerate(rows):
        kept = ids[:length]
        tokens[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    rest = {name: column for name, column in columns.items() if name != 'text'}
    return {**rest, 'tokens': tokens, 'text_mask': mask}


def byte_tokens(length) -> Operation:
    """UTF-8 bytes plus 3, and an end, cut or padded to `length`: a tokenizer without a file."""
    length = whole_number('length', length, 1)

    def apply(columns: Columns, draw: Draw) -> Columns:
        rows = [
            [*(byte + FIRST_BYTE for byte in text.encode()[: length - 1]), END]
            for text in _need(columns)
        ]
        return _padded(columns, rows, length, PADDING)

    return Operation(apply)


def tokenize(path, length) -> Operation:
    """Numbers by a tokenizer file of Hugging Face (`tokenizer.json`), cut or padded to `length`.

    The file's own special tokens are added and survive the cut. Padding comes behind, with the
    file's own number or that of its '[PAD]' or '<pad>', else 0. Needs `pip install tokenizers`.
    """
    length = whole_number('length', length, 1)
    if not isinstance(path, str):
        raise UnfitError(f'takes the path of a tokenizer file, not {path!r}')
    file = Path(path).expanduser()
    try:
        tokenizer, padding = _tokenizer(str(file), file.stat().st_mtime_ns, length)
    except OSError as error:
        raise UnfitError(f'cannot read {str(file)!r} ({error.strerror})') from error

    def apply(columns: Columns, draw: Draw) -> Columns:
        encoded = tokenizer.encode_batch_fast(_need(columns))
        return _padded(columns, [one.ids for one in encoded], length, padding)

    return Operation(apply)


@functools.lru_cache(maxsize=8)
def _tokenizer(file: str, changed: int, length: int) -> tuple[Any, int]:
    """(what cuts to `length`, number of the padding), made once in a process for all threads.

    It is not changed any more, so threads may use it at the same time.
    """
    # The threads of the pipeline are enough; these would be as many again for each of them.
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnfitError(f'needs `pip install tokenizers` ({error})') from error
    try:
        tokenizer = Tokenizer.from_file(file)
        padding = (tokenizer.padding or {}).get('pad_id')
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        least = len(tokenizer.encode('').ids)
    except Exception as error:  # The library raises plain Exceptions.
        raise UnfitError(f'cannot use {file!r} ({" ".join(str(error).split())})') from error
    if least > length:
        raise UnfitError(f'takes a length of at least {least}, the special tokens of {file!r}')
    named = (tokenizer.token_to_id(token) for token in ('[PAD]', '<pad>'))
    known = [number for number in (padding, *named) if number is not None]
    return tokenizer, known[0] if known else 0


OPERATIONS = {operation.__name__: operation for operation in (lower, byte_tokens, tokenize)}
