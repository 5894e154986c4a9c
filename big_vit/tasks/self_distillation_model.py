"""The module of self-distillation: a trunk, heads of views and patches, and a mask token."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from big_vit.errors import UserError
from big_vit.models.prototype_head import PrototypeHead, similarity
from big_vit.models.tokenizers import EmbeddingContext, grid_of
from big_vit.models.vit import ViT
from big_vit.tasks import block_masks, gram
from big_vit.tasks.batch import normalise
from big_vit.tasks.task import ExampleShape


class SelfDistillation(nn.Module):
    """A trunk, whose parameters stay at the root, with heads and a mask token beside it.

    Attributes:
      dino_head: of pooled features.
      ibot_head: of patches; None where they have the other head, or none.
      patches: whether it learns of patches.
      hides: whether patches of which it learns are hidden.
      views: large views of an example.
      grid: that of large views, which has the learned positions.
      offset: see `positions.resize_matrix`.
    """

    trunk: ViT
    dino_head: PrototypeHead
    ibot_head: PrototypeHead | None
    patches: bool
    hides: bool
    views: int
    grid: tuple[int, int]
    offset: float = 0.0

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens of a large view in the encoder."""
        return self.trunk.sequence_length(shapes)

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)
        if self.hides:
            shape = (1, 1, self.trunk.encoder.width)
            self.mask_token = self.param('mask_token', nn.initializers.zeros, shape)

    def __call__(self, inputs: dict[str, Array]) -> Float[Array, 'batch views prototypes']:
        """Logits of large views; for what parameters there are."""
        views = inputs['global']
        hidden = jnp.zeros((*views.shape[:2], self.grid[0] * self.grid[1]), bool)
        pooled, patches = self.features(views, hidden if self.hides else None)
        if self.ibot_head is not None:
            self.ibot_head(patches)
        return self.dino_head(pooled)

    def features(
        self,
        views: Float[Array, 'batch views y x channels'] | UInt[Array, 'batch views y x channels'],
        hidden: Bool[Array, 'batch views patches'] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, 'batch views features'], Float[Array, 'batch views patches width']]:
        """Pooled features of each view in float32, and its patches after the last norm."""
        batch, count = views.shape[:2]
        images = normalise(views).reshape(batch * count, *views.shape[2:])
        token = self.mask_token if hidden is not None else None
        hidden = None if hidden is None else hidden.reshape(batch * count, -1)
        context = EmbeddingContext(hidden, token, self.grid, self.offset)
        tokens, attention = self.trunk.embed(images, train=train, context=context)
        x, _ = self.trunk.encode(tokens, attention, train=train)
        pooled, patches = self.trunk.pool(x, tokens), x[:, self.trunk.prefix_tokens :]
        return (
            pooled.reshape(batch, count, -1),
            patches.reshape(batch, count, *patches.shape[1:]),
        )

    def anchors(
        self,
        views: Float[Array, 'batch views y x channels'] | UInt[Array, 'batch views y x channels'],
    ) -> Float[Array, 'batch views patches width']:
        """Patches after the last norm, resized to the grid of large views from that of these."""
        stream = self.trunk.single
        assert stream is not None
        grid, (_, patches) = grid_of(stream, views.shape[2:]), self.features(views)
        flat = patches.reshape(-1, *patches.shape[2:])
        fitting = gram.resized(flat, grid, self.grid)
        return fitting.reshape(*patches.shape[:2], *fitting.shape[1:])

    def rows(
        self,
        pooled: Float[Array, 'batch views features'],
        patches: Float[Array, 'batch slots width'] | None,
    ) -> dict[str, Array]:
        """Bottleneck rows of views ('dino') and patches ('ibot'), of length 1 in float32."""
        found = {'dino': self.dino_head.project(pooled)}
        if patches is not None:
            head = self.ibot_head or self.dino_head
            found['ibot'] = head.project(patches)
        return found

    def vectors(self, kind: str) -> Float[Array, 'bottleneck prototypes']:
        """The prototypes of views ('dino') or patches ('ibot')."""
        head = self.ibot_head if kind == 'ibot' else self.dino_head
        return (head or self.dino_head).vectors()

    def teacher(
        self, views: Array, index: Int[Array, 'blocks places'] | None, mean: bool = False
    ) -> dict[str, Array]:
        """Rows of whole large views, and of those of their patches that are hidden.

        Args:
          mean: also the mean row of all patches of each example ('all').
        """
        pooled, patches = self.features(views)
        hidden = None if index is None else block_masks.selected(patches, index)
        found = self.rows(pooled, hidden)
        if mean:
            project = (self.ibot_head or self.dino_head).project
            found['all'] = project(patches).mean((1, 2))[:, None]
        return found

    def student(
        self,
        inputs: dict[str, Array],
        hidden: Bool[Array, 'batch views patches'] | None,
        index: Int[Array, 'blocks places'] | None,
        train: bool,
    ) -> dict[str, Array]:
        """Logits of all views ('dino') and hidden patches ('ibot'); features of large views."""
        pooled, patches = self.features(inputs['global'], hidden if self.hides else None, train)
        found = {'pooled': pooled, 'patches': patches}
        if 'local' in inputs:
            small, _ = self.features(inputs['local'], train=train)
            pooled = jnp.concatenate([pooled, small], axis=1)
        rows = self.rows(pooled, None if index is None else block_masks.selected(patches, index))
        return found | {kind: similarity(x, self.vectors(kind)) for kind, x in rows.items()}


