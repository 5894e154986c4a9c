"""What `prepare filter` finds, and how fast: `python -m benchmarks.preparation`.

Writes a set of generated JPEGs with copies of some of them, altered in known ways, with pictures of
an evaluation set, and with pictures that are like others and yet none of them. Then it filters the
set, and says which of each kind were left out, what a core does in a second, whether the counts add
up, and whether a run that is killed twice ends with the same bytes as one that is not.

Needs `pip install -e '.[beam]'`. Results go to benchmarks/results/preparation.json.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

RESULTS = Path(__file__).parent / 'results' / 'preparation.json'
HEIGHT, WIDTH, SHARD = 144, 192, 1000
# What the last twenty of each hundred pictures are: copies, of the evaluation, and like others.
COPIES = (
    *('same file', 'same pixels, PNG', 're-encoded, q 40', 're-encoded, q 75', 'resized to 1/2'),
    *('resized to 3/4', 'cropped 5 %', 'cropped 5 %, q 60', 'brighter by 1.2', 'darker by 0.8'),
)
EVALUATION = (
    *('same file', 're-encoded, q 40', 'resized to 1/2', 'cropped 5 %', 'brighter by 1.2'),
    'mirrored',
)
LIKE = ('another thing on it', 'other colours', 'mirror image', 'other things, same ground')
# Pictures of the evaluation set that are nowhere else.
ONLY_EVALUATION = 500


def draw(seed: int, stream: int = 0, things: int = 0) -> np.ndarray:
    """Draw a picture: a ground of coloured noise of many scales, and some things on it.

    Args:
      stream: 0 for the set, 1 for its evaluation.
      things: another number draws other things on the same ground.
    """
    rng = np.random.default_rng([stream, seed])
    image = np.full((HEIGHT, WIDTH, 3), rng.uniform(70, 180, 3), np.float32)
    for cells, strength in ((3, 55), (6, 35), (12, 24), (24, 14), (48, 8)):
        grid = rng.standard_normal((cells, cells, 3), np.float32) * strength
        image += cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image = image.clip(0, 255).astype(np.uint8)
    rng = np.random.default_rng([stream, seed, things])
    for _ in range(rng.integers(1, 6)):
        thing(image, rng, 60)
    return image


def thing(image: np.ndarray, rng: np.random.Generator, size: int) -> None:
    """Draw an ellipse or a polygon into a picture."""
    colour = tuple(int(level) for level in rng.integers(0, 256, 3))
    middle = rng.integers((WIDTH, HEIGHT))
    if rng.random() < 0.5:
        axes = tuple(int(axis) for axis in rng.integers(size // 6, size, 2))
        angle = float(rng.integers(180))
        centre = tuple(int(at) for at in middle)
        cv2.ellipse(image, centre, axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
    else:
        corners = (middle + rng.integers(-size, size, (4, 2))).astype(np.int32)
        cv2.fillPoly(image, [corners], colour, cv2.LINE_AA)


def encoded(image: np.ndarray, quality: int = 90) -> bytes:
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def altered(data: bytes, kind: str, rng: np.random.Generator) -> tuple[bytes, str]:
    """Return a JPEG altered in one of the ways above, and the ending of its file."""
    if kind == 'same file':
        return data, 'jpg'
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    quality = int(kind.rpartition('q ')[2]) if 'q ' in kind else 85
    if kind == 'same pixels, PNG':
        return cv2.imencode('.png', image)[1].tobytes(), 'png'
    if kind.startswith('resized'):
        scale = 0.5 if kind.endswith('1/2') else 0.75
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    elif kind.startswith('cropped'):
        height, width = round(HEIGHT * 0.95), round(WIDTH * 0.95)
        top, left = rng.integers(HEIGHT - height + 1), rng.integers(WIDTH - width + 1)
        image = image[top : top + height, left : left + width]
    elif kind.startswith('brighter'):
        image = np.clip(image * 1.2, 0, 255).astype(np.uint8)
    elif kind.startswith('darker'):
        image = (image * 0.8).astype(np.uint8)
    elif kind.startswith('mirror'):
        image = image[:, ::-1]
    elif kind == 'other colours':
        image = image[..., [1, 2, 0]]
    elif kind == 'another thing on it':
        thing(image := image.copy(), rng, 70)
    return encoded(np.ascontiguousarray(image), quality), 'jpg'


def plan(number: int, total: int) -> tuple[str, str, int]:
    """Return (group, kind, number of the picture that it is made of) of a picture of the set."""
    block, slot = divmod(number, 100)
    if slot < 80:
        return 'alone', '', number
    blocks = -(-total // 100)
    of = (block + 37) % blocks * 100 + slot - 80
    if slot < 90:
        return 'copy', COPIES[slot - 80], of
    if slot < 96:
        return 'evaluation', EVALUATION[slot - 90], block * 6 + slot - 90
    return 'like', LIKE[slot - 96], of


def picture(number: int, total: int) -> tuple[bytes, str]:
    group, kind, of = plan(number, total)
    rng = np.random.default_rng([2, number])
    if kind == LIKE[3]:
        return encoded(draw(of, things=1)), 'jpg'
    data = encoded(draw(of, stream=int(group == 'evaluation')))
    return altered(data, kind, rng) if kind else (data, 'jpg')


def write_shard(path: Path, numbers: range, total: int) -> None:
    with tarfile.open(path, 'w') as shard:
        for number in numbers:
            data, ending = picture(number, total)
            about = tarfile.TarInfo(f'{number:08d}.{ending}')
            about.size = len(data)
            shard.addfile(about, io.BytesIO(data))


def write_set(folder: Path, total: int) -> None:
    """Write the set and its evaluation set, in as many processes as there are processors."""
    (folder / 'set').mkdir(parents=True)
    (folder / 'evaluation' / 'thing').mkdir(parents=True)
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = [
            pool.submit(
                write_shard,
                folder / 'set' / f'{start // SHARD:05d}.tar',
                range(start, min(start + SHARD, total)),
                total,
            )
            for start in range(0, total, SHARD)
        ]
        for number in range(-(-total // 100) * 6 + ONLY_EVALUATION):
            file = folder / 'evaluation' / 'thing' / f'{number:06d}.jpg'
            file.write_bytes(encoded(draw(number, stream=1)))
        for task in tasks:
            task.result()


def command(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *(sys.executable, '-m', 'big_vit.prepare', 'filter', str(folder / 'set')),
        *('--out', str(folder / out), '--evaluation', str(folder / 'evaluation')),
        *('--shard_samples', '2000', *more),
    ]


def timed(words: list[str]) -> dict[str, float]:
    """Run a command; return its seconds by the clock, and of all its processes together."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(words, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {'seconds': time.monotonic() - began, 'core_seconds': spent}


