"""Videos to frames."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped, UInt8

from big_vit.data import decode
from big_vit.data.transforms import geometry
from big_vit.data.transforms.operations import (
    BadExampleError,
    Columns,
    Draw,
    Operation,
    UnfitError,
    choice,
    pair,
    stacked,
    whole_number,
)

# Eleven minutes at 30 frames a second: a longer file is no example.
_MOST_FRAMES = 20_000
# Containers that say of each packet when it is shown. Others guess, and with B-frames wrongly.
_TIMED = ('mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm')

Frame = UInt8[np.ndarray, 'height width 3']


def read_frames(
    data: bytes, frames: int, stride: int, start: float | int | None
) -> UInt8[np.ndarray, 'frames height width 3']:
    """Some frames of a video file, RGB, in the order in which they are shown.

    Of MP4, MOV, MKV and WebM, decoding begins at the last keyframe before the first of them; of
    other files at the first frame. Colours follow the matrix and range that the file names (BT.601
    where it names none). Rotations that are only noted beside the pictures are ignored.

    Args:
      frames: how many, `stride` apart; where the clip ends before, its last is repeated.
      start: where among the possible beginnings, in [0, 1); None for the middle.

    Raises:
      ValueError: it cannot be read, or is too long or too large.
    """
    import av

    try:
        with _opened(data) as container:
            stream = _stream(container, frames)
            times, keys = [], []
            count = 0
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError('damaged: it ends too early')
                # What an edit list cuts away is there to be decoded, but is not shown.
                count += packet.size > 0 and not packet.is_discard
                if packet.pts is not None and packet.is_keyframe:
                    keys.append(packet.pts)
                if packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
                if count > _MOST_FRAMES:
                    raise ValueError(f'more than {_MOST_FRAMES:,} frames')
            found = None
            if container.format.name in _TIMED and 0 < count == len(set(times)):
                shown = np.sort(times)[_indices(count, frames, stride, start)].tolist()
                found = _from_keyframe(container, stream, keys, shown)
        return np.stack(found or _from_first(data, count, frames, stride, start))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f'not a video, or damaged ({error})') from error


def _indices(count: int, frames: int, stride: int, start: float | int | None) -> np.ndarray:
    """Which of `count` frames are wanted, as `read_frames` says: int64 [frames]."""
    spare = max(0, count - (frames - 1) * stride - 1)
    first = spare // 2 if start is None else int(start * (spare + 1))
    return np.minimum(first + np.arange(frames) * stride, count - 1)


def _opened(data: bytes):
    import av

    # Titles come in any encoding, and nobody reads them.
    return av.open(io.BytesIO(data), 'r', metadata_errors='replace')


def _stream(container, frames: int):
    """The first video stream, in one thread."""
    if not container.streams.video:
        raise ValueError('holds no video')
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError('no code of video that FFmpeg knows')
    stream.codec_context.thread_count = 1
    if frames * stream.width * stream.height > decode.MAX_PIXELS:
        raise ValueError(
            f'{frames} frames of {stream.width}x{stream.height} are more than the '
            f'{decode.MAX_PIXELS:,} pixels allowed'
        )
    return stream


def _rgb(frame, stream) -> Frame:
    if (frame.width, frame.height) != (stream.width, stream.height):
        raise ValueError('its frames differ in size')
    if frame.is_corrupt:
        raise ValueError('damaged: a frame cannot be decoded')
    return frame.to_ndarray(format='rgb24', threads=1)


def _from_keyframe(
    container, stream, keys: Sequence[int], shown: Sequence[int]
) -> list[Frame] | None:
    """The frames shown at these times; None where one does not come."""
    before = max((time for time in keys if time <= shown[0]), default=None)
    if before is None:
        return None
    container.seek(before, stream=stream, backward=True)
    needed = set(shown)
    found: dict[int, Frame] = {}
    for packet in container.demux(stream):
        # A frame that no other is made from need not be decoded.
        wanted = packet.pts is None or packet.pts in needed
        stream.codec_context.skip_frame = 'DEFAULT' if wanted else 'NONREF'
        for frame in packet.decode():
            if frame.pts in needed:
                found[frame.pts] = _rgb(frame, stream)
        if len(found) == len(needed):
            return [found[time] for time in shown]
    return None


def _from_first(
    data: bytes, count: int, frames: int, stride: int, start: float | int | None
) -> list[Frame]:
    """The same frames by counting what the decoder gives."""
    while count:
        wanted = _indices(count, frames, stride, start).tolist()
        needed, given = set(wanted), 0
        found: dict[int, Frame] = {}
        with _opened(data) as container:
            stream = _stream(container, frames)
            for frame in container.decode(stream):
                if given in needed:
                    found[given] = _rgb(frame, stream)
                given += 1
                if len(found) == len(needed):
                    return [found[i] for i in wanted]
        # Some packets show nothing. Now it is known how many frames there are.
        count = given
    raise ValueError('holds no frame that can be decoded')


def decode_video(frames, stride=1, random_start=False) -> Operation:
    """A video file to so many frames, `stride` apart, uint8 [frames, height, width, 3].

    They are those of the middle, or with `random_start` from anywhere; a clip that is too short
    repeats its last frame. Any format that FFmpeg knows (`pip install 'av>=17'`).
    """
    frames, stride = (
        whole_number('frames', frames, 1, 4096),
        whole_number('stride', stride, 1, 4096),
    )
    try:
        import av
    except ImportError as error:
        raise UnfitError(f"needs `pip install 'av>=17'` ({error})") from error
    # Older ones cannot be told to convert colours in one thread.
    if int(av.__version__.partition('.')[0]) < 17:
        raise UnfitError(f"needs `pip install 'av>=17'`, not {av.__version__}")

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


def _chosen(
    clip: Shaped[np.ndarray, 'frames height width channels'],
    frames: int,
    stride: int,
    start: float | int | None,
) -> np.ndarray:
    """The same frames of a clip that is an array already."""
    return clip[_indices(len(clip), frames, stride, start)]


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
