"""What several tasks cannot have in a trunk, refused before anything is made."""

from big_vit.errors import UserError
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import ViT


def need_simple_pool(trunk: ViT, task: str) -> None:
    """Raise UserError for a pooling with parameters, which this task would not train."""
    head = trunk.head
    if head.pool not in ('gap', 'cls', 'cls_gap') or head.norm_after_pool or head.representation:
        raise UserError(
            f"config: task.name={task!r} trains no pooling: set model.pool to 'gap', 'cls' or "
            "'cls_gap', without model.norm_after_pool and model.representation"
        )


def need_all_patches(trunk: ViT, task: str) -> None:
    """Raise UserError for a model that leaves out patches in training."""
    if trunk.prefix.patch_dropout:
        raise UserError(f'config: task.name={task!r} needs all patches: set no model.patch_dropout')


def need_fixed_rotations(stream: Stream, instead: str) -> None:
    """Raise UserError for rotary positions that vary, beside queries in the sequence of patches.

    Args:
      instead: the setting with which queries are elsewhere.
    """
    if any((stream.rope_shift, stream.rope_jitter, stream.rope_rescale)):
        raise UserError(
            'config: model.rope_shift, rope_jitter and rope_rescale turn all tokens, and those of '
            f'queries have no place: leave them out, or set {instead}'
        )
