"""Schema of `model` and `streams`."""

from big_vit.config.fields import (
    DEEPEST,
    WIDEST,
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
    'model.variant': Field(
        check_text, None, "Model size and patch size, as in 'S/16' or 'B/16x8'."
    ),
    'model.width': Field(
        integer(1, WIDEST), None, 'Width of the residual stream; overrides the variant.'
    ),
    'model.depth': Field(integer(1, DEEPEST), None, 'Number of blocks; overrides the variant.'),
    'model.mlp_dim': Field(
        integer(1, 2**20), None, 'Hidden width of the MLPs; overrides the variant.'
    ),
    'model.num_heads': Field(
        integer(1, WIDEST), None, 'Number of attention heads; overrides the variant.'
    ),
    'model.head_dim': Field(
        integer(1, WIDEST), None, 'Width of an attention head; width / num_heads by default.'
    ),
    'model.tokenizer': Field(
        TOKENIZERS.name,
        'patches',
        'How inputs become tokens; see docs/models.md. Hybrids such as R50+B/16 use resnet.',
    ),
    'model.stride': Field(
        size, None, 'Pixels from one patch to the next, for overlapping patches.'
    ),
    'model.tubelet': Field(integer(1, 1024), 2, 'Frames per tubelet.'),
    'model.vocab': Field(integer(1, 2**24), 259, 'Vocabulary size; 259 is that of byte_tokens.'),
    'model.embedding_bias': Field(boolean, True, 'Use a bias in the patch embedding.'),
    'model.posemb': Field(
        choice(
            *('sincos2d', 'sincos2d_mae', 'sincos2d_detr', 'learned', 'rope', 'relative', 'none')
        ),
        'sincos2d',
        'Type of position embeddings.',
    ),
    'model.posemb_per_block': Field(
        boolean,
        False,
        'Add positions to queries and keys of each block, as in DETR, and not once to the tokens.',
    ),
    'model.posemb_prefix': Field(
        integer(0, 4097),
        0,
        'Number of prefix tokens (class token, registers) with a learned position of their own.',
    ),
    'model.posemb_grid': Field(
        size, (16, 16), "Rows and columns of the position table of the 'ragged' tokenizer."
    ),
    'model.rope_theta': Field(
        number(1), 100.0, 'Ratio of the highest to the lowest rotary frequency.'
    ),
    'model.rope_shift': Field(
        number(0, 10),
        None,
        'Most by which rotary positions, from -1 to 1, are shifted along each axis in training.',
    ),
    'model.rope_jitter': Field(
        number(1, 100),
        None,
        'Greatest factor, as its inverse, on them along each axis in training.',
    ),
    'model.rope_rescale': Field(
        number(1, 100), None, 'Greatest factor, as its inverse, on all of them in training.'
    ),
    'model.class_token': Field(boolean, False, 'Add a class token even if `pool` needs none.'),
    'model.registers': Field(
        integer(0, 4096), 0, 'Number of register tokens: learned, and ignored at the output.'
    ),
    'model.pool': Field(
        choice('gap', 'cls', 'map', 'seq', 'cls_gap', 'cls_dist'),
        'gap',
        'How the final tokens are pooled into one vector.',
    ),
    'model.norm': Field(choice('layernorm', 'rmsnorm'), 'layernorm', 'Type of normalization.'),
    'model.norm_eps': Field(number(1e-38, 1), 1e-6, 'Added to the variance in normalization.'),
    'model.pre_norm': Field(boolean, False, 'Normalize before the first block, as in CLIP.'),
    'model.norm_after_pool': Field(
        boolean, False, 'Apply the last norm after pooling instead of before.'
    ),
    'model.post_norm': Field(
        boolean, False, 'Blocks normalize their sums, as in DETR, and not what branches read.'
    ),
    'model.activation': Field(
        choice('gelu_tanh', 'gelu', 'quick_gelu', 'relu', 'silu'),
        'gelu_tanh',
        'Activation of the MLPs; gelu is the exact form, with the error function.',
    ),
    'model.mlp': Field(
        choice('mlp', 'swiglu'), 'mlp', 'Type of MLP: two dense layers, or three with a gate.'
    ),
    'model.qkv_bias': Field(boolean, True, 'Use biases for queries, keys and values.'),
    'model.key_bias': Field(boolean, True, 'Use a bias for keys too, if `qkv_bias` is on.'),
    'model.qk_norm': Field(boolean, False, 'Normalize the queries and keys of each head.'),
    'model.lsa': Field(
        boolean,
        False,
        'Locality self-attention: tokens do not attend to themselves, and the temperature is '
        'learned.',
    ),
    'model.lora': Field(
        integer(0, WIDEST),
        0,
        'Rank of trainable low-rank corrections to attention kernels; 0 is off.',
    ),
    'model.attention': Field(
        choice('fused', 'xla', 'cudnn'), 'fused', 'Implementation of attention.'
    ),
    'model.parallel': Field(
        boolean, False, 'Run attention and MLP of a block in parallel, as in ViT-22B.'
    ),
    'model.layer_scale': Field(
        number(0, 1), 0.0, 'Initial value of learned scales on the residual branches; 0 is off.'
    ),
    'model.drop_path': Field(
        below_one,
        0.0,
        'Stochastic depth: rate at which the last block is dropped, lower for earlier ones.',
    ),
    'model.patch_dropout': Field(below_one, 0.0, 'Share of tokens dropped in training.'),
    'model.representation': Field(
        integer(0, WIDEST), 0, 'Width of a dense tanh layer before the head; 0 is off.'
    ),
    'model.head_bias': Field(boolean, True, 'Use a bias in the head.'),
    'model.fusion': Field(
        choice('concat', 'cross', 'latents'),
        'concat',
        'How several streams meet: in one sequence, by cross-attention, or in latents.',
    ),
    'model.queries': Field(
        check_text, None, 'Stream whose tokens attend to the others, with cross-attention fusion.'
    ),
    'model.latents': Field(
        integer(1, WIDEST),
        64,
        'Number of learned latents that attend to all tokens, with latent fusion.',
    ),
    'streams.*.tokenizer': Field(
        TOKENIZERS.name,
        'patches',
        'How inputs of this stream become tokens, as model.tokenizer.',
    ),
    'streams.*.part': Field(
        check_text, None, "Part of the batch to read; by default that of the tokenizer's kind."
    ),
    'streams.*.patch': Field(
        size, None, "Patch size of this stream in pixels; the variant's by default."
    ),
    'streams.*.stride': Field(
        size, None, 'Pixels from one patch to the next, for overlapping patches.'
    ),
    'streams.*.tubelet': Field(integer(1, 1024), 2, 'Frames per tubelet.'),
    'streams.*.vocab': Field(
        integer(1, 2**24), 259, 'Vocabulary size; 259 is that of byte_tokens.'
    ),
    'streams.*.posemb': Field(
        choice('sincos2d', 'sincos2d_mae', 'learned', 'rope', 'none'),
        'sincos2d',
        'Type of position embeddings.',
    ),
    'streams.*.depth': Field(
        integer(0, DEEPEST), 0, 'Number of blocks of this stream alone, before it meets the others.'
    ),
    'model.dropout': Field(below_one, 0.0, 'Dropout rate in the residual branches.'),
    'model.weight_init': Field(
        choice('vit', 'mae', 'detr'),
        None,
        "Law of initial values: that of big_vision ('vit'), or of MAE's or DETR's code.",
    ),
    'model.dtype': Field(choice('bfloat16', 'float32'), 'bfloat16', 'Computation type.'),
    'model.scan': Field(
        boolean, True, 'Compile one block and scan over layers, instead of unrolling them.'
    ),
    'model.remat': Field(
        choice('none', 'names', 'full', 'offload'),
        'none',
        'What the backward pass recomputes (rematerialization) or keeps in host memory.',
    ),
    'model.pack': Field(
        boolean,
        None,
        'Lay sequences of up to 64 tokens side by side, which fills the tiles of TPUs; no effect '
        'on longer or masked ones, nor without attention=fused.',
    ),
}
