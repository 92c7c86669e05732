"""A small Hugging Face hub on this machine: the few requests that huggingface_hub makes, recorded."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAIN = "a" * 40  # the commit of revision main
OLD = "b" * 40  # of revision v1, where a repository has one
REVISIONS = {"main": MAIN, "v1": OLD, MAIN: MAIN, OLD: OLD}


class Hub:
    """Serves ROOT/ORG/NAME/COMMIT as the repositories ORG/NAME."""

    def __init__(self, root):
        self.root = Path(root)
        self.refused = {}  # {ORG/NAME: (status, X-Error-Code)} of its files
        self.hidden = {}  # the same of the repository itself
        self.fetched = []  # ORG/NAME/FILE of each download
        self.asked = 0  # how many requests there were
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home):
        """The variables of a process that uses this hub, with `home` for its cache."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}

    def close(self):
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def files(self, name, commit):
        """The paths of a repository's files."""
        folder = self.root / name / commit
        return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


class Handler(BaseHTTPRequestHandler):
    """/api/models/ORG/NAME[/revision/REVISION], .../tree/COMMIT and /ORG/NAME/resolve/COMMIT/FILE."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.asked += 1
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        about = parts[:2] == ["api", "models"]
        org, name, *rest = parts[2:] if about else parts
        repository = f"{org}/{name}"
        verb, revision, *path = rest or ["revision", "main"]
        commit = REVISIONS.get("/".join([revision, *path]) if about else revision)
        if repository in self.hub.hidden:
            self.refuse(*self.hub.hidden[repository])
        elif not (self.hub.root / repository).is_dir():
            self.refuse(404, "RepoNotFound")
        elif not commit or not (self.hub.root / repository / commit).is_dir():
            self.refuse(404, "RevisionNotFound")
        elif verb == "revision":
            siblings = [{"rfilename": file} for file in self.hub.files(repository, commit)]
            self.send_json({"id": repository, "sha": commit, "siblings": siblings})
        elif verb == "tree":
            folder = self.hub.root / repository / commit
            rows = []
            for file in self.hub.files(repository, commit):
                size = (folder / file).stat().st_size
                rows.append({"type": "file", "path": file, "size": size, "oid": digest(folder / file)})
            self.send_json(rows)
        elif repository in self.hub.refused:
            self.refuse(*self.hub.refused[repository])
        else:
            self.send_file(repository, commit, "/".join(path))

    def send_file(self, repository, commit, path):
        file = self.hub.root / repository / commit / path
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(f"{repository}/{path}")
        self.answer(200, file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit})

    def send_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code):
        self.answer(status, b"", {"X-Error-Code": code} if code else {})

    def answer(self, status, data, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def digest(file):
    """What the hub's ETag of a file is: a hash of its bytes."""
    return hashlib.sha1(file.read_bytes()).hexdigest()
