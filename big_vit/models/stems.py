"""Convolutional stems: early convolutions, CCT, and the ResNets of hybrid models."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.layers import Gather, Style, ungathered

# Units per stage of each ResNet, one entry per total stride (BiT, arXiv 1912.11370).
RESNETS: dict[str, tuple[tuple[int, ...], ...]] = {
    'R': ((),),
    'R26': ((2, 2, 2, 2),),
    'R50': ((3, 4, 6, 3), (3, 4, 9)),
    'R101': ((3, 4, 23, 3),),
    'R8': ((1, 1),),  # Two stages of one unit, for pictures of few pixels.
}
CCT_CHANNELS = 64


def resnet_stride(layers: tuple[int, ...]) -> int:
    """Return the total stride of a ResNet, given the units of its stages."""
    return 4 * 2 ** max(len(layers) - 1, 0)


def convolve(
    x: Float[Array, 'batch height width channels'],
    kernel: Float[Array, 'rows columns channels features'],
    stride: tuple[int, int],
    padding: Any,
) -> Float[Array, 'batch new_height new_width features']:
    return jax.lax.conv_general_dilated(
        x, kernel, stride, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


class Conv(nn.Module):
    """Convolution without bias.

    Attributes:
      standardised: normalise the kernel to mean 0 and variance 1 per output channel (weight
        standardisation, arXiv 1903.10520), as BiT's ResNets do. The constant is added to the
        deviation, as in the code that trained them.
    """

    features: int
    size: int
    stride: int = 1
    standardised: bool = False
    padding: Any = 'SAME'
    dtype: Any = jnp.float32
    gather: Gather = ungathered

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch new_height new_width features']:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param('kernel', nn.initializers.he_normal(), shape))
        if self.standardised:
            kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
            kernel = kernel / (jnp.sqrt(jnp.square(kernel).mean((0, 1, 2), keepdims=True)) + 1e-5)
        product = partial(convolve, stride=(self.stride, self.stride), padding=self.padding)
        name = '/'.join((*self.path, 'kernel'))
        return self.gather(name, product, x.astype(self.dtype), kernel.astype(self.dtype))


class GroupNorm(nn.Module):
    """Group normalisation over space and groups of channels (arXiv 1803.08494), in float32."""

    groups: int = 32
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch height width channels']:
        batch, height, width, channels = x.shape
        scale = jnp.asarray(self.param('scale', nn.initializers.ones, (channels,)))
        bias = jnp.asarray(self.param('bias', nn.initializers.zeros, (channels,)))
        x32 = x.astype(jnp.float32).reshape(batch, height * width, self.groups, -1)
        mean = x32.mean((1, 3), keepdims=True)
        variance = jnp.square(x32 - mean).mean((1, 3), keepdims=True)
        x32 = ((x32 - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        lead = (1, 1, 1, channels)
        return (x32 * scale.reshape(lead) + bias.reshape(lead)).astype(self.dtype)


# PyTorch's padding; TensorFlow's 'SAME' pads only at the end for a stride of two on even sizes.
_SYMMETRIC = ((1, 1), (1, 1))


def _max_pool(x: Array, border: Any) -> Array:
    """Return the maximum over 3x3 windows with a stride of two."""
    return nn.max_pool(x, (3, 3), (2, 2), border)


class Unit(nn.Module):
    """Bottleneck unit of BiT's ResNet, with the ReLU after the addition (arXiv 1512.03385)."""

    features: int
    stride: int
    style: Style

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch new_height new_width features']:
        dtype, out = self.style.dtype, 4 * self.features
        conv = partial(Conv, standardised=True, dtype=dtype, gather=self.style.gather)
        normed = partial(GroupNorm, dtype=dtype)
        shortcut = x
        if x.shape[-1] != out or self.stride > 1:
            shortcut = normed(name='gn_proj')(conv(out, 1, self.stride, name='conv_proj')(x))
        y = jax.nn.relu(normed(name='gn1')(conv(self.features, 1, name='conv1')(x)))
        y = conv(self.features, 3, self.stride, name='conv2')(y)
        y = jax.nn.relu(normed(name='gn2')(y))
        y = normed(name='gn3')(conv(out, 1, name='conv3')(y))
        return jax.nn.relu(shortcut + y)


class Stage(nn.Module):
    """Units of one resolution."""

    units: int
    features: int
    stride: int
    style: Style

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch new_height new_width features']:
        for i in range(self.units):
            stride = 1 if i else self.stride
            x = Unit(self.features, stride, self.style, name=f'unit{i + 1}')(x)
        return x


