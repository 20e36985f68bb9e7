"""A tiny archive built like CIFAR-10's, and a local server to download it from."""

import hashlib
import io
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np

ARCHIVE = "cifar-10-python.tar.gz"


class Python2Pickler(pickle._Pickler):  # the one in Python, of which methods can be replaced
    """Writes pickles as CIFAR-10's authors did: strings are bytes, NumPy's module is numpy.core."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + len(data).to_bytes(4, "little") + data)  # BINSTRING
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_bytes


def pickled_by_python_2(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def tiny_cifar10():
    """Return an archive built like CIFAR-10's, 2 images a batch, and the files' MD5 sums."""
    rng = np.random.default_rng(0)
    files = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        images = rng.integers(0, 256, (2, 3072), np.uint8)
        files[name] = {"data": images, "labels": [3, 5]}
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    archive, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            data = pickled_by_python_2(content)
            sums[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sums[ARCHIVE] = hashlib.md5(archive.getvalue()).hexdigest()
    return archive.getvalue(), sums


class Mirror(ThreadingHTTPServer):
    """Serves one archive; a test may set another answer, and when it comes."""

    def __init__(self, archive):
        super().__init__(("127.0.0.1", 0), Answer)
        self.archive, self.body = archive, archive
        self.status, self.downloads = 200, 0
        self.open = threading.Event()
        self.open.set()
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz"

    def handle_error(self, request, client_address):
        pass  # a client that hangs up


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.downloads += 1
        self.server.open.wait(60)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.archive)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass
