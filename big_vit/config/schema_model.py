"""Keys of `model` and `streams`."""

from big_vit.config.fields import (
    Field,
    below_one,
    boolean,
    check_text,
    choice,
    integer,
    number,
    size,
)
from big_vit.config.registries import TOKENIZERS

MODEL: dict[str, Field] = {
    'model.variant': Field(check_text, None, "Size and patch, as in 'S/16' or 'B/16x8'."),
    'model.width': Field(integer(1), None, "Overrides the variant's width."),
    'model.depth': Field(integer(1), None, "Overrides the variant's number of blocks."),
    'model.mlp_dim': Field(integer(1), None, "Overrides the variant's hidden width of the MLP."),
    'model.num_heads': Field(integer(1), None, "Overrides the variant's number of heads."),
    'model.head_dim': Field(integer(1), None, 'Width of one head; by default width / num_heads.'),
    'model.tokenizer': Field(
        TOKENIZERS.name,
        'patches',
        'How inputs become tokens; docs/models.md has them. A hybrid such as R50+B/16 has resnet.',
    ),
    'model.stride': Field(size, None, 'Pixels from one patch to the next, if they overlap.'),
    'model.tubelet': Field(integer(1), 2, 'Frames of a tubelet.'),
    'model.vocab': Field(integer(1), 259, 'Words; 259 is what byte_tokens gives.'),
    'model.embedding_bias': Field(boolean, True, 'Whether the patch projection has a bias.'),
    'model.posemb': Field(
        choice('sincos2d', 'sincos2d_mae', 'learned', 'rope', 'relative', 'none'),
        'sincos2d',
        'Position embeddings.',
    ),
    'model.posemb_prefix': Field(
        integer(0), 0, 'Prefix tokens (class, registers) with a learned position of their own.'
    ),
    'model.posemb_grid': Field(size, (16, 16), "Rows and columns of the table of 'ragged'."),
    'model.rope_theta': Field(number(1), 100.0, 'Ratio of the fastest to the slowest rate.'),
    'model.class_token': Field(boolean, False, 'A class token though pool does not need it.'),
    'model.registers': Field(integer(0), 0, 'Learned tokens that nothing is read from.'),
    'model.pool': Field(
        choice('gap', 'cls', 'map', 'seq', 'cls_gap', 'cls_dist'),
        'gap',
        'How tokens become one vector.',
    ),
    'model.norm': Field(choice('layernorm', 'rmsnorm'), 'layernorm', 'Kind of norm.'),
    'model.norm_eps': Field(number(0, 1), 1e-6, 'Added to the variance that a norm divides by.'),
    'model.pre_norm': Field(boolean, False, 'A norm before the first block (CLIP).'),
    'model.norm_after_pool': Field(boolean, False, 'The last norm after pooling, not before.'),
    'model.activation': Field(
        choice('gelu_tanh', 'gelu', 'quick_gelu', 'relu', 'silu'),
        'gelu_tanh',
        'Of the MLP; gelu is with the error function.',
    ),
    'model.mlp': Field(choice('mlp', 'swiglu'), 'mlp', 'Two dense layers, or three with a gate.'),
    'model.qkv_bias': Field(boolean, True, 'Whether queries, keys and values have a bias.'),
    'model.key_bias': Field(boolean, True, 'Whether keys have one, where the others do.'),
    'model.qk_norm': Field(boolean, False, 'Normalise queries and keys of each head.'),
    'model.lsa': Field(boolean, False, 'Attend to all but oneself, at a learned temperature.'),
    'model.lora': Field(
        integer(0), 0, "Rank of trained corrections of attention's kernels; 0 has none."
    ),
    'model.attention': Field(
        choice('fused', 'xla', 'cudnn'), 'fused', 'Which implementation computes attention.'
    ),
    'model.parallel': Field(boolean, False, 'Attention and MLP side by side (ViT-22B).'),
    'model.layer_scale': Field(
        number(0, 1), 0.0, 'What learned factors on the branches begin with; 0 has none.'
    ),
    'model.drop_path': Field(
        below_one, 0.0, 'Rate at which the last block is left out; earlier ones less.'
    ),
    'model.patch_dropout': Field(below_one, 0.0, 'Share of tokens left out in training.'),
    'model.representation': Field(
        integer(0), 0, 'Width of a dense layer with tanh before the head; 0 has none.'
    ),
    'model.head_bias': Field(boolean, True, 'Whether the head has a bias.'),
    'model.fusion': Field(
        choice('concat', 'cross', 'latents'),
        'concat',
        'How several streams meet: in one sequence, by cross-attention, or in latents.',
    ),
    'model.queries': Field(check_text, None, "The stream that attends to the others ('cross')."),
    'model.latents': Field(integer(1), 64, "Learned vectors that attend to all ('latents')."),
    'streams.*.tokenizer': Field(
        TOKENIZERS.name,
        'patches',
        'As model.tokenizer, of one of several inputs.',
    ),
    'streams.*.part': Field(
        check_text, None, 'Part of a batch that it reads; by default what the tokenizer takes.'
    ),
    'streams.*.patch': Field(size, None, "Pixels of its patches; by default the variant's."),
    'streams.*.stride': Field(size, None, 'Pixels from one patch to the next, if they overlap.'),
    'streams.*.tubelet': Field(integer(1), 2, 'Frames of a tubelet.'),
    'streams.*.vocab': Field(integer(1), 259, 'Words; 259 is what byte_tokens gives.'),
    'streams.*.posemb': Field(
        choice('sincos2d', 'sincos2d_mae', 'learned', 'rope', 'none'),
        'sincos2d',
        'Position embeddings.',
    ),
    'streams.*.depth': Field(integer(0), 0, 'Blocks of its own before it meets the others.'),
    'model.dropout': Field(number(0, 1), 0.0, 'Dropout rate of the residual branches.'),
    'model.dtype': Field(choice('bfloat16', 'float32'), 'bfloat16', 'Type to compute in.'),
    'model.scan': Field(boolean, True, 'Compile one block and scan it, or unroll all.'),
    'model.remat': Field(
        choice('none', 'names', 'full', 'offload'), 'none', 'What the backward pass recomputes.'
    ),
}
