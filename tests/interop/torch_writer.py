"""Files as `torch.save` writes them, without torch: of NumPy arrays where torch has tensors."""

import io
import pickle
import sys
import types
import zipfile
from unittest import mock

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): 'FloatStorage',
    np.dtype(np.float64): 'DoubleStorage',
    np.dtype(np.float16): 'HalfStorage',
    np.dtype(ml_dtypes.bfloat16): 'BFloat16Storage',
    np.dtype(np.int64): 'LongStorage',
    np.dtype(np.int8): 'CharStorage',
}


def _named(module, name, make=lambda name: type(name, (), {})):
    thing = make(name)
    thing.__module__, thing.__qualname__, thing.__name__ = module, name, name
    setattr(sys.modules[module], name, thing)
    return thing


def _function(_):
    return lambda *_: None


class View:
    """A tensor that says of its storage what the test wants, true or not."""

    def __init__(
        self, storage, offset, shape, strides, count=None, rebuild='_rebuild_tensor_v2', more=()
    ):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides
        self.count = storage.size if count is None else count
        self.rebuild, self.more = rebuild, more


class _Key:
    def __init__(self, view):
        self.view = view


def pickled(tree, protocol=2):
    """The pickle of a tree, and the storages by key."""
    modules = {name: types.ModuleType(name) for name in ('torch', 'torch._utils')}
    storages, keys = {}, {}
    with mock.patch.dict(sys.modules, modules):
        kinds = {dtype: _named('torch', name) for dtype, name in STORAGES.items()}

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing):
                if not isinstance(thing, _Key):
                    return None
                storage = thing.view.storage
                key = keys.setdefault(id(storage), str(len(keys)))
                storages[key] = storage
                return ('storage', kinds[storage.dtype], key, 'cpu', thing.view.count)

            def reducer_override(self, thing):
                if isinstance(thing, np.ndarray):
                    strides = np.empty(thing.shape, thing.dtype).strides
                    steps = tuple(n // thing.itemsize for n in strides)
                    keep.append(np.ascontiguousarray(thing).reshape(-1))
                    thing = View(keep[-1], 0, thing.shape, steps)
                if isinstance(thing, View):
                    rebuild = _named('torch._utils', thing.rebuild, _function)
                    sizes = (thing.offset, thing.shape, thing.strides, False, {}, *thing.more)
                    return rebuild, (_Key(thing), *sizes)
                return NotImplemented

        keep = []
        file = io.BytesIO()
        Pickler(file, protocol).dump(tree)
    return file.getvalue(), storages


def save(tree, path, protocol=2, compression=zipfile.ZIP_STORED):
    """A zip file, as torch has written since 1.6."""
    program, storages = pickled(tree, protocol)
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', program)
        archive.writestr('archive/byteorder', 'little')
        for key, storage in storages.items():
            archive.writestr(f'archive/data/{key}', storage.tobytes())
        archive.writestr('archive/version', '3\n')
    return path


def save_legacy(tree, path):
    """What torch wrote before 1.6."""
    program, storages = pickled(tree)
    parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})]
    parts += [program, pickle.dumps(sorted(storages), 2)]
    for _, storage in sorted(storages.items()):
        parts += [storage.size.to_bytes(8, 'little'), storage.tobytes()]
    path.write_bytes(b''.join(parts))
    return path
