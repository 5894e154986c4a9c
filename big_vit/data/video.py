"""Videos to frames."""

import io

import numpy as np
from jaxtyping import UInt8

from big_vit.data import geometry
from big_vit.data.operations import (
    BadExampleError,
    Columns,
    Draw,
    Operation,
    UnfitError,
    choice,
    pair,
    stacked,
    whole,
)

_MOST_FRAMES = 20_000
_MOST_PIXELS = 1 << 26


def read_frames(
    data: bytes, frames: int, stride: int, start: float | int | None
) -> UInt8[np.ndarray, 'frames height width 3']:
    """Some frames of a video file, RGB, in the order in which they are shown.

    Args:
      frames: how many, `stride` apart; where the clip ends before, its last is repeated.
      start: where among the possible beginnings, in [0, 1); None for the middle.

    Raises:
      ValueError: it cannot be read, or is too long or too large.
    """
    import av

    try:
        with av.open(io.BytesIO(data), 'r') as container:
            if not container.streams.video:
                raise ValueError('holds no video')
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            if stream.width * stream.height > _MOST_PIXELS:
                raise ValueError(f'frames of {stream.width}x{stream.height} are too large')
            # Only packets tell for certain how many frames there are, and when each is shown.
            times = []
            for packet in container.demux(stream):
                if packet.pts is not None:
                    times.append((packet.pts, packet.is_keyframe))
                if len(times) > _MOST_FRAMES:
                    raise ValueError(f'more than {_MOST_FRAMES:,} frames')
            if not times:
                raise ValueError('holds no frame')
            times.sort()
            spare = max(0, len(times) - (frames - 1) * stride - 1)
            first = spare // 2 if start is None else int(start * (spare + 1))
            wanted = [min(first + k * stride, len(times) - 1) for k in range(frames)]
            shown = [times[i][0] for i in wanted]
            before = max((pts for pts, key in times if key and pts <= shown[0]), default=None)
            if before is not None:
                container.seek(before, stream=stream, backward=True)
            else:
                container.seek(0, stream=stream, backward=True)
            found: dict[int, np.ndarray] = {}
            needed = set(shown)
            for frame in container.decode(stream):
                if frame.pts in needed:
                    found[frame.pts] = frame.to_ndarray(format='rgb24')
                if len(found) == len(needed):
                    break
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f'not a video, or damaged ({error})') from error
    if len(found) < len(needed):
        raise ValueError(f'damaged: {len(needed) - len(found)} frames cannot be decoded')
    return np.stack([found[pts] for pts in shown])


def decode_video(frames, stride=1, random_start=False) -> Operation:
    """A video file to so many frames, `stride` apart, uint8 [frames, height, width, 3].

    They are those of the middle, or with `random_start` from anywhere; a clip that is too short
    repeats its last frame. Any format that FFmpeg knows (`pip install av`).
    """
    frames, stride = whole('frames', frames, 1, 4096), whole('stride', stride, 1, 4096)

    def apply(columns: Columns, draw: Draw) -> Columns:
        clips = _need(columns)
        where = draw(0) if random_start else None
        found = []
        for row, clip in enumerate(clips):
            start = None if where is None else float(where[row])
            try:
                found.append(
                    read_frames(clip, frames, stride, start)
                    if isinstance(clip, bytes)
                    else _chosen(clip, frames, stride, start)
                )
            except ValueError as error:
                raise BadExampleError(row, str(error)) from error
        return {**columns, 'video': stacked(found)}

    return Operation(apply, random=bool(random_start))


def _chosen(clip: np.ndarray, frames: int, stride: int, start: float | int | None) -> np.ndarray:
    """The same frames of a clip that is an array already."""
    spare = max(0, len(clip) - (frames - 1) * stride - 1)
    first = spare // 2 if start is None else int(start * (spare + 1))
    return clip[np.minimum(first + np.arange(frames) * stride, len(clip) - 1)]


def _need(columns: Columns):
    if 'video' not in columns:
        raise UnfitError(f"needs 'video', but these examples have {', '.join(sorted(columns))}")
    return columns['video']


def _clips(columns: Columns) -> list[np.ndarray]:
    clips = list(_need(columns))
    if any(not isinstance(clip, np.ndarray) for clip in clips):
        raise UnfitError('needs frames: put decode_video(FRAMES) before it')
    return clips


def resize_video(size, method='area') -> Operation:
    """All frames to exactly this size."""
    size = pair(size)
    choice('method', method, *geometry.METHODS)

    def apply(columns: Columns, draw: Draw) -> Columns:
        clips = [
            np.stack([geometry.resized(frame, size, method) for frame in clip])
            for clip in _clips(columns)
        ]
        return {**columns, 'video': stacked(clips)}

    return Operation(apply)


def crop_video(size, random=False) -> Operation:
    """The middle of all frames, or with `random` a window anywhere, one for each clip."""
    size = pair(size)

    def apply(columns: Columns, draw: Draw) -> Columns:
        clips = _clips(columns)
        down, across = (draw(0), draw(1)) if random else (None, None)
        cut = []
        for row, clip in enumerate(clips):
            spare = clip.shape[1] - size[0], clip.shape[2] - size[1]
            if min(spare) < 0:
                raise UnfitError(
                    f'cannot cut {size[0]}x{size[1]} from {clip.shape[1]}x{clip.shape[2]} frames: '
                    'put resize_video before it'
                )
            if down is None or across is None:
                top, left = spare[0] // 2, spare[1] // 2
            else:
                top, left = int(down[row] * (spare[0] + 1)), int(across[row] * (spare[1] + 1))
            cut.append(clip[:, top : top + size[0], left : left + size[1]])
        return {**columns, 'video': stacked(cut)}

    return Operation(apply, random=bool(random))


def middle_frame() -> Operation:
    """The frame in the middle of a clip, as an image."""

    def apply(columns: Columns, draw: Draw) -> Columns:
        images = [clip[len(clip) // 2] for clip in _clips(columns)]
        rest = {name: column for name, column in columns.items() if name != 'video'}
        return {**rest, 'image': stacked(images)}

    return Operation(apply)


OPERATIONS = {
    operation.__name__: operation
    for operation in (decode_video, resize_video, crop_video, middle_frame)
}
