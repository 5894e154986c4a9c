"""Published model sizes by name."""

import re

from big_vit.errors import UserError, nearest
from big_vit.models import stems

# name: (width, depth, mlp_dim, num_heads)
SIZES: dict[str, tuple[int, int, int, int]] = {
    'mu': (32, 1, 128, 2),  # for tests
    'Ti': (192, 12, 768, 3),  # DeiT, arXiv 2012.12877
    'S': (384, 12, 1536, 6),  # DeiT
    'DETR': (256, 6, 2048, 8),  # arXiv 2005.12872, behind a ResNet: R50+DETR/32
    'M': (512, 12, 2048, 8),
    'B': (768, 12, 3072, 12),  # ViT, arXiv 2010.11929
    'L': (1024, 24, 4096, 16),  # ViT
    'So400m': (1152, 27, 4304, 16),  # shape-optimised, arXiv 2305.13035
    'H': (1280, 32, 5120, 16),  # ViT
    'g': (1408, 40, 6144, 16),  # Scaling ViT, arXiv 2106.04560
    'g-opt': (1536, 40, 6144, 16),
    'G': (1664, 48, 8192, 16),  # Scaling ViT
    'G-opt': (1536, 48, 8192, 16),
    'e': (1792, 56, 15360, 16),  # PaLI, arXiv 2209.06794
    '22B': (6144, 48, 24576, 48),  # arXiv 2302.05442
}


def parse(variant: str) -> dict[str, object]:
    """Parse 'S/16', 'S/16x8' (patch height x width) or 'R50+B/16' (hybrid) into fields of `ViT`.

    Raises:
      UserError: the size is unknown or the patch is malformed.
    """
    match = re.fullmatch(r'(?:(R\d*)\+)?([\w-]+)/(\d{1,5})(?:x(\d{1,5}))?', variant)
    if not match:
        raise UserError(
            f"config: model.variant must look like 'S/16', 'S/16x8' or 'R50+B/16', got {variant!r}"
        )
    size, height, width = match[2], int(match[3]), int(match[4] or match[3])
    if size not in SIZES:
        near = nearest(size, SIZES, cutoff=0.3)
        hint = f'did you mean {near}? ' if near else ''
        raise UserError(
            f'config: model.variant {variant!r}: unknown size {size!r}; {hint}'
            f'the sizes are {", ".join(SIZES)}'
        )
    if not (height and width):
        raise UserError(f'config: model.variant {variant!r}: a patch must have at least one pixel')
    names = ('width', 'depth', 'mlp_dim', 'num_heads')
    fields = dict(zip(names, SIZES[size], strict=True), patch_size=(height, width))
    if match[1]:
        fields |= {'tokenizer': 'resnet', 'resnet': _resnet(variant, match[1], height, width)}
    return fields


def _resnet(variant: str, name: str, height: int, width: int) -> tuple[int, ...]:
    """Return the units of each stage of the deepest ResNet whose stride divides the patch."""
    if name not in stems.RESNETS:
        raise UserError(
            f'config: model.variant {variant!r}: unknown ResNet {name!r}; there are '
            f'{", ".join(stems.RESNETS)}'
        )
    choices = stems.RESNETS[name]
    for layers in choices:
        stride = stems.resnet_stride(layers)
        if height % stride == 0 and width % stride == 0:
            return layers
    strides = ' or '.join(str(stems.resnet_stride(layers)) for layers in choices)
    raise UserError(
        f'config: model.variant {variant!r}: {name} shrinks images by {strides}, so the patch '
        'must be a multiple of that'
    )
