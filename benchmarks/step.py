"""Compare our train step on this machine with timm in PyTorch: `python -m benchmarks step`.

Both do the same work: forward, backward, clipping at 1 and AdamW, on a batch that is already on the
device; on a GPU in bfloat16 (autocast for timm), on a CPU in float32. timm runs eagerly and through
`torch.compile`; on a CPU, both sides also process the batch in two parts and add the gradients. The
best result of each side counts. Each side has its own process, so that threads, memory and settings
do not interfere; they take turns in rounds of about two seconds.

On Linux without a GPU, GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives both large pages.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.machine import cpu
from big_vit import config as config_lib
from big_vit import runtime, sharding, state
from big_vit.build.experiment import abstract_batch, build_experiment
from big_vit.build.steps import build_train_step
from big_vit.errors import UserError
from big_vit.models import variants

RESULTS = Path(__file__).parent / 'results'


class Size(NamedTuple):
    """A training setup; `changes` override fields of the variant."""

    variant: str
    side: int
    batch: int
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        changed = ''.join(f' {name} {value}' for name, value in self.changes)
        return f'{self.variant}{changed}, {self.side} px, batch {self.batch}'


SMALL = (('width', 96), ('depth', 4), ('num_heads', 3), ('mlp_dim', 384))
SIZES = {
    'cpu': (
        Size('mu/4', 32, 64, SMALL),
        Size('Ti/16', 224, 8),
        Size('S/16', 224, 8),
    ),
    'gpu': (
        Size('S/16', 224, 256),
        Size('B/16', 224, 256),
        Size('L/16', 224, 128),
        Size('H/14', 224, 64),
    ),
}
Step = Callable[[], Any]  # Starts a step and returns a value to wait for.


def ours(
    size: Size,
    device: str,
    optimizer: str = 'adamw',
    scan: bool = False,
    attention: str = 'fused',
    devices: int = 1,
    parts: int = 1,
) -> tuple[Step, int]:
    """Return a step of big_vit on random images, and its floating-point operations."""
    overrides = {
        'mixup': '0',
        'accumulation': str(parts),
        'batch_size': str(size.batch),
        'image_size': str(size.side),
        'optim.name': optimizer,
        'model.variant': size.variant,
        'model.scan': str(scan),
        'model.attention': attention,
        'model.dtype': 'bfloat16' if device == 'gpu' else 'float32',
        **{f'model.{name}': str(value) for name, value in size.changes},
    }
    config = config_lib.load('configs/vit_b16_i1k.py', list(overrides.items()))
    experiment = build_experiment(config, jax.devices()[:devices])
    rng = np.random.default_rng(0)

    def random_leaf(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.integers(0, 2 if leaf.dtype == np.int32 else 256, leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    batch = jax.tree.map(random_leaf, abstract_batch(experiment))
    train_state = state.create(
        experiment.model, experiment.data.inputs, experiment.optimizer, 0, experiment.abstract_state
    )
    step = build_train_step(config, experiment).lower(train_state, batch).compile()

    def once() -> Any:
        nonlocal train_state
        train_state, values = step(train_state, batch)
        return values['loss']

    return once, experiment.flops_per_example * size.batch


def _timm_model() -> Any:
    """Import timm's class, although PyPI's torchvision does not work with a torch without CUDA."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
        import torch

        # torchvision registers kernels for operators that this torch lacks; nothing here calls
        # them.
        library = torch.library.Library('torchvision', 'DEF')
        for name in ('nms', 'qnms'):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer


