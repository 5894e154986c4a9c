"""Downloads of small datasets that are a few files at one address, checked by what is in them."""

import hashlib
import http.client
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from big_vit.errors import UserError

FASHION_MNIST_URL = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com'
# SHA-256 of what is in the gzip files, which packages compress anew, and its bytes.
FASHION_MNIST = {
    'train-images-idx3-ubyte.gz': (
        'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
        47_040_016,
    ),
    'train-labels-idx1-ubyte.gz': (
        'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
        60_008,
    ),
    't10k-images-idx3-ubyte.gz': (
        '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
        7_840_016,
    ),
    't10k-labels-idx1-ubyte.gz': (
        '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
        10_008,
    ),
}
_TIMEOUT_S = 30


def fashion_mnist(folder: Path, url: str | None = None) -> list[str]:
    """Bring the four IDX files of Fashion-MNIST (31 MB) into a folder.

    A file that is there and right is kept, also one that was put there by hand; a download that
    was cut off or altered leaves nothing.

    Args:
      url: address of the folder of the files, by default the authors'.

    Returns:
      The names of the files that were downloaded.

    Raises:
      UserError: no network, another answer than the file, a file that is not the published one, or
        a folder that cannot be written.
    """
    fetched, url = [], (url or FASHION_MNIST_URL).rstrip('/')
    for name, (digest, size) in FASHION_MNIST.items():
        path = folder / name
        if path.exists():
            if _content(path.read_bytes(), size) != digest:
                raise UserError(f'{path} is not the published file: remove it, and start again')
            continue
        data = _get(f'{url}/{name}', size, folder)
        if _content(data, size) != digest:
            raise UserError(f'{url}/{name} is not the published file: nothing was kept of it')
        part = path.with_name(name + '.part')
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            raise UserError(f'--data_dir: {path} cannot be written: {error.strerror}') from error
        fetched.append(name)
    return fetched


def _get(address: str, size: int, folder: Path) -> bytes:
    """Read what is at an address, but never more than a file whose content has `size` bytes."""
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            return answer.read(size + 1024)  # gzip's header and trailer.
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error, 'reason', None) or error
        raise UserError(
            f'{address}: cannot be downloaded ({reason}): see whether this machine has a network, '
            f'or put the file into {folder} by hand'
        ) from error


def _content(data: bytes, size: int) -> str:
    """Return the SHA-256 of what a gzip file holds, '' if it is damaged or larger than `size`."""
    try:
        inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        content = inflate.decompress(data, size + 1)
    except zlib.error:
        return ''
    return hashlib.sha256(content).hexdigest() if len(content) == size else ''
