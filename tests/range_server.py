"""A store that is none: files over HTTP with ranges, which fails and hangs when it is told to."""

import contextlib
import http.server
import pathlib
import threading
import urllib.parse


class Store:
  """Serves `root` at `url`. `faults` are used up, one a GET of a range (or of all with `anywhere`).

  "503", "429", "403": that status; "drop": the connection ends in the middle of the body; "short":
  fewer bytes, honestly counted; "hang": no answer until the store is closed; "whole": the range is
  passed over; "etag": none.
  """

  def __init__(self, root: pathlib.Path):
    self.root, self.faults, self.anywhere = root, [], False
    self.requests: list[tuple[str, str, str]] = []  # method, path, range
    self.released = threading.Event()
    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
    self.server.daemon_threads = True
    self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

  def ranges(self) -> list[str]:
    return [asked for method, _, asked in self.requests if asked]


@contextlib.contextmanager
def serve(root: pathlib.Path):
  store = Store(root)
  thread = threading.Thread(target=store.server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  try:
    yield store
  finally:
    store.released.set()
    store.server.shutdown()
    store.server.server_close()
    thread.join()


def _handler(store: Store):
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
      pass

    def do_HEAD(self):
      self.answer(body=False)

    def do_GET(self):
      self.answer(body=True)

    def answer(self, body):
      asked = self.headers.get("Range", "")
      store.requests.append((self.command, self.path, asked))
      fault = ""
      if ((asked and body) or store.anywhere) and store.faults:
        fault = store.faults.pop(0)
      if fault == "hang":
        store.released.wait()
        self.close_connection = True
        return
      if fault.isdecimal():
        self.send(int(fault), b"no", {}, body)
        return
      path = store.root / urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/")
      if path.is_dir():
        names = [p.name + "/" * p.is_dir() for p in path.iterdir()]
        links = "".join(f'<a href="{name}">x</a>' for name in ["?C=N;O=D", "../", *names])
        self.send(200, links.encode(), {"Content-Type": "text/html"}, body)
        return
      if not path.is_file():
        self.send(404, b"", {}, body)
        return
      data = path.read_bytes()
      headers = {"Accept-Ranges": "bytes", "ETag": f'"{hash(data)}"'}
      status = 200
      if asked and fault != "whole":
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        data, status = data[start:stop], 206
      if fault == "short":
        data = data[: len(data) // 2]
      if fault == "drop":
        headers["Content-Length"] = str(len(data))
        data, self.close_connection = data[: len(data) // 2], True
      self.send(status, data, headers, body)

    def send(self, status, data, headers, body):
      self.send_response(status)
      for name, value in {"Content-Length": str(len(data)), **headers}.items():
        self.send_header(name, value)
      self.end_headers()
      if body:
        self.wfile.write(data)

  return Handler
