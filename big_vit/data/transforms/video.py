"""Operations on videos and their frames."""

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
    need_room,
    pair,
    stacked,
    whole_number,
)

# Eleven minutes at 30 frames a second; no example is longer.
_MOST_FRAMES = 20_000
# Containers that store when each packet is shown; others guess, and wrongly with B-frames.
_TIMED = ('mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm')

Frame = UInt8[np.ndarray, 'height width 3']


def read_frames(
    data: bytes, frames: int, stride: int, start: float | int | None
) -> UInt8[np.ndarray, 'frames height width 3']:
    """Read some RGB frames of a video file, in the order in which they are shown.

    Decoding begins at the last keyframe before them in MP4, MOV, MKV and WebM, and at the first
    frame of other files. Colours follow the matrix and range that the file names (BT.601 where it
    names none). Rotations stored as metadata are ignored.

    Args:
      data: the file.
      frames: how many to read; a clip that is too short repeats its last one.
      stride: distance between them.
      start: position among the possible beginnings, in [0, 1); None for the middle.

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
                # Frames that an edit list cuts away are decoded but not shown.
                count += packet.size > 0 and not packet.is_discard
                if packet.pts is not None and packet.is_keyframe:
                    keys.append(packet.pts)
                if packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
                if count > _MOST_FRAMES:
                    raise ValueError(f'more than {_MOST_FRAMES:,} frames')
            clip = None
            if container.format.name in _TIMED and 0 < count == len(set(times)):
                shown = np.sort(times)[_indices(count, frames, stride, start)].tolist()
                clip = _from_keyframe(container, stream, keys, shown)
        return np.stack(clip or _from_first(data, count, frames, stride, start))
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f'not a video, or damaged ({error})') from error


def _indices(count: int, frames: int, stride: int, start: float | int | None) -> np.ndarray:
    """Return which of `count` frames `read_frames` takes, int64 [frames]."""
    spare = max(0, count - (frames - 1) * stride - 1)
    first = spare // 2 if start is None else int(start * (spare + 1))
    return np.minimum(first + np.arange(frames) * stride, count - 1)


def _opened(data: bytes):
    import av

    # Titles come in any encoding, and nothing here uses them.
    return av.open(io.BytesIO(data), 'r', metadata_errors='replace')


def _stream(container, frames: int):
    """Return the first video stream, to be decoded in one thread."""
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
    """Decode the frames shown at these times; None if one is missing."""
    before = max((time for time in keys if time <= shown[0]), default=None)
    if before is None:
        return None
    container.seek(before, stream=stream, backward=True)
    needed = set(shown)
    decoded: dict[int, Frame] = {}
    for packet in container.demux(stream):
        # An unwanted frame that no other depends on need not be decoded.
        wanted = packet.pts is None or packet.pts in needed
        stream.codec_context.skip_frame = 'DEFAULT' if wanted else 'NONREF'
        for frame in packet.decode():
            if frame.pts in needed:
                decoded[frame.pts] = _rgb(frame, stream)
        if len(decoded) == len(needed):
            return [decoded[time] for time in shown]
    return None


def _from_first(
    data: bytes, count: int, frames: int, stride: int, start: float | int | None
) -> list[Frame]:
    """Decode the same frames by counting from the first one."""
    while count:
        wanted = _indices(count, frames, stride, start).tolist()
        needed, given = set(wanted), 0
        decoded: dict[int, Frame] = {}
        with _opened(data) as container:
            stream = _stream(container, frames)
            for frame in container.decode(stream):
                if given in needed:
                    decoded[given] = _rgb(frame, stream)
                given += 1
                if len(decoded) == len(needed):
                    return [decoded[i] for i in wanted]
        # Some packets show nothing; only now is the number of frames known.
        count = given
    raise ValueError('holds no frame that can be decoded')


def decode_video(frames, stride=1, random_start=False) -> Operation:
    """Decode a video file to frames `stride` apart, uint8 [frames, height, width, 3].

    They come from the middle, or from anywhere with `random_start`; a clip that is too short
    repeats its last frame. FFmpeg (`pip install 'av>=17'`) reads the file.
    """
    frames, stride = (
        whole_number('frames', frames, 1, 4096),
        whole_number('stride', stride, 1, 4096),
    )
    try:
        import av
    except ImportError as error:
        raise UnfitError(f"needs `pip install 'av>=17'` ({error})") from error
    # Older versions cannot convert colours in one thread.
    if int(av.__version__.partition('.')[0]) < 17:
        raise UnfitError(f"needs `pip install 'av>=17'`, not {av.__version__}")

    def apply(columns: Columns, draw: Draw) -> Columns:
        clips = _need(columns)
        where = draw(0) if random_start else None
        chosen = []
        for row, clip in enumerate(clips):
            start = None if where is None else float(where[row])
            try:
                chosen.append(
                    read_frames(clip, frames, stride, start)
                    if isinstance(clip, bytes)
                    else _chosen(clip, frames, stride, start)
                )
            except ValueError as error:
                raise BadExampleError(row, str(error)) from error
        return {**columns, 'video': stacked(chosen)}

    return Operation(apply, random=bool(random_start))


def _chosen(
    clip: Shaped[np.ndarray, 'frames height width channels'],
    frames: int,
    stride: int,
    start: float | int | None,
) -> np.ndarray:
    """Take the same frames from a clip that is an array already."""
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
    """Resize all frames to exactly this size."""
    size = pair(size)
    choice('method', method, *geometry.METHODS)

    def apply(columns: Columns, draw: Draw) -> Columns:
        clips = []
        for row, clip in enumerate(_clips(columns)):
            need_room(row, size[0], size[1], len(clip))
            clips.append(np.stack([geometry.resized(frame, size, method) for frame in clip]))
        return {**columns, 'video': stacked(clips)}

    return Operation(apply)


def crop_video(size, random=False) -> Operation:
    """Cut the middle of all frames, or with `random` one window anywhere per clip."""
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
    """Take the frame in the middle of a clip as an image."""

    def apply(columns: Columns, draw: Draw) -> Columns:
        images = [clip[len(clip) // 2] for clip in _clips(columns)]
        rest = {name: column for name, column in columns.items() if name != 'video'}
        return {**rest, 'image': stacked(images)}

    return Operation(apply)


OPERATIONS = {
    operation.__name__: operation
    for operation in (decode_video, resize_video, crop_video, middle_frame)
}
