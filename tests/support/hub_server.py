"""A stand-in for the Hugging Face Hub: the two or three answers that a download needs."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@contextmanager
def hub(models: dict[str, dict[str, Path]]):
    """Serve models at an address of this machine.

    Args:
        models: id -> revision -> folder; an id that begins with "gated/" is refused.

    Yields:
        (address, list of the paths that were asked for).
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code):
            self.reply(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo, kind, rest = "/".join(parts[:2]), parts[2:3], parts[3:]
            if repo.startswith("gated/"):
                return self.refuse(403, "GatedRepo")
            if repo not in models:
                return self.refuse(404, "RepoNotFound")
            revision = rest[0] if rest else "main"
            revision = next((n for n, c in COMMITS.items() if c == revision), revision)
            folder = models[repo].get(revision)
            if folder is None:
                return self.refuse(404, "RevisionNotFound")
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            if api and kind == ["tree"]:
                tree = [
                    {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size,
                     "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                    for p in files
                ]  # fmt: skip
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            if api:
                info = {
                    "id": repo, "modelId": repo, "sha": COMMITS[revision], "private": False, "tags": [],
                    "siblings": [{"rfilename": str(p.relative_to(folder))} for p in files],
                }  # fmt: skip
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            file = folder / "/".join(rest[1:])
            if not file.is_file():
                return self.refuse(404, "EntryNotFound")
            body = file.read_bytes()
            etag = hashlib.sha1(body).hexdigest()
            return self.reply(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMITS[revision])

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