class ResNet(nn.Module):
    """The first stages of BiT's ResNet, as in the hybrids of the ViT paper."""

    layers: tuple[int, ...]
    style: Style

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        style, root = self.style, 64
        x = Conv(
            root, 7, 2, standardised=True, dtype=style.dtype, gather=style.gather, name='conv_root'
        )(image)
        x = _max_pool(jax.nn.relu(GroupNorm(dtype=style.dtype, name='gn_root')(x)), 'SAME')
        for i, units in enumerate(self.layers):
            stage = Stage(units, root * 2**i, 2 if i else 1, style, name=f'block{i + 1}')
            x = stage(x)
        return x


class ScaledConv(nn.Module):
    """Convolution without bias, then a factor and an offset for each channel, in float32.

    These are a batch norm whose statistics are frozen. They are parameters, which a run holds as
    they are or trains, as its rules for rates say.
    """

    features: int
    size: int
    stride: int
    style: Style

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch new_height new_width features']:
        border = self.size // 2
        x = Conv(
            self.features,
            self.size,
            self.stride,
            padding=((border, border), (border, border)),
            dtype=self.style.dtype,
            gather=self.style.gather,
            name='conv',
        )(x)
        scale = jnp.asarray(self.param('scale', nn.initializers.ones, (self.features,)))
        bias = jnp.asarray(self.param('bias', nn.initializers.zeros, (self.features,)))
        lead = (1, 1, 1, self.features)
        x = x.astype(jnp.float32) * scale.reshape(lead) + bias.reshape(lead)
        return x.astype(self.style.dtype)


class FrozenUnit(nn.Module):
    """Bottleneck unit of torchvision's ResNet, whose 3x3 convolution has the stride (v1.5)."""

    features: int
    stride: int
    style: Style

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch new_height new_width features']:
        style, out = self.style, 4 * self.features
        y = jax.nn.relu(ScaledConv(self.features, 1, 1, style, name='conv1')(x))
        y = jax.nn.relu(ScaledConv(self.features, 3, self.stride, style, name='conv2')(y))
        y = ScaledConv(out, 1, 1, style, name='conv3')(y)
        if x.shape[-1] != out or self.stride > 1:
            x = ScaledConv(out, 1, self.stride, style, name='shortcut')(x)
        return jax.nn.relu(x + y)


class FrozenResNet(nn.Module):
    """The first stages of torchvision's ResNet with frozen batch norms (arXiv 1512.03385).

    Parameters are below `conv_root` and `stage1_unit1` and so on.
    """

    layers: tuple[int, ...]
    style: Style

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        root = 64
        x = jax.nn.relu(ScaledConv(root, 7, 2, self.style, name='conv_root')(image))
        x = _max_pool(x, _SYMMETRIC)
        for stage, units in enumerate(self.layers):
            for unit in range(units):
                stride = 2 if stage and not unit else 1
                name = f'stage{stage + 1}_unit{unit + 1}'
                x = FrozenUnit(root * 2**stage, stride, self.style, name=name)(x)
        return x


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 in place of large patches (arXiv 2106.14881).

    A norm and a ReLU follow each of them, and each doubles the channels; `Patches` of one pixel
    project the result. Group norm replaces the paper's batch norm, so that the output for an
    example depends on nothing but the parameters and that example.
    """

    width: int
    layers: int
    style: Style

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        x, dtype = image, self.style.dtype
        for i in range(self.layers):
            features = conv_features(self.width, self.layers, i)
            conv = Conv(
                features,
                3,
                2,
                padding=_SYMMETRIC,
                dtype=dtype,
                gather=self.style.gather,
                name=f'conv_{i}',
            )
            groups = math.gcd(features, 8)
            x = jax.nn.relu(GroupNorm(groups, dtype=dtype, name=f'norm_{i}')(conv(x)))
        return x


def conv_features(width: int, layers: int, i: int) -> int:
    """Return the channels of convolution i of a `ConvStem`; the last has the full width."""
    return max(width // 2 ** (layers - 1 - i), 8)


class CctStem(nn.Module):
    """Convolutions with ReLU and max-pooling, whose pixels are the tokens (arXiv 2104.05704)."""

    width: int
    layers: int
    style: Style

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        x = image
        for i in range(self.layers):
            features = self.width if i == self.layers - 1 else CCT_CHANNELS
            conv = Conv(
                features, 3, dtype=self.style.dtype, gather=self.style.gather, name=f'conv_{i}'
            )
            x = _max_pool(jax.nn.relu(conv(x)), _SYMMETRIC)
        return x
