"""Tasks that depend on time, on the order of words, or on two inputs at once; run on a CPU.

    python -m big_vit.train --config configs/sequences.py:task=orbit --workdir runs/orbit

task is orbit (video, tubelets), tones (spectrogram, overlapping patches), phrases (words) or quiz
(a picture and a question, with cross-attention; fusion=concat or latents for the other ways). With
blind=True the model cannot see what matters and must stay at chance (1/8, 1/6, 1/6): it gets one
frame of the video, or moments of the sound or words without their positions; the picture without
its question can be answered in 17/32 of all cases at best.
"""

from ml_collections import ConfigDict

# Transform, image size, steps and model of each task; then the changes for blind=True.
TASKS: dict[str, tuple] = {
    'orbit': ('', 32, 1500, {'variant': 'mu/8', 'tokenizer': 'tubelets', 'tubelet': 2}),
    'tones': (
        'log_mel(8000, bins=32) | standardize(-4.2, 7.0)',
        32,
        800,
        {'variant': 'mu/32x4', 'stride': (32, 2)},
    ),
    'phrases': (
        'byte_tokens(64)',
        32,
        2500,
        {'variant': 'mu/8', 'tokenizer': 'words', 'posemb': 'learned'},
    ),
    'quiz': ('byte_tokens(48)', 16, 2000, {'variant': 'mu/8'}),
}
BLIND: dict[str, tuple] = {
    'orbit': ('middle_frame()', {'variant': 'mu/8', 'tokenizer': 'patches', 'tubelet': None}),
    'tones': (None, {'variant': 'mu/32x1', 'stride': None, 'posemb': 'none'}),
    'phrases': (None, {'posemb': 'none'}),
    'quiz': (None, {}),
}


def get_config(task: str = 'orbit', fusion: str = 'cross', blind: bool = False):
    transform, size, steps, model = TASKS[task]
    if blind:
        other, changed = BLIND[task]
        transform = transform if other is None else other
        model = {k: v for k, v in {**model, **changed}.items() if v is not None}
    streams: dict[str, dict] = {}
    if task == 'quiz' and not blind:
        model = {**model, 'fusion': fusion}
        if fusion == 'cross':
            model['queries'] = 'question'
        if fusion == 'latents':
            model['latents'] = 16
        streams = {
            'picture': {'tokenizer': 'patches', 'posemb': 'learned'},
            'question': {'tokenizer': 'words', 'posemb': 'learned', 'depth': 1},
        }
    return ConfigDict(
        {
            'total_steps': steps,
            'batch_size': 64,
            'image_size': size,
            'lr': 2e-3,
            'model': {
                'width': 64,
                'depth': 2,
                'num_heads': 4,
                'mlp_dim': 128,
                'dtype': 'float32',
                'scan': False,
                **model,
            },
            'streams': streams,
            'data': {'name': task, 'transform': transform},
            'evals': {'test': {'transform': transform, 'every_percent': 25}},
            'optim': {'weight_decay': 1e-3},
            'schedule': {'warmup_percent': 10},
        }
    )
