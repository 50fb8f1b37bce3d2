"""A model hub on this machine, as far as downloading a model and uploading an adapter need one."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    address: str
    requests: list  # (method, path, token)
    created: dict  # repository -> whether it is private
    uploaded: dict  # repository/file -> its bytes


def start_hub(folder):
    """Serve `folder` as the public model org/tiny, refuse org/gated, and take uploads with the token hf_secret."""
    files, requests, created, uploaded = {path.name: path for path in Path(folder).iterdir()}, [], {}, {}

    class Handler(BaseHTTPRequestHandler):
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

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            requests.append((self.command, self.path, token))
            if token != "hf_secret":
                return self.reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                created[name := f"{asked.get('organization') or 'you'}/{asked['name']}"] = (
                    asked["visibility"] == "private"
                )
                return self.reply_json({"url": f"http://{self.headers['Host']}/{name}"})
            if self.path == "/api/validate-yaml":
                return self.reply_json({"warnings": [], "errors": []})
            repository = "/".join(self.path.split("/")[3:5])
            if "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                return self.reply_json({"files": modes})
            assert "/commit/" in self.path, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    uploaded[f"{repository}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
            self.reply_json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

        def reply_json(self, content):
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def reply(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Hub(f"http://127.0.0.1:{server.server_port}", requests, created, uploaded)
