"""Dense, norm, attention and MLP layers, whose parameters are a plain nested dictionary.

Parameters are stored in float32; `dtype` is the type of the matrix products and of the residual
stream. Norm statistics and the softmax are computed in float32.

Norm, softmax and GELU have hand-written derivatives: the backward pass saves tensors of `dtype` and
a few statistics, and recomputes the float32 intermediates that automatic differentiation would
keep.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from big_vit.models.positions import Variation

Dtype = Any
Product = Callable[[Array, Array], Array]
Init = nn.initializers.Initializer
Gather = Callable[[str, Product, Array, Array], Array]


def ungathered(name: str, product: Product, x: Array, kernel: Array) -> Array:
    return product(x, kernel)


def joined_xavier(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
    """Xavier's law for one of three matrices [inputs, outputs] that lie side by side in one."""
    bound = (6 / (shape[0] + 3 * shape[1])) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class InitialLaws(NamedTuple):
    """Laws of initial values in which codebases differ; all others are the same in all.

    Attributes:
      qkv: kernels of queries, keys and values, each [inputs, outputs].
      mlp_bias: biases of MLPs.
      patches: kernel of the patch embedding, flattened to [pixels, width].
      patch_bias: its bias, as a function of the pixels.
      token: the class token and registers are drawn with this deviation; None has a class token
        of zeros, and registers with a deviation of 0.02.
    """

    qkv: Init = nn.initializers.xavier_uniform()
    mlp_bias: Init = nn.initializers.normal(1e-6)
    patches: Init = nn.initializers.lecun_normal()
    patch_bias: Callable[[int], Init] = lambda pixels: nn.initializers.zeros
    token: float | None = None


