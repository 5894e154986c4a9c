"""Peers from PyPI, with all their parameters drawn anew, and their answers beside ours."""

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit import interop
from big_vit.models.vit import make_vit

os.environ.setdefault('HF_HUB_OFFLINE', '1')

# Of answers of size 1 to 10; and what a wrong setting must at least change.
CLOSE, WRONG = 5e-5, 1e-4


def _torch():
    """torch, with what torchvision's compiled part would define: without it none imports."""
    import torch

    with contextlib.suppress(RuntimeError):
        found = importlib.util.find_spec('torchvision')
        places = (found.submodule_search_locations or []) if found else []
        for compiled in (file for place in places for file in Path(place).glob('_C*.so')):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(compiled))
                return torch
        # From 0.28 on it does so itself.
        registrations = [Path(place) / '_meta_registrations.py' for place in places]
        if any('library.define(' in file.read_text() for file in registrations if file.is_file()):
            return torch
        library = torch.library.Library('torchvision', 'DEF')
        library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        globals()['_library'] = library  # It lives as long as these definitions do.
    return torch


def peer(name):
    """A peer's module; skips where it is not installed."""
    for needed in ('torch', 'safetensors', name):
        if needed not in sys.modules and importlib.util.find_spec(needed) is None:
            pytest.skip(f'{needed} is not installed')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch = _torch()
        torch.set_num_threads(1)
        return importlib.import_module(name)


# What the stream of tokens starts with; it is drawn small, where an epsilon counts.
_START = ('token', 'pos_', 'position', 'patch_embed', 'embeddings.', 'class_embedding', 'conv1.')


def randomise(model, seed=0, stem=64.0):
    """Draws all parameters anew: zeros and ones hide what is swapped or left out.

    `stem` is the size of the kernels of a ResNet stem; how they are standardised depends on it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=generator)
        if any(part in name for part in _START) and 'backbone' not in name:
            fan = parameter[0].numel() if parameter.ndim == 4 else 1
            value = 0.05 * value * fan**-0.5
        elif parameter.ndim > 1 and 'latent' not in name and 'probe' not in name:
            value = value * parameter[0].numel() ** -0.5
            value = value * stem if 'backbone' in name else value
        elif name.endswith('bias') or parameter.ndim > 1:
            value = 0.4 * value
        else:
            value = 1 + 0.4 * value
        with torch.no_grad():
            parameter.copy_(value)
    return model.eval()


def images(size, count=2, seed=1):
    height, width = size if isinstance(size, tuple) else (size, size)
    return np.random.default_rng(seed).normal(size=(count, height, width, 3)).astype(np.float32)


def theirs(model, batch, answer=lambda y: y):
    import torch

    with torch.no_grad():
        y = model(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()))
    return answer(y).numpy()


def ours(weights, batch, **wrong):
    """The answers of our ViT, with some settings changed on purpose."""
    fields = {**weights.settings, **wrong}
    model = make_vit(**fields, scan=False, dtype=jnp.float32)
    params = jax.tree.map(jnp.asarray, weights.params)
    with jax.default_matmul_precision('highest'):
        y, _ = jax.jit(model.apply)({'params': params}, jnp.asarray(batch))
    return np.asarray(y)


def distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def export_and_read(weights, to, folder, **more):
    """What is written from what was read; the path, and what it is when read again."""
    path = interop.write(folder, to, weights, **more)
    return path, interop.read(path)
