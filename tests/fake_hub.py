"""A model hub on this machine, as far as downloading a model needs one."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def start_hub(folder):
    """Serve `folder` as the public model org/tiny, refuse org/gated; returns (address, list of requests with token)."""
    files, requests = {path.name: path for path in Path(folder).iterdir()}, []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path, token = self.path.split("?")[0], self.headers.get("Authorization", "").removeprefix("Bearer ")
            requests.append((self.command, path, token))
            if token == "hf_wrong":
                return self.reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            if "org/gated" in path:
                return self.reply(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            if "org/tiny" not in path:
                return self.reply(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            name = path.rsplit("/", 1)[-1]
            if path.startswith("/api/models/org/tiny/tree/"):
                entries = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in files.items()]
                return self.reply(200, {}, json.dumps(entries).encode())
            if path.startswith("/api/models/org/tiny"):
                body = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                return self.reply(200, {}, json.dumps(body | {"private": False, "tags": [], "downloads": 0}).encode())
            if name not in files:
                return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            body = files[name].read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self.reply(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)

        do_HEAD = do_GET

        def reply(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", requests