def torch_uniform(key: Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
    """PyTorch's law of kernels [inputs, outputs], which is that of their biases."""
    return torch_bias(shape[0])(key, tuple(shape), dtype)


def torch_bias(inputs: int) -> Init:
    """PyTorch's law of biases: uniform within one over the root of the inputs."""
    bound = inputs**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


# 'vit' is that of google-research/vision_transformer, 'mae' that of facebookresearch/mae, whose
# queries, keys and values are one matrix and whose patch embedding keeps PyTorch's bias; 'detr'
# that of facebookresearch/detr, which keeps PyTorch's kernel there too.
INITIAL_LAWS = {
    'vit': InitialLaws(),
    'mae': InitialLaws(
        qkv=joined_xavier,
        mlp_bias=nn.initializers.zeros,
        patches=nn.initializers.xavier_uniform(),
        patch_bias=torch_bias,
        token=0.02,
    ),
    'detr': InitialLaws(
        qkv=joined_xavier,
        mlp_bias=nn.initializers.zeros,
        patches=torch_uniform,
        patch_bias=torch_bias,
        token=0.02,
    ),
}


@dataclass(frozen=True)
class Style:
    """Options shared by all layers of a model.

    Attributes:
      norm: 'layernorm' or 'rmsnorm' (arXiv 1910.07467).
      norm_eps: added to the variance; papers and their ports differ, and weights depend on it.
      activation: activation of the MLP, a name in `ACTIVATIONS`.
      mlp: 'mlp', or 'swiglu': silu(a) * b in place of the activation (arXiv 2002.05202).
      head_dim: features of a head; width / heads if None.
      qkv_bias: queries, keys and values have a bias.
      key_bias: keys have a bias, provided that `qkv_bias` is set.
      qk_norm: normalise the queries and keys of each head (arXiv 2302.05442).
      lsa: locality self-attention: no token attends to itself, learned temperature (arXiv
        2112.13492).
      attention: 'fused' is `attend`, other names are backends of `jax.nn.dot_product_attention`.
      lora: rank of the LoRA correction of attention kernels, see `Dense`.
      dropout: dropout rate of the MLP's hidden units and of the residual branches.
      dtype: type of the matrix products and of the residual stream.
      weight_init: law of initial values, a name in `INITIAL_LAWS`; None is 'vit'.
      gather: multiplies by a kernel; a mesh replaces it to collect the shards of the kernel first.
    """

    norm: str = 'layernorm'
    norm_eps: float = 1e-6
    activation: str = 'gelu_tanh'
    mlp: str = 'mlp'
    head_dim: int | None = None
    qkv_bias: bool = True
    key_bias: bool = True
    qk_norm: bool = False
    lsa: bool = False
    attention: str = 'fused'
    lora: int = 0
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    weight_init: str | None = None
    gather: Gather = ungathered

    @property
    def laws(self) -> InitialLaws:
        return INITIAL_LAWS[self.weight_init or 'vit']


PLAIN = Style()


class AttentionContext(NamedTuple):
    """Positions, masks and other tokens that attention depends on; None where there are none.

    Attributes:
      rotation: sine and cosine of RoPE, float32 [1 or batch, tokens, 1, head_dim].
      mask: whether a query may attend to a key, bool [1 or batch, 1, 1 or tokens, tokens].
      relative: row of the relative bias table per (query, key), int32 [tokens, tokens].
      memory: tokens to cross-attend to, [batch, memory tokens, width].
      memory_mask: as `mask`, [batch, 1, 1, memory tokens].
      memory_positions: added to keys that are of `memory`, [1 or batch, memory tokens, width].
      positions: added to queries, and to keys that are of the same tokens, [1 or batch, tokens,
        width]; values have none.
      variation: from which each block draws a rotation of its own, in place of `rotation`.
    """

    rotation: tuple[Array, Array] | None = None
    mask: Array | None = None
    relative: Array | None = None
    memory: Array | None = None
    memory_mask: Array | None = None
    memory_positions: Array | None = None
    positions: Array | None = None
    variation: Variation | None = None


NO_CONTEXT = AttentionContext()


class Dense(nn.Module):
    """Linear layer `x @ kernel + bias` over the last `in_axes` axes of x.

    Attributes:
      shape: sizes of the output axes.
      in_axes: number of contracted input axes.
      gather: called as (path of the kernel, product, x, kernel) to multiply them; a mesh replaces
        it to collect the shards of the kernel first.
      lora: rank of a correction `lora_a @ lora_b` of the kernel that starts at zero; 0 for none.
        From arXiv 2106.09685 without the factor alpha / rank, which only scales the learning rate.
    """

    shape: Sequence[int]
    in_axes: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32
    gather: Gather = ungathered
    use_bias: bool = True
    lora: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        inputs, outputs = x.shape[x.ndim - self.in_axes :], tuple(self.shape)

        def init(key: Array, shape: Sequence[int]) -> Array:
            # Fans of the flattened matrix, as in the papers; initialisers would take those of the
            # last two axes.
            matrix = (_product(inputs), _product(outputs))
            return self.kernel_init(key, matrix, jnp.float32).reshape(shape)

        kernel = self.param('kernel', init, (*inputs, *outputs))

        def product(x: Array, kernel: Array) -> Array:
            return multiply(x, kernel, self.in_axes)

        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = self.gather('/'.join((*self.path, 'kernel')), product, x, kernel)
        if self.lora:
            start = nn.initializers.normal(_product(inputs) ** -0.5)
            down = self.param('lora_a', start, (*inputs, self.lora))
            up = self.param('lora_b', nn.initializers.zeros, (self.lora, *outputs))
            low = product(x, jnp.asarray(down).astype(self.dtype))
            y = y + jax.lax.dot_general(
                low, jnp.asarray(up).astype(self.dtype), (((low.ndim - 1,), (0,)), ((), ()))
            )
        if not self.use_bias:
            return y
        bias = jnp.asarray(self.param('bias', self.bias_init, outputs))
        lead = (1,) * (y.ndim - len(outputs))
        return y + bias.astype(self.dtype).reshape(lead + outputs)


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (arXiv 1607.06450), with float32 statistics."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, self.dtype)


class RmsNorm(nn.Module):
    """RMS normalisation over the last axis (arXiv 1910.07467), computed in float32."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, jnp.asarray(scale), self.epsilon, self.dtype)


def norm(style: Style, name: str) -> LayerNorm | RmsNorm:
    """Return the normalisation layer of a style, with parameters under `name`."""
    if style.norm == 'rmsnorm':
        return RmsNorm(style.norm_eps, style.dtype, name=name)
    return LayerNorm(style.norm_eps, style.dtype, name=name)


def _dot(x: Array, kernel: Array, in_axes: int) -> Array:
    last, first = range(x.ndim - in_axes, x.ndim), range(in_axes)
    return jax.lax.dot_general(x, kernel, ((tuple(last), tuple(first)), ((), ())))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(
    x: Float[Array, '...'], kernel: Float[Array, '...'], in_axes: int
) -> Float[Array, '...']:
    """Return x @ kernel over the last `in_axes` axes of x and the first of the kernel."""
    return _dot(x, kernel, in_axes)


def _multiply_forward(x: Array, kernel: Array, in_axes: int):
    return _dot(x, kernel, in_axes), (x, kernel)


def _outer_sum(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _multiply_backward(in_axes: int, saved: tuple[Array, Array], g: Array):
    x, kernel = saved

    def by_matrices(x: Array, g: Array) -> Array:
        inputs = _product(kernel.shape[:in_axes])
        rows = x.reshape(-1, inputs), g.reshape(-1, kernel.size // inputs)
        if inputs <= kernel.size // inputs:
            return _outer_sum(*rows).reshape(kernel.shape)
        # A product with long rows is faster; the barrier stops XLA from undoing the transposition.
        transpose = jax.lax.optimization_barrier(_outer_sum(*reversed(rows)))
        return transpose.T.reshape(kernel.shape)

    def by_transposition(x: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda kernel: _dot(x, kernel, in_axes), kernel)(g)[0]

    (dx,) = jax.linear_transpose(lambda x: _dot(x, kernel, in_axes), x)(g)
    # Automatic differentiation would compute the kernel's gradient with outputs first and transpose
    # it, which is up to three times as slow on a CPU. On a TPU, `by_matrices` makes the step of
    # B/16 a fifth slower.
    return dx, jax.lax.platform_dependent(x, g, cpu=by_matrices, default=by_transposition)


multiply.defvjp(_multiply_forward, _multiply_backward)


def _to_last_axis(x: Float[Array, ' width'], ndim: int) -> Float[Array, '...']:
    return x.reshape((1,) * (ndim - 1) + x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, '*batch width'],
    scale: Float[Array, ' width'],
    bias: Float[Array, ' width'],
    epsilon: float,
    dtype: Dtype,
) -> Float[Array, '*batch width']:
    """Return (x - mean) / sqrt(variance + epsilon) * scale + bias, computed in float32."""
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    if x.dtype == jnp.bfloat16:
        # E[x²] - E[x]² needs one pass over x. Its cancellation error is far below what rounding to
        # bfloat16 has already taken from x.
        variance = jnp.square(x32).mean(-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)
    else:
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (x32 - mean) * inverse * _to_last_axis(scale, x.ndim) + _to_last_axis(bias, x.ndim)
    return y.astype(dtype), (x, mean[..., 0], inverse[..., 0], scale)


def _layer_norm_backward(epsilon: float, dtype: Dtype, saved: tuple[Array, ...], g: Array):
    x, mean, inverse, scale = saved
    y = (x.astype(jnp.float32) - mean[..., None]) * inverse[..., None]
    g = g.astype(jnp.float32)
    batch = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * y).sum(batch), g.sum(batch)
    g = g * _to_last_axis(scale, x.ndim)
    dx = g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True)
    return (dx * inverse[..., None]).astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, '*batch width'], scale: Float[Array, ' width'], epsilon: float, dtype: Dtype
) -> Float[Array, '*batch width']:
    """Return x / sqrt(mean(x²) + epsilon) * scale, computed in float32."""
    return _rms_norm_forward(x, scale, epsilon, dtype)[0]


def _rms_norm_forward(x: Array, scale: Array, epsilon: float, dtype: Dtype):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon)
    return (x32 * inverse * _to_last_axis(scale, x.ndim)).astype(dtype), (x, inverse[..., 0], scale)


def _rms_norm_backward(epsilon: float, dtype: Dtype, saved: tuple[Array, ...], g: Array):
    x, inverse, scale = saved
    y = x.astype(jnp.float32) * inverse[..., None]
    g = g.astype(jnp.float32)
    d_scale = (g * y).sum(tuple(range(x.ndim - 1)))
    g = g * _to_last_axis(scale, x.ndim)
    dx = (g - y * (g * y).mean(-1, keepdims=True)) * inverse[..., None]
    return dx.astype(x.dtype), d_scale


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    query: Float[Array, 'batch queries heads features'],
    key: Float[Array, 'batch keys heads features'],
    value: Float[Array, 'batch keys heads features'],
    packed: int = 1,
) -> Float[Array, 'batch queries heads features']:
    """Return softmax(query · key / sqrt(features)) · value, with float32 logits and softmax.

    A row is `packed` sequences of equal length, each of which attends to itself alone.

    Only two arrays of size queries x keys are ever written to memory, both in the type of the
    operands: the exponentials here, which are normalised after their product with the values, and
    the gradient of the logits in the backward pass.
    """
    return _attend_forward(query, key, value, packed)[0]


def _logits(query: Array, key: Array) -> Float[Array, 'batch heads keys queries']:
    # With queries last, TPUs reduce over keys without crossing lanes, and the compiler fuses
    # maximum, exponential and sum into this product.
    return jnp.einsum('bqhd,bkhd->bhkq', query, key, preferred_element_type=jnp.float32)


def _per_query(x: Float[Array, 'batch heads queries']) -> Float[Array, 'batch queries heads 1']:
    return jnp.swapaxes(x, 1, 2)[..., None]


def _attend_forward(query: Array, key: Array, value: Array, packed: int):
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    logits = _logits(query, key)
    if packed > 1:
        sequence = jnp.arange(logits.shape[-1]) * packed // logits.shape[-1]
        together = sequence.reshape(1, 1, -1, 1) == sequence.reshape(1, 1, 1, -1)
        logits = jnp.where(together, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(2, keepdims=True))
    total = weights.sum(2)
    weights = weights.astype(value.dtype)
    mixed = jnp.einsum('bhkq,bkhd->bqhd', weights, value, preferred_element_type=jnp.float32)
    mixed = (mixed / _per_query(total)).astype(value.dtype)
    return mixed, (query, key, value, weights, total, mixed)


def _attend_backward(packed: int, saved: tuple[Array, ...], g: Array):
    query, key, value, weights, total, mixed = saved
    g = (g / _per_query(total)).astype(g.dtype)
    d_value = jnp.einsum('bhkq,bqhd->bkhd', weights, g)
    # Mean of the weights' gradient per query, computed from the output (arXiv 2205.14135).
    mean = (g.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    d_logits = weights.astype(jnp.float32) * (_logits(g, value) - mean[:, :, None])
    d_logits = d_logits.astype(query.dtype)
    d_query = jnp.einsum('bhkq,bkhd->bqhd', d_logits, key)
    d_query = d_query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    return d_query, jnp.einsum('bhkq,bqhd->bkhd', d_logits, query), d_value


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """Apply the tanh approximation of GELU (arXiv 1606.08415)."""
    return nn.gelu(x)


def _gelu_backward(x: Array, g: Array):
    root, cubic, x32 = (2 / jnp.pi) ** 0.5, 0.044715, x.astype(jnp.float32)
    tanh = jnp.tanh(root * (x32 + cubic * x32**3))
    slope = 0.5 * x32 * (1 - tanh**2) * root * (1 + 3 * cubic * x32**2)
    return ((g * (0.5 * (1 + tanh) + slope)).astype(x.dtype),)


gelu.defvjp(lambda x: (nn.gelu(x), x), _gelu_backward)


def exact_gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """Apply GELU with the error function (arXiv 1606.08415)."""
    return _rounded_gelu(x) if x.dtype == jnp.bfloat16 else jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def _rounded_gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """The same in float32, of what is rounded before and after.

    By the error function, which is half the work of its complement; that is more precise where
    results are next to 0, but not after rounding.
    """
    return _rounded_gelu_forward(x)[0]


def _rounded_gelu_forward(x: Array) -> tuple[Array, Array]:
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype), x


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def _rounded_gelu_backward(x: Array, g: Array):
    x32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x32 * x32) * (2 * jnp.pi) ** -0.5
    return ((g * (_normal_cdf(x32) + x32 * density)).astype(x.dtype),)


_rounded_gelu.defvjp(_rounded_gelu_forward, _rounded_gelu_backward)


def quick_gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """Apply x * sigmoid(1.702 x), CLIP's approximation of GELU (arXiv 1606.08415)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'gelu_tanh': gelu,
    'gelu': exact_gelu,
    'quick_gelu': quick_gelu,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


def rotate(
    x: Float[Array, 'batch tokens heads features'], rotation: tuple[Array, Array]
) -> Float[Array, 'batch tokens heads features']:
    """Rotate each pair of features (i, i + features/2) by its token's angle (arXiv 2104.09864)."""
    sin, cos = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = x.astype(jnp.float32) * cos + jnp.concatenate([-second, first], -1) * sin
    return rotated.astype(x.dtype)


def attention_weights(
    query: Float[Array, 'batch queries heads features'],
    key: Float[Array, 'batch keys heads features'],
    bias: Float[Array, '1 heads queries keys'] | None = None,
    mask: Bool[Array, '#batch 1 #queries keys'] | None = None,
) -> Float[Array, 'batch heads queries keys']:
    """Return attention probabilities in float32, for inspection only: they are not fused."""
    logits = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


class Attention(nn.Module):
    """Multi-head attention of `x` to `memory`, by default to itself (arXiv 1706.03762).

    Returns (output, weights [batch, heads, queries, keys]); weights are None without `capture`.

    Attributes:
      relative: rows of the relative bias table; 0 for none.
      packed: sequences that a row consists of, see `attend`.
    """

    num_heads: int
    style: Style = PLAIN
    relative: int = 0
    capture: bool = False
    packed: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch queries width'],
        memory: Float[Array, 'batch keys width'] | None = None,
        context: AttentionContext = NO_CONTEXT,
    ) -> tuple[Float[Array, 'batch queries width'], Float[Array, '...'] | None]:
        style, self_attention = self.style, memory is None
        memory = x if memory is None else memory
        width = x.shape[-1]
        heads = (self.num_heads, style.head_dim or width // self.num_heads)
        dense = partial(Dense, dtype=style.dtype, gather=style.gather, lora=style.lora)
        projection = partial(dense, heads, kernel_init=style.laws.qkv)
        query_or_value = partial(projection, use_bias=style.qkv_bias)
        x = _moved(x, context.positions)
        keyed = x if self_attention else _moved(memory, context.memory_positions)
        query = checkpoint_name(query_or_value(name='query')(x), 'qkv')
        key_bias = style.qkv_bias and style.key_bias
        key = checkpoint_name(projection(use_bias=key_bias, name='key')(keyed), 'qkv')
        value = checkpoint_name(query_or_value(name='value')(memory), 'qkv')
        if style.qk_norm:
            query, key = norm(style, 'query_norm')(query), norm(style, 'key_norm')(key)
        if context.rotation is not None:
            query, key = rotate(query, context.rotation), rotate(key, context.rotation)
        mask, bias = context.mask, None
        if style.lsa and self_attention:
            root = heads[1] ** 0.5
            start = nn.initializers.constant(1 / root)
            scale = jnp.asarray(self.param('temperature', start, heads[:1]))
            query = query * (scale * root).astype(query.dtype).reshape(1, 1, -1, 1)
            others = ~jnp.eye(x.shape[1], dtype=bool)[None, None]
            mask = others if mask is None else mask & others
        if self.relative:
            assert context.relative is not None
            table = self.param('relative', nn.initializers.zeros, (self.relative, heads[0]))
            bias = jnp.asarray(table)[context.relative].transpose(2, 0, 1)[None]
        if style.attention == 'fused' and mask is None and bias is None:
            mixed = attend(query, key, value, self.packed)
        else:
            mixed = jax.nn.dot_product_attention(
                query,
                key,
                value,
                bias=None if bias is None else bias.astype(query.dtype),
                mask=mask,
                implementation='cudnn' if style.attention == 'cudnn' else 'xla',
            )
        mixed = checkpoint_name(mixed, 'mixed')
        weights = attention_weights(query, key, bias, mask) if self.capture else None
        return dense((width,), in_axes=2, name='out')(mixed), weights


def _moved(
    x: Float[Array, 'batch tokens width'], positions: Float[Array, '#batch tokens width'] | None
) -> Float[Array, 'batch tokens width']:
    return x if positions is None else x + positions.astype(x.dtype)


class Mlp(nn.Module):
    """Dense, activation, Dense; if gated, Dense(silu(Dense) * Dense)."""

    hidden: int
    style: Style = PLAIN

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], deterministic: bool = True
    ) -> Float[Array, 'batch tokens width']:
        style = self.style
        dense = partial(
            Dense, bias_init=style.laws.mlp_bias, dtype=style.dtype, gather=style.gather
        )
        hidden = checkpoint_name(dense((self.hidden,), name='Dense_0')(x), 'hidden')
        if style.mlp == 'swiglu':
            gate = checkpoint_name(dense((self.hidden,), name='Dense_gate')(x), 'hidden')
            hidden = jax.nn.silu(gate) * hidden
        else:
            hidden = ACTIVATIONS[style.activation](hidden)
        hidden = nn.Dropout(style.dropout)(hidden, deterministic)
        return dense((x.shape[-1],), name='Dense_1')(hidden)
