"""Functions as StableHLO, which JAX alone loads and runs on CPUs, GPUs and TPUs.

    exported = jax.export.deserialize(bytearray(Path('model.stablehlo').read_bytes()))
    exported.call(image)['logits']

JAX promises to read such a file for half a year, so it is no archive: keep the checkpoint.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from big_vit.deployment.functions import Function
from big_vit.deployment.graph import BATCH
from big_vit.interop import files

PLATFORMS = ('cpu', 'cuda', 'tpu')


def write(path: Path, function: Function, apart: bool) -> Any:
    """Write a function of its inputs in order, and return the file's, of inputs by name.

    Args:
      apart: write the parameters to a safetensors file beside it; the function takes them, by
        path, before the inputs.
    """
    (batch,) = export.symbolic_shape(BATCH)
    specs = [jax.ShapeDtypeStruct((batch, *s), d) for s, d in function.inputs.values()]
    names = list(function.inputs)

    def apply(params: Mapping[str, Any], *inputs: Any) -> dict[str, jax.Array]:
        return function.apply(params, dict(zip(names, inputs, strict=True)))

    if apart:
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in function.params.items()}
        exported = export.export(jax.jit(apply), platforms=PLATFORMS)(shapes, *specs)
        files.write_safetensors(path.with_suffix('.safetensors'), function.params, {})
    else:
        known = {name: jnp.asarray(x) for name, x in function.params.items()}
        program = jax.jit(functools.partial(apply, known))
        exported = export.export(program, platforms=PLATFORMS)(*specs)
    with files.replacing(path) as partial:
        partial.write_bytes(exported.serialize())
    read = export.deserialize(bytearray(path.read_bytes()))
    before = (function.params,) if apart else ()

    def run(inputs: Mapping[str, np.ndarray]) -> Any:
        return read.call(*before, *(inputs[name] for name in names))

    return run
