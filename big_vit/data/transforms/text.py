"""Operations that turn text into tokens."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.transforms.operations import (
    MOST_TOKENS,
    BadExampleError,
    Columns,
    Draw,
    Operation,
    UnfitError,
    whole_number,
)

# The vocabulary of byte_tokens is ByT5's (arXiv 2105.13626): padding, end, unknown, the bytes.
PADDING, END, FIRST_BYTE = 0, 1, 3
_SURROGATE = re.compile('[\ud800-\udfff]')


def _need(columns: Columns) -> list[str]:
    if 'text' not in columns:
        raise UnfitError(f"needs 'text', but these examples have {', '.join(sorted(columns))}")
    for row, text in enumerate(columns['text']):
        # JSON can hold surrogates, halves of characters that cannot be encoded.
        if not isinstance(text, str) or (not text.isascii() and _SURROGATE.search(text)):
            raise BadExampleError(row, f'not a text ({text!r:.40})')
    return columns['text']


def lower() -> Operation:
    """Convert text to lower case."""

    def apply(columns: Columns, draw: Draw) -> Columns:
        return {**columns, 'text': [text.lower() for text in _need(columns)]}

    return Operation(apply, step='keeps', carries=True)


def _padded(columns: Columns, rows: list[list[int]], length: int, padding: int) -> Columns:
    """Replace 'text' by 'tokens', int32 [B, length], and 'text_mask', uint8, 1 at tokens."""
    tokens = np.full((len(rows), length), padding, np.int32)
    mask = np.zeros((len(rows), length), np.uint8)
    for row, ids in enumerate(rows):
        kept = ids[:length]
        tokens[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    rest = {name: column for name, column in columns.items() if name != 'text'}
    return {**rest, 'tokens': tokens, 'text_mask': mask}


def byte_tokens(length) -> Operation:
    """Encode text as UTF-8 bytes plus 3 and an end, cut or padded to `length`; needs no file."""
    length = whole_number('length', length, 1, MOST_TOKENS)

    def apply(columns: Columns, draw: Draw) -> Columns:
        rows = [
            [*(byte + FIRST_BYTE for byte in text.encode()[: length - 1]), END]
            for text in _need(columns)
        ]
        return _padded(columns, rows, length, PADDING)

    return Operation(apply, step='keeps', carries=True)


def tokenize(path, length) -> Operation:
    """Tokenize by a Hugging Face tokenizer file (`tokenizer.json`), cut or padded to `length`.

    The file's special tokens are added and survive the cut. Padding follows, with the number that
    the file sets or that of its '[PAD]' or '<pad>', else 0. Needs `pip install tokenizers`.
    """
    length = whole_number('length', length, 1, MOST_TOKENS)
    if not isinstance(path, str):
        raise UnfitError(f'takes the path of a tokenizer file, not {path!r}')
    file = Path(path).expanduser()
    try:
        files.check_regular(file)
        tokenizer, padding = _tokenizer(str(file), file.stat().st_mtime_ns, length)
    except OSError as error:
        raise UnfitError(f'cannot read {str(file)!r} ({error.strerror})') from error

    def apply(columns: Columns, draw: Draw) -> Columns:
        encoded = tokenizer.encode_batch_fast(_need(columns))
        return _padded(columns, [encoding.ids for encoding in encoded], length, padding)

    return Operation(apply, step='keeps', carries=True)


@functools.lru_cache(maxsize=8)
def _tokenizer(file: str, changed: int, length: int) -> tuple[Any, int]:
    """Load (tokenizer that cuts to `length`, number of the padding), once per process.

    Threads may share the tokenizer, since nothing changes it afterwards.

    Args:
      changed: modification time of the file, so that a new version is read again.
    """
    # The pipeline has threads already; the tokenizer's would multiply them.
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
