"""GELU with the error function in bfloat16: the float64 one, rounded once, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from big_vit.models.layers import ACTIVATIONS


def test_values_and_slopes_are_rounded_once():
    x = jnp.linspace(-6, 6, 801).astype(jnp.bfloat16)
    y, back = jax.vjp(ACTIVATIONS['gelu'], x)
    (slope,) = back(jnp.ones_like(x))
    x64 = np.asarray(x, np.float64)
    cdf = 0.5 * special.erfc(-x64 / 2**0.5)
    density = np.exp(-(x64**2) / 2) / (2 * np.pi) ** 0.5
    for found, wanted in ((y, x64 * cdf), (slope, cdf + x64 * density)):
        assert found.dtype == jnp.bfloat16
        # Half a unit in the last of eight bits, and where it is next to 0 that of float32 near 1.
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=1e-6)
