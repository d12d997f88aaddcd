"""A folder behind HTTP with byte ranges, in a process of its own: range_server.py FOLDER LOG.

Prints its port and notes path and range of every request. A public S3 bucket is no more than this.
GDAL opens URLs with the lock of Python held, so a thread of the reader could not answer.
"""

import http.server
import re
import sys
from pathlib import Path

FOLDER, LOG = Path(sys.argv[1]), Path(sys.argv[2])


class Serve(http.server.BaseHTTPRequestHandler):
    """Answers with files, or parts of them; `bucket/` is the folder, too."""

    def do_GET(self) -> None:
        span = self.headers.get("Range", "")
        with LOG.open("a") as log:
            log.write(f"{self.path} {span}\n")
        file = FOLDER / self.path.split("?")[0].strip("/").removeprefix("bucket/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
        first = int(found[1]) if found else 0
        stop = min(int(found[2]) + 1, len(content)) if found and found[2] else len(content)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - first))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first:stop])

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serve)
print(server.server_port, flush=True)
server.serve_forever()