def timm(size: Size, device: str, compiled: bool, parts: int = 1) -> Step:
    """Return a step of timm's model of the same shape, mean-pooled and without a class token."""
    import torch

    VisionTransformer = _timm_model()

    fields: dict[str, Any] = {**variants.parse(size.variant), **dict(size.changes)}
    place = 'cuda' if device == 'gpu' else 'cpu'
    model = VisionTransformer(
        img_size=size.side,
        patch_size=fields['patch_size'][0],
        embed_dim=fields['width'],
        depth=fields['depth'],
        num_heads=fields['num_heads'],
        mlp_ratio=fields['mlp_dim'] / fields['width'],
        class_token=False,
        global_pool='avg',
        fc_norm=False,
    ).to(place)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True)
    images = torch.randn(size.batch, 3, size.side, size.side, device=place)
    labels = torch.randint(0, 1000, (size.batch,), device=place)

    def loss(images: Any, labels: Any) -> Any:
        with torch.autocast(place, torch.bfloat16, enabled=device == 'gpu'):
            return torch.nn.functional.cross_entropy(model(images), labels) / parts

    forward = torch.compile(loss) if compiled else loss

    def once() -> Any:
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            part_loss = forward(*part)
            part_loss.backward()
            value = value + part_loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return value

    return once


def wait(value: Any) -> float:
    """Wait for the loss and return it."""
    return float(value)


def seconds(step: Step, count: int) -> float:
    """Return seconds per step, over `count` consecutive steps."""
    start = time.perf_counter()
    for _ in range(count):
        value = step()
    wait(value)
    return (time.perf_counter() - start) / count


SIDES = ('big_vit', 'big_vit, cudnn', 'big_vit, shampoo', 'timm', 'timm, compiled')
PARTS, DEVICES = ' in 2 parts', ' on 2 devices'
ON_TWO = 'big_vit' + PARTS + DEVICES


def parse_side(side: str) -> tuple[str, int, int]:
    """Split the name of a side into its entry of `SIDES`, the parts of a batch, and devices."""
    one_device = side.removesuffix(DEVICES)
    one_part = one_device.removesuffix(PARTS)
    return one_part, 1 if one_part == one_device else 2, 1 if one_device == side else 2


def build_step(side: str, size: Size, device: str) -> tuple[Step, int]:
    """Return the step of a side, and its floating-point operations if known (else 0)."""
    side, parts, devices = parse_side(side)
    if side.startswith('timm'):
        return timm(size, device, side.endswith('compiled'), parts), 0
    changes = {
        'big_vit': {},
        'big_vit, cudnn': {'attention': 'cudnn'},
        'big_vit, shampoo': {'optimizer': 'shampoo', 'scan': True},
    }
    return ours(size, device, devices=devices, parts=parts, **changes[side])


def work(side: str, size: Size, device: str) -> None:
    """Serve one side in this process."""
    if side.startswith('timm'):
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
    _, _, devices = parse_side(side)
    with jax.set_mesh(sharding.make_mesh(1, devices, 1, jax.devices()[:devices])):
        serve(*build_step(side, size, device), lambda: gpu_memory(side) if device == 'gpu' else 0)


def gpu_memory(side: str) -> int:
    """Return the peak of bytes that arrays took on this process's GPU."""
    if side.startswith('timm'):
        import torch

        return torch.cuda.max_memory_allocated()
    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


def serve(step: Step, flops: int, memory: Callable[[], int] = lambda: 0) -> None:
    """Report that a step is ready, then time a round of it for each line of standard input."""
    # The first step compiles, the second warms up.
    wait(step())
    count = max(1, math.ceil(2 / max(seconds(step, 2), 1e-3)))
    print(json.dumps({'flops': flops, 'memory': memory()}), flush=True)
    for _ in sys.stdin:
        # A virtual machine reclaims free memory while this side waits; an untimed step gets it
        # back.
        wait(step())
        print(json.dumps({'seconds': seconds(step, count)}), flush=True)


