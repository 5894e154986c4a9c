"""The published sizes by name, and what a model costs, from its sizes alone."""

import difflib
import re

from big_vit.errors import UserError

# name: (width, depth, mlp_dim, num_heads)
SIZES: dict[str, tuple[int, int, int, int]] = {
    'mu': (32, 1, 128, 2),  # for tests
    'Ti': (192, 12, 768, 3),  # DeiT, arXiv 2012.12877
    'S': (384, 12, 1536, 6),  # DeiT
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
    """'S/16' or 'S/16x8' (patch height x width) as the fields of a `ViT`.

    Raises:
      UserError: an unknown size or a malformed patch.
    """
    match = re.fullmatch(r'([\w-]+)/(\d+)(?:x(\d+))?', variant)
    if not match:
        raise UserError(f"config: model.variant must look like 'S/16' or 'S/16x8', got {variant!r}")
    size, height, width = match[1], int(match[2]), int(match[3] or match[2])
    if size not in SIZES:
        near = difflib.get_close_matches(size, SIZES, n=1, cutoff=0.3)
        hint = f'did you mean {near[0]}? ' if near else ''
        raise UserError(
            f'config: model.variant {variant!r}: unknown size {size!r}; {hint}'
            f'the sizes are {", ".join(SIZES)}'
        )
    if not (height and width):
        raise UserError(f'config: model.variant {variant!r}: a patch must have at least one pixel')
    names = ('width', 'depth', 'mlp_dim', 'num_heads')
    return dict(zip(names, SIZES[size], strict=True), patch_size=(height, width))


def count_params(
    *,
    image: tuple[int, int, int],
    num_classes: int,
    patch_size: tuple[int, int],
    width: int,
    depth: int,
    mlp_dim: int,
    posemb: str = 'sincos2d',
    pool: str = 'gap',
) -> int:
    """Number of parameters of a `ViT` for images of (height, width, channels)."""
    height, columns, channels = image
    tokens = (height // patch_size[0]) * (columns // patch_size[1])
    norm = 2 * width
    attention = 4 * (width * width + width)
    mlp = 2 * width * mlp_dim + mlp_dim + width
    total = patch_size[0] * patch_size[1] * channels * width + width
    total += depth * (2 * norm + attention + mlp) + norm
    total += tokens * width if posemb == 'learned' else 0
    total += {'gap': 0, 'cls': width, 'map': width + attention + norm + mlp}[pool]
    return total + width * num_classes + num_classes


def forward_flops(
    *,
    image: tuple[int, int, int],
    num_classes: int,
    patch_size: tuple[int, int],
    width: int,
    depth: int,
    mlp_dim: int,
    pool: str = 'gap',
) -> int:
    """Floating-point operations of the matrix products for one image, forward.

    A multiply-add counts as two. A training step takes three times as many;
    what rematerialisation computes again does not count (arXiv 2204.02311, MFU).
    """
    height, columns, channels = image
    patches = (height // patch_size[0]) * (columns // patch_size[1])
    tokens = patches + (pool == 'cls')
    embedding = 2 * patches * patch_size[0] * patch_size[1] * channels * width
    block = 2 * tokens * (4 * width**2 + 2 * width * mlp_dim) + 4 * tokens**2 * width
    head = 2 * width * num_classes
    if pool == 'map':
        head += 2 * (2 * tokens + 2) * width**2 + 4 * tokens * width + 4 * width * mlp_dim
    return embedding + depth * block + head