def left_out(folder: Path) -> dict[int, str]:
    """Return {number: reason} of what a run left out."""
    lines = [
        json.loads(line)
        for part in sorted((folder / 'left_out').glob('*.jsonl'))
        for line in part.read_text().splitlines()
    ]
    return {int(line['name']): line['reason'] for line in lines}


def scored(gone: dict[int, str], total: int) -> dict[str, Any]:
    """Compare what was left out with what was planted.

    Of a copy and what it is made of, one must go; of a picture of the evaluation it must, with that
    reason. All else must stay.
    """
    counts: dict[str, dict[str, list[int]]] = {}
    mates = collections.Counter[int]()
    for number in range(total):
        group, kind, of = plan(number, total)
        if group == 'alone':
            continue
        pair = {number, of} if group == 'copy' else {number}
        found = sum(one in gone for one in pair)
        hit = gone.get(number) == 'evaluation' if group == 'evaluation' else found > 0
        row = counts.setdefault(group, {}).setdefault(kind, [0, 0])
        row[0] += hit
        row[1] += 1
        if group == 'copy':
            mates.update(pair)
    planted = {n for n in range(total) if plan(n, total)[0] == 'evaluation'} | set(mates)
    right = sum(number in planted for number in gone)
    return {
        'left_out': len(gone),
        'right': right,
        'precision': right / max(1, len(gone)),
        'wrong_alone': sum(n not in planted and plan(n, total)[0] == 'alone' for n in gone),
        'by_kind': counts,
    }


