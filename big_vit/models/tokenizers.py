"""From inputs to tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.layers import Dtype, Gather, ungathered


class Patches(nn.Module):
    """Non-overlapping patches, each projected to `width` (arXiv 2010.11929).

    The kernel has the layout of a convolution, [height, width, channels, out],
    and is applied as a reshape and one matrix product.
    """

    width: int
    patch_size: tuple[int, int]
    dtype: Dtype = jnp.float32
    gather: Gather = ungathered

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        batch, height, width, channels = image.shape
        ph, pw = self.patch_size
        if height % ph or width % pw:
            raise ValueError(f'{height}x{width} pixels do not divide into {ph}x{pw} patches')
        shape = (ph, pw, channels, self.width)
        kernel = self.param(
            'kernel',
            lambda key, shape: nn.initializers.lecun_normal()(
                key, (ph * pw * channels, self.width)
            ).reshape(shape),
            shape,
        )
        bias = self.param('bias', nn.initializers.zeros, (self.width,))
        patches = image.reshape(batch, height // ph, ph, width // pw, pw, channels)

        def product(patches: Array, kernel: Array) -> Array:
            return jnp.einsum('brpcqi,pqio->brco', patches, kernel)

        patches, kernel = patches.astype(self.dtype), kernel.astype(self.dtype)
        tokens = self.gather('embedding/kernel', product, patches, kernel)
        return tokens + bias.astype(self.dtype).reshape(1, 1, 1, -1)
