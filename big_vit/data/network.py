"""Requests to stores in the network: repeated when they fail, doubled when late, and counted."""

import concurrent.futures
import functools
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from big_vit.errors import PERMANENT_ERRORS

T = TypeVar('T')

# A store that refuses for a minute is waited for; each pause is drawn from half to all of its size.
PATIENCE_S = 150.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0
# At most one request in so many is sent a second time because the first is late: a store that is
# slow for everyone must not get twice the load.
_PER_SECOND_REQUEST = 20
# Before there is experience with requests of a size: seconds, and bytes a second.
_LATE_S, _SLOW = 2.0, 10e6
# Blocks, what is read ahead of them, and second requests; threads start when they are needed.
IN_FLIGHT = 160
# Libraries of stores, which raise errors of their own.
LIBRARIES = frozenset(('aiohttp', 'botocore', 'aiobotocore', 'gcsfs', 'google', 'requests'))
# What stores say that another attempt cannot cure, in errors of no class of their own.
_REGION = ('PermanentRedirect', 'AuthorizationHeaderMalformed', 'IllegalLocationConstraint')
_ACCESS = (
    *('Forbidden', 'AccessDenied', 'InvalidAccessKeyId', 'SignatureDoesNotMatch'),
    *('NoCredentialsError', 'Unable to locate credentials', 'DefaultCredentialsError'),
)
_BUCKET = ('NoSuchBucket', 'bucket does not exist', 'Invalid bucket name')
_LASTING = (*_REGION, *_ACCESS, *_BUCKET)


class BrokenAnswerError(OSError):
    """What a store sent is not what it should be, though it answers: nothing to wait for."""


class ShortAnswerError(BrokenAnswerError):
    """A store sent fewer bytes than it was asked for: a broken transfer, or a shorter object."""


class Traffic:
    """What a process has asked of stores in the network.

    Counts:
      requests: answers waited for, listings among them, without those that were repeated.
      bytes: received.
      retries: requests that were sent again because they failed.
      doubled: requests that were sent a second time because they were late.
      hits, misses: reads that the local copies of blocks could answer, and those they could not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        names = ('requests', 'bytes', 'retries', 'doubled', 'hits', 'misses')
        self._counts = dict.fromkeys(names, 0)
        self._taken = self._counts.copy()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def counts(self) -> dict[str, int]:
        with self._lock:
            return self._counts.copy()

    def take(self) -> dict[str, int]:
        """Return what came since the last call; {} if that is nothing."""
        with self._lock:
            news = {name: count - self._taken[name] for name, count in self._counts.items()}
            self._taken = self._counts.copy()
        return news if any(news.values()) else {}


TRAFFIC = Traffic()


class _Lateness:
    """How long requests of about one size take: mean and mean deviation, as TCP's timer has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[int, float, float]] = {}
        self._requests = self._doubled = 0

    def add(self, size: int, seconds: float) -> None:
        with self._lock:
            count, mean, deviation = self._seen.get(size.bit_length(), (0, seconds, seconds / 2))
            deviation += (abs(seconds - mean) - deviation) / 4
            self._seen[size.bit_length()] = count + 1, mean + (seconds - mean) / 8, deviation
            self._requests += 1

    def limit(self, size: int) -> float:
        """Return the seconds after which a request is late."""
        with self._lock:
            count, mean, deviation = self._seen.get(size.bit_length(), (0, 0.0, 0.0))
        return mean + 4 * deviation + 0.01 if count >= 8 else _LATE_S + size / _SLOW

    def may_double(self) -> bool:
        with self._lock:
            may = self._doubled <= self._requests // _PER_SECOND_REQUEST
            self._doubled += may
            return may


_lateness = _Lateness()


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix='request')


def passes(error: BaseException) -> bool:
    """Whether what went wrong may pass by itself."""
    if isinstance(error, PERMANENT_ERRORS) or any(
        word in f'{type(error).__name__} {error}' for word in _LASTING
    ):
        return False
    return is_of_store(error)


def is_of_store(error: BaseException) -> bool:
    """Whether an error tells of files or of a store, not of a mistake in a program."""
    library = type(error).__module__.partition('.')[0]
    return isinstance(error, OSError | TimeoutError) or library in LIBRARIES


def advice(error: BaseException) -> str:
    """Return what to do about an error of a store; '' if that is not known."""
    text = f'{type(error).__name__} {error}'
    if any(word in text for word in _REGION):
        return ': the bucket is in another region: set AWS_DEFAULT_REGION to it'
    if isinstance(error, PermissionError) or any(word in text for word in _ACCESS):
        return (
            ': give this machine access: gs:// reads GOOGLE_APPLICATION_CREDENTIALS, or what '
            '`gcloud auth application-default login` keeps; s3:// reads AWS_PROFILE, or '
            'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY'
        )
    if isinstance(error, FileNotFoundError) or any(word in text for word in _BUCKET):
        return ': see whether the name of the bucket is right'
    return ''


def answer(ask: Callable[[], T], size: int = 0) -> T:
    """Send a request until it is answered, for `PATIENCE_S` at most.

    Args:
      ask: sends it; may be called several times, also at once.
      size: bytes that are expected.

    Raises:
      Exception: what `ask` raised last, or what another attempt cannot cure.
    """
    deadline = time.monotonic() + PATIENCE_S
    pause, short = _FIRST_PAUSE_S, 0
    while True:
        try:
            result = _in_time(ask, size)
        except Exception as error:
            wait = pause * random.uniform(0.5, 1.0)  # Or all hosts would come back at once.
            short += isinstance(error, ShortAnswerError)
            # An object that is shorter than expected stays so.
            if not passes(error) or short > 2 or time.monotonic() + wait > deadline:
                raise
            TRAFFIC.add(retries=1)
            time.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            continue
        TRAFFIC.add(requests=1, bytes=len(result) if isinstance(result, bytes) else 0)
        return result


def _in_time(ask: Callable[[], T], size: int) -> T:
    """Send a request, and once more if it is late; the first answer counts."""

    def timed() -> T:
        began = time.monotonic()
        result = ask()
        _lateness.add(size, time.monotonic() - began)
        return result

    sent = [_pool().submit(timed)]
    finished, _ = concurrent.futures.wait(sent, _lateness.limit(size))
    if not finished and _lateness.may_double():
        TRAFFIC.add(doubled=1)
        sent.append(_pool().submit(timed))
    while True:
        finished, waiting = concurrent.futures.wait(
            sent, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for one in finished:
            if one.exception() is None:
                return one.result()
        if not waiting:
            return sent[0].result()
        sent = list(waiting)
