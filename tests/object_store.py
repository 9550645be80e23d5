"""A real object store on this machine for tests: SeaweedFS, whose server is one file, from PyPI."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cadetlib import processes

WEED = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [one.getsockname()[1] for one in sockets]


class Store:
    """SeaweedFS on this machine, with a bucket in a folder; a lab's key may do no more with it than scoring needs."""

    parts = ("master", "volume", "filer", "s3", "admin")
    off = ("master.telemetry", "webdav", "s3.autoCreateBucket")  # the first would report to its makers

    def __init__(self, folder: Path) -> None:
        ports = dict(zip([f"{part}.port{kind}" for part in self.parts for kind in ("", ".grpc")], free_ports(10), strict=True))
        self.ports, self.port = [*ports.values()], ports["s3.port"]
        rights = {"owner": ["Admin"], "lab": ["Read:bucket/lab*", "List:bucket/lab*", "Write:bucket/lab/p_values*"]}
        rights["lister"] = ["List:bucket/lab*"]
        keys = {name: [{"accessKey": name, "secretKey": f"secret-of-{name}"}] for name in rights}
        identities = [{"name": name, "credentials": keys[name], "actions": rights[name]} for name in rights]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        options = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "bucket": "bucket"}
        options |= ports | dict.fromkeys(self.off, "false") | {"s3.port.iceberg": 0, "s3.port.lance": 0}
        options["s3.config"] = folder / "s3.json"
        self.command = [WEED, "mini", *(f"-{name}={value}" for name, value in options.items())]
        self.log = folder / "log"

    def start(self) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}  # weed would let the key in it do everything
        with self.log.open("wb") as log:
            output = dict(stdout=log, stderr=log)
            self.process = subprocess.Popen(self.command, env=clean, preexec_fn=processes.die_with_parent, **output)
        deadline = time.monotonic() + 60
        while "components are running" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()  # asked to end, it may take half a minute
        self.process.wait()
        for port in self.ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()

    @contextmanager
    def overloaded(self) -> Iterator[Counter[str]]:
        """Another server in its place, which answers 503 -> how often it was asked for what."""
        asked = Counter()

        class Overloaded(BaseHTTPRequestHandler):
            def do_GET(self):
                asked[self.path] += 1
                self.send_error(503)

            do_HEAD = do_PUT = do_POST = do_GET
            log_message = staticmethod(lambda *_: None)

        self.stop()
        with ThreadingHTTPServer(("127.0.0.1", self.port), Overloaded) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                yield asked
            finally:
                server.shutdown()
        self.start()