class Side:
    """The process of one side, which calls `serve` and waits between its rounds."""

    def __init__(self, *command: str, environment: dict[str, str] | None = None):
        # A file, since nobody drains a pipe meanwhile: compilers write more than a pipe holds.
        self._stderr = tempfile.TemporaryFile('w+')  # noqa: SIM115 - `end` closes it.
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'benchmarks', *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def read_message(self) -> dict[str, Any]:
        """Return the next message; raises UserError with the last output if the process ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{'):
                return json.loads(line)
        self._stderr.seek(0)
        output = self._stderr.read().strip().splitlines() or ['without a word']
        raise UserError(f'it ended: {output[-1][-300:]}')

    def round(self) -> float:
        """Return seconds per step of one round."""
        assert self._process.stdin is not None
        self._process.stdin.write('go\n')
        self._process.stdin.flush()
        return self.read_message()['seconds']

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


def measure(size: Size, number: int, rounds: int, names: list[str]) -> dict[str, Any]:
    flops, failed, running = 0, {}, {}
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    try:
        for name in names:
            side, _, devices = parse_side(name)
            environment = {'JAX_NUM_CPU_DEVICES': str(devices)} if devices > 1 else None
            command = ('step', '--side', name, '--size', str(number))
            running[name] = Side(*command, environment=environment)
            try:
                message = running[name].read_message()
                flops, memory[name] = message['flops'] or flops, message['memory']
                times[name] = []
            except UserError as error:
                # A side that needs what this machine lacks, such as Triton or cuDNN, is only left
                # out.
                if side in ('big_vit', 'timm'):
                    raise UserError(f'benchmarks step: {name}, {size.name}: {error}') from error
                failed[name] = str(error)
        for _ in range(rounds):
            for name in times:
                times[name].append(running[name].round())
    finally:
        for process in running.values():
            process.end()
    about = {'name': size.name, 'batch': size.batch, 'flops': flops, 'left': failed}
    return {**about, 'times': times, 'memory': memory}


def table(rows: list[dict[str, Any]], peak: float) -> str:
    header = (
        'model | framework | images/s | spread | MFU | GPU memory, GiB | beside the best of timm'
    )
    lines = [f'| {header} |', f'|{"---|" * (header.count("|") + 1)}']
    for row in rows:
        medians = {name: statistics.median(all_) for name, all_ in row['times'].items()}
        peer = min(time for name, time in medians.items() if name.startswith('timm'))
        for name, time_ in medians.items():
            all_ = row['times'][name]
            spread = f'{row["batch"] / max(all_):,.1f} to {row["batch"] / min(all_):,.1f}'
            mfu = row['flops'] / time_ / peak
            taken = row['memory'][name]
            cells = [row['name'], name, f'{row["batch"] / time_:,.1f}', spread, f'{mfu:.1%}']
            cells += [f'{taken / 2**30:.2f}' if taken else '-', f'{peer / time_:.2f}']
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks step', allow_abbrev=False)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--only', type=int, help='the first so many sizes')
    parser.add_argument('--shampoo', action='store_true', help='also its overhead')
    parser.add_argument(
        '--side',
        choices=[*SIDES, *(side + PARTS for side in SIDES), ON_TWO],
        help=argparse.SUPPRESS,
    )
    parser.add_argument('--size', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    device = 'gpu' if jax.default_backend() == 'gpu' else 'cpu'
    if args.side:
        work(args.side, SIZES[device][args.size], device)
        return
    missing = [name for name in ('torch', 'timm') if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'benchmarks step: {" and ".join(missing)} must be installed beside big_vit: '
            'pip install torch, and pip install --no-deps torchvision timm'
        )
    peak, source = runtime.device_peak_flops()
    left = {'cudnn': device == 'cpu', 'shampoo': not args.shampoo}
    names = [name for name in SIDES if not left.get(name.partition(', ')[2])]
    if device == 'cpu':
        names = [*names, *(name + PARTS for name in names), ON_TWO]
    rows = []
    for number, size in enumerate(SIZES[device][: args.only]):
        rows.append(measure(size, number, args.rounds, names))
        print(table(rows[-1:], peak), flush=True)
        for name, why in rows[-1]['left'].items():
            print(f'left out: {name}: {why}', flush=True)
    about = {
        'device': jax.devices()[0].device_kind
        if device == 'gpu'
        else f'{os.cpu_count()} x {cpu()}',
        'peak': f'{peak / 1e12:.2f} TFLOP/s ({source})',
        'malloc': os.environ.get('GLIBC_TUNABLES', 'as it comes'),
        'python': platform.python_version(),
        **{name: metadata.version(name) for name in ('jax', 'torch', 'timm')},
    }
    (RESULTS / f'step_{device}.json').write_text(
        json.dumps({'about': about, 'rows': rows}, indent=1) + '\n'
    )
    print(f'\n{table(rows, peak)}\n\n{about}')
