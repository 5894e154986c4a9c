"""What a model costs, from its sizes alone: parameters, and operations of its matrix products.

A multiply-add counts as two. A training step takes three times as many as a forward pass; what
rematerialisation computes again does not count (arXiv 2204.02311, MFU), nor do borders of
convolutions, norms, activations and the softmax.
"""

import math
from typing import NamedTuple

from big_vit.models import positions, stems, tokenizers
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import ViT

# Shapes of the parts of a batch without the batch, or that of the one part.
Shapes = dict[str, tuple[int, ...]] | tuple[int, ...]


class Cost(NamedTuple):
    """Parameters, floating-point operations of one example forward, and tokens."""

    params: int = 0
    flops: int = 0
    tokens: int = 0

    def plus(self, params: int = 0, flops: int = 0) -> 'Cost':
        return Cost(self.params + params, self.flops + flops, self.tokens)

    def __add__(self, other: 'Cost') -> 'Cost':  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def count_params(net: ViT, shapes: Shapes) -> int:
    """Number of parameters for inputs of these shapes."""
    return cost(net, shapes).params


def forward_flops(net: ViT, shapes: Shapes) -> int:
    """Floating-point operations for one example, forward."""
    return cost(net, shapes).flops


def cost(net: ViT, shapes: Shapes) -> Cost:
    """Both, and the length of the encoder's sequence.

    Raises:
      ValueError: the input does not divide into patches.
    """
    parts = shapes if isinstance(shapes, dict) else {net.stream().reads: shapes}
    several = bool(net.streams)
    each = [_stream(net, stream, parts[stream.reads]) for stream in net.inputs()]
    total = Cost()
    for stream, own in zip(net.inputs(), each, strict=True):
        total += own.plus(params=net.width * several)
        if several and stream.depth:
            total += _encoder(net, stream.depth, own.tokens)
    if several and net.fusion == 'apart':
        return _apart(net, total, each)
    memory = 0
    if several and net.fusion == 'cross':
        memory = sum(own.tokens for own in each[1:])
        tokens = each[0].tokens
    elif several and net.fusion == 'latents':
        tokens, seen = net.latents, sum(own.tokens for own in each)
        total = total.plus(params=net.latents * net.width + 2 * _norm(net, net.width))
        total += _attention(net, tokens, seen)
    else:
        tokens = sum(own.tokens for own in each)
    prefix = net.prefix()
    total = total.plus(params=prefix * net.width)
    relative = 0
    if net.posemb == 'relative' and not several:
        grid = tokenizers.grid_of(net.stream(), parts[net.stream().reads])
        relative = positions.relative_rows(grid, prefix) * net.num_heads
    tokens += prefix
    total += _encoder(net, net.depth, tokens, memory)
    total = total.plus(params=net.depth * relative + net.pre_norm * _norm(net, net.width))
    if net.norm_after_pool:
        # The same parameters, of a vector as long as what is pooled.
        twice = 2 if net.pool == 'cls_gap' else 1
        total = total.plus(params=_norm(net, twice * net.width) - _norm(net, net.width))
    images = parts['images'][0] if 'images' in parts else 0
    total += _head(net, tokens, images)
    return total._replace(tokens=tokens)


def _apart(net: ViT, total: Cost, each: list[Cost]) -> Cost:
    """Of streams that go through the one encoder alone; not of what compares them."""
    total = total.plus(params=1 + (net.logit_bias is not None))
    for i, own in enumerate(each):
        encoder = _encoder(net, net.depth, own.tokens)
        encoder += _head(net, own.tokens, 0)
        # The parameters are there once.
        total += encoder._replace(params=encoder.params * (i == 0))
        total = total.plus((net.width + 1) * net.shared, 2 * net.width * net.shared)
    return total._replace(tokens=sum(own.tokens for own in each))


def _norm(net: ViT, width: int) -> int:
    return width if net.norm == 'rmsnorm' else 2 * width


def _stream(net: ViT, stream: Stream, shape: tuple[int, ...]) -> Cost:
    width, (ph, pw) = net.width, stream.patch_size
    grid = tokenizers.grid_of(stream, shape)
    tokens = math.prod(grid)
    context = 0
    if stream.posemb == 'learned':
        ragged = stream.tokenizer == 'ragged'
        context = math.prod(stream.posemb_grid) if ragged else stream.posemb_prefix + tokens
    found = Cost(context * width, 0, tokens)
    if stream.tokenizer == 'words':
        return found.plus(params=stream.vocab * width)
    channels = shape[-1]
    pixels = ph * pw * channels
    if stream.tokenizer == 'ragged':
        pixels = shape[-1]
    elif stream.tokenizer == 'tubelets':
        pixels *= stream.tubelet
    elif stream.tokenizer == 'spt':
        pixels *= 5
        found = found.plus(params=2 * pixels)
    elif stream.tokenizer != 'patches':
        stem, pixels = _stem(net, stream, shape)
        found += stem
        if stream.tokenizer == 'cct':
            return found
    kernel = pixels * width
    return found.plus(params=kernel + width * stream.embedding_bias, flops=2 * tokens * kernel)


