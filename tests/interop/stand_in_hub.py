"""A server that answers as the Hugging Face hub does where files of models are fetched."""

import contextlib
import hashlib
import http.server
import threading
from dataclasses import dataclass, field


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """Repositories by name, and what goes wrong.

    Attributes:
      files: contents by name, of each repository and revision.
      refused: (status, X-Error-Code) of repositories that are not for everybody.
      failures: statuses of the next answers.
      cut: bytes that bodies of files lack at their end.
      requests: (method, path) of all requests.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    cut: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ''

    def put(self, repository: str, files: dict[str, bytes], revision: str = 'main') -> str:
        """Commit files; returns the commit."""
        commit = commit_of(files)
        self.files[repository, revision] = self.files[repository, commit] = files
        return commit


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    if hub.failures:
        return hub.failures.pop(0), {}, b''
    repository, _, rest = path.strip('/').partition('/resolve/')
    revision, _, file = rest.partition('/')
    if repository in hub.refused:
        status, code = hub.refused[repository]
        return status, {'X-Error-Code': code}, b''
    if not any(known == repository for known, _ in hub.files):
        return 404, {'X-Error-Code': 'RepoNotFound'}, b''
    files = hub.files.get((repository, revision))
    if files is None:
        return 404, {'X-Error-Code': 'RevisionNotFound'}, b''
    headers = {'X-Repo-Commit': commit_of(files)}
    if file not in files:
        return 404, {**headers, 'X-Error-Code': 'EntryNotFound'}, b''
    etag = hashlib.sha256(files[file]).hexdigest()
    return 200, {**headers, 'ETag': f'"{etag}"'}, files[file]


@contextlib.contextmanager
def serve():
    """Context with a hub that runs."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            hub.requests.append((self.command, self.path))
            status, headers, body = answer(hub, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(body[: len(body) - hub.cut])
                self.close_connection = bool(hub.cut)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('localhost', 0), Handler) as server:
        hub.url = f'http://localhost:{server.server_port}'
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