def check_trunk(trunk: ViT) -> None:
    """Refuses trunks that self-distillation cannot be done with."""
    name, stream, head = "task.name='self_distillation'", trunk.single, trunk.head
    if stream is None or stream.reads != 'image' or stream.tokenizer == 'ragged':
        raise UserError(f'config: {name} learns from views of one image: leave out streams')
    if stream.posemb == 'relative':
        raise UserError(
            f"config: model.posemb='relative' has a table for one size, and {name} sees views of "
            "two: take 'learned', 'rope' or another"
        )
    if head.pool == 'cls_dist' or head.norm_after_pool or head.representation:
        raise UserError(
            f'config: {name} learns from normalised tokens and one vector of them: set model.pool '
            "to 'cls', 'gap', 'cls_gap', 'map' or 'seq', without model.norm_after_pool and "
            'model.representation'
        )
    if trunk.prefix.patch_dropout:
        raise UserError(
            f'config: {name} hides patches itself: set task.mask_ratios and no model.patch_dropout'
        )


def check_views(trunk: ViT, example: ExampleShape) -> tuple[int, int]:
    """Refuses views that do not fit together; the grid of large ones."""
    stream, shapes, grids = trunk.single, example.inputs, {}
    assert stream is not None
    for group in ('global', 'local', 'gram'):
        if group in shapes:
            try:
                grids[group] = grid_of(stream, shapes[group][1:])
            except ValueError as error:
                raise UserError(f'config: data.transform: views of {group!r}: {error}') from None
    large, small, finer = shapes['global'], shapes.get('local'), shapes.get('gram')
    if small is None and large[0] < 2:
        raise UserError(
            'config: data.transform gives one view, but a student learns from other views than '
            "its own: write 'global: 2 * ...', or add 'local: ...'"
        )
    if small is not None and any(a > b for a, b in zip(small[1:3], large[1:3], strict=True)):
        shown = ['x'.join(map(str, shape[1:3])) for shape in (small, large)]
        raise UserError(
            f'config: data.transform: views of local, {shown[0]}, are larger than those of global, '
            f'{shown[1]}: swap them, or make them smaller'
        )
    if finer is not None and finer[0] != large[0]:
        raise UserError(
            f'config: data.transform gives {finer[0]} views of gram and {large[0]} of global: '
            "write one of gram for each, as in 'gram as global: ...'"
        )
    rows, columns = grids['global']
    return rows, columns