def _stem(net: ViT, stream: Stream, shape: tuple[int, ...]) -> tuple[Cost, int]:
    """Of convolutions in front of the projection, and the pixels of what it projects."""
    height, width, channels = shape
    total = Cost()

    def conv(size: int, out: int, into: int, stride: int = 1, normed: bool = True) -> Cost:
        kernel = size * size * into * out
        pixels = -(-height // stride) * -(-width // stride)
        return Cost(kernel + 2 * out * normed, 2 * pixels * kernel)

    layers = round(math.log2(stream.patch_size[0]))
    if stream.tokenizer == 'cct':
        for i in range(layers):
            out = net.width if i == layers - 1 else stems.CCT_CHANNELS
            total += conv(3, out, channels, normed=False)
            channels, height, width = out, -(-height // 2), -(-width // 2)
        return total, channels
    if stream.tokenizer == 'conv':
        for i in range(layers):
            out = stems.conv_features(net.width, layers, i)
            total += conv(3, out, channels, stride=2)
            channels, height, width = out, -(-height // 2), -(-width // 2)
        return total, channels
    total += conv(7, 64, channels, stride=2)
    channels, height, width = 64, -(-height // 4), -(-width // 4)
    for i, units in enumerate(stream.resnet):
        inner = 64 * 2**i
        for unit in range(units):
            stride = 2 if i and not unit else 1
            total += conv(1, inner, channels)
            total += conv(3, inner, inner, stride)
            if channels != 4 * inner or stride > 1:
                total += conv(1, 4 * inner, channels, stride)
            height, width = -(-height // stride), -(-width // stride)
            total += conv(1, 4 * inner, inner)
            channels = 4 * inner
    ways = stems.resnet_stride(stream.resnet)
    left = math.prod(side // ways for side in stream.patch_size)
    return total, left * channels


def _attention(net: ViT, queries: int, keys: int, itself: bool = False) -> Cost:
    width = net.width
    head = net.head_dim or width // net.num_heads
    inner = net.num_heads * head
    biases = net.qkv_bias * (2 + net.key_bias) * inner + width
    params = 4 * width * inner + biases + net.qk_norm * 2 * _norm(net, head)
    params += itself * net.lsa * net.num_heads
    flops = 4 * (queries + keys) * width * inner + 4 * queries * keys * inner
    params += 4 * net.lora * (width + inner)
    flops += 4 * net.lora * (queries + keys) * (width + inner)
    return Cost(params, flops)


def _mlp(net: ViT, tokens: int) -> Cost:
    width, hidden, inward = net.width, net.mlp_dim, 1 + (net.mlp == 'swiglu')
    params = inward * (width * hidden + hidden) + hidden * width + width
    return Cost(params, 2 * tokens * width * hidden * (inward + 1))


def _encoder(net: ViT, depth: int, tokens: int, memory: int = 0) -> Cost:
    block = _attention(net, tokens, tokens, itself=True) + _mlp(net, tokens)
    norms, branches = 2 - net.parallel, 2
    if memory:
        block += _attention(net, tokens, memory)
        norms, branches = norms + 1, branches + 1
    scales = branches * net.width * (net.layer_scale > 0)
    block = block.plus(params=norms * _norm(net, net.width) + scales)
    return Cost(depth * block.params + _norm(net, net.width), depth * block.flops)


def _head(net: ViT, tokens: int, images: int) -> Cost:
    width, total = net.width, Cost()
    if net.pool == 'gap' and images:
        total = total.plus(flops=2 * images * tokens * width)
    images = max(images, 1)
    if net.pool == 'map':
        pool = _attention(net, images, tokens) + _mlp(net, images)
        total += pool.plus(params=width + _norm(net, width))
    elif net.pool == 'seq':
        patches = tokens - net.prefix()
        total = total.plus(params=width, flops=4 * patches * width)
    features = 2 * width if net.pool == 'cls_gap' else width
    if net.representation:
        kernel = features * net.representation
        total = total.plus(kernel + net.representation, 2 * images * kernel)
        features = net.representation
    heads = 2 if net.pool == 'cls_dist' else 1
    kernel = heads * features * net.num_classes
    bias = heads * net.num_classes * net.head_bias
    return total.plus(kernel + bias, 2 * images * kernel)