def digest(folder: Path) -> str:
    """Hash the names and contents of all files below a folder but the manifest's command."""
    whole = hashlib.sha256()
    for file in sorted(path for path in folder.rglob('*') if path.is_file()):
        whole.update(str(file.relative_to(folder)).encode() + b'\0')
        data = file.read_bytes()
        if file.name == 'manifest.json':
            data = json.dumps(json.loads(data) | {'command': ''}).encode()
        whole.update(hashlib.sha256(data).digest())
    return whole.hexdigest()


def killed(words: list[str], out: Path, wanted: str) -> bool:
    """Start a command and kill -9 all of it once a file is there; return whether it was running."""
    process = subprocess.Popen(words, start_new_session=True)
    while process.poll() is None and not list(out.glob(wanted)):
        time.sleep(0.01)
    was_running = process.poll() is None
    if was_running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return was_running


def restarts(folder: Path, total: int) -> dict[str, Any]:
    """Filter a small set at once, with one process, and killed twice; compare all bytes."""
    write_set(folder, total)
    one = ('--', '--direct_running_mode=in_memory')
    small = ('--resize', '96')
    subprocess.run(command(folder, 'whole', *small), check=True)
    subprocess.run(command(folder, 'one', *small, *one), check=True)
    words = command(folder, 'killed', *small)
    out = folder / 'killed'
    kills = [killed(words, out, '.work/examined/*1.npz'), killed(words, out, '.work/written/*')]
    subprocess.run(words, check=True)
    hashes = {name: digest(folder / name) for name in ('whole', 'one', 'killed')}
    return {
        'pictures': total,
        'killed_while_running': kills,
        'same_with_one_process': hashes['one'] == hashes['whole'],
        'same_after_kills': hashes['killed'] == hashes['whole'],
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as tables of Markdown."""
    titles = {'copy': 'copy', 'evaluation': 'of the evaluation set', 'like': 'like another'}
    lines = ['| | left out | of |', '|---|---|---|']
    for group, kinds in result['found']['by_kind'].items():
        lines += [f'| {titles[group]}: {k} | {hit:,} | {of:,} |' for k, (hit, of) in kinds.items()]
    found = result['found']
    lines += [
        '',
        f'{found["right"]:,} of {found["left_out"]:,} that were left out are copies, their '
        f'originals, or of the evaluation set (precision {found["precision"]:.4f}); '
        f'{found["wrong_alone"]:,} were like nothing.',
        f'{result["pictures_per_core_second"]:.0f} pictures a second a core, '
        f'{result["time"]["seconds"]:.0f} s by the clock on {result["about"]["cores"]} cores.',
        f'Restarts: {json.dumps(result["restarts"])}',
    ]
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pictures', type=int, default=100_000, metavar='N')
    parser.add_argument('--restart-pictures', type=int, default=4000, metavar='N')
    parser.add_argument('--folder', help='where the set is written; kept, and used again')
    parser.add_argument('--json', default=str(RESULTS), metavar='FILE')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / 'set').exists():
            write_set(folder, args.pictures)
        print('the set is there', flush=True)
        shutil.rmtree(folder / 'out', ignore_errors=True)
        time_spent = timed(command(folder, 'out'))
        manifest = json.loads((folder / 'out' / 'manifest.json').read_text())
        gone = left_out(folder / 'out')
        adds_up = manifest['examples'] == args.pictures == manifest['kept'] + len(gone)
        adds_up &= sum(manifest['left_out'].values()) == len(gone)
        result = {
            'about': {
                'pictures': args.pictures,
                'cores': len(os.sched_getaffinity(0)),
                'python': platform.python_version(),
                'versions': manifest['versions'],
                'size': [HEIGHT, WIDTH],
            },
            'time': time_spent,
            'pictures_per_core_second': args.pictures / time_spent['core_seconds'],
            'manifest_adds_up': adds_up,
            'left_out': manifest['left_out'],
            'found': scored(gone, args.pictures),
            'restarts': restarts(Path(temporary) / 'restarts', args.restart_pictures),
        }
    Path(args.json).write_text(json.dumps(result, indent=1) + '\n')
    print(table(result))


if __name__ == '__main__':
    main()
