"""Small sets of tar shards, on a disk and in the store that counts."""

import io
import tarfile

import numpy as np
from stores import Store

from big_vit.data.sources import tar
from big_vit.data.sources.base import Request


def shard(rows, kind=tarfile.USTAR_FORMAT):
    """A tar of (name, {ending: data}) rows."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode='w', format=kind) as archive:
        for name, members in rows:
            for ending, data in members.items():
                info = tarfile.TarInfo(f'{name}.{ending}')
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return held.getvalue()


def rows(number, count=7, picture=3000):
    random = np.random.default_rng(number)
    return [
        (
            f'{number:03d}{i:04d}',
            {
                'jpg': random.bytes(picture + 31 * i),
                'cls': str((number + i) % 4).encode(),
                'txt': f'a picture {number} {i}'.encode(),
                'fr.txt': f'une image {number} {i}'.encode(),
            },
        )
        for i in range(count)
    ]


def fill(store, shards=5, folder='bucket/set', **more):
    for number in range(shards):
        data = shard(rows(number, **more))
        store.store[f'/{folder}/train-{number:04d}.tar'] = held(data, f'/{folder}/{number}')
    store.asked.clear()
    return f'counted://{folder}'


def held(data, path='/x'):
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(Store(), path, data)


def write(folder, count=3, **more):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f'train-{number:04d}.tar').write_bytes(shard(rows(number, **more)))
    return str(folder)


def opened(path, **more):
    return tar.tar(Request(more.pop('split', 'train'), labelled=more.pop('labelled', True)),
                   path=path, **more)  # fmt: skip
