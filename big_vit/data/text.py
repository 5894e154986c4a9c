"""Words to numbers."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data.operations import Columns, Draw, Operation, UnfitError, whole

# Of byte_tokens, as ByT5 has them (arXiv 2105.13626): padding, end, unknown, then the bytes.
PADDING, END, FIRST_BYTE = 0, 1, 3


def _need(columns: Columns) -> list[str]:
    if 'text' not in columns:
        raise UnfitError(f"needs 'text', but these examples have {', '.join(sorted(columns))}")
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
    length = whole('length', length, 1)

    def apply(columns: Columns, draw: Draw) -> Columns:
        rows = [
            [*(byte + FIRST_BYTE for byte in text.encode()[: length - 1]), END]
            for text in _need(columns)
        ]
        return _padded(columns, rows, length, PADDING)

    return Operation(apply)


def tokenize(path, length) -> Operation:
    """Numbers by a tokenizer file of Hugging Face (`tokenizer.json`), cut or padded to `length`.

    Padding is the file's own, or 0. Needs `pip install tokenizers`.
    """
    length = whole('length', length, 1)
    if not isinstance(path, str):
        raise UnfitError(f'takes the path of a tokenizer file, not {path!r}')
    # Several processes of threads would each start as many as there are processors.
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UnfitError(f'needs `pip install tokenizers` ({error})') from error
    file = Path(path).expanduser()
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises plain Exceptions.
        raise UnfitError(f'cannot read {str(file)!r} ({error})') from error
    padding = (tokenizer.padding or {}).get('pad_id', 0)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    lock = threading.Lock()

    def apply(columns: Columns, draw: Draw) -> Columns:
        with lock:
            rows = [encoded.ids for encoded in tokenizer.encode_batch(_need(columns))]
        return _padded(columns, rows, length, padding)

    return Operation(apply)


OPERATIONS = {operation.__name__: operation for operation in (lower, byte_tokens, tokenize)}
