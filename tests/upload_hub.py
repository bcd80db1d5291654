"""A hub for uploads, on the loopback interface: repositories in memory, created and committed to
over HTTP.

    with UploadHub(token="hf_secret") as hub:
        ...                                     # a client with HF_ENDPOINT=hub.url
    hub.repositories["user/name"].files["config.json"]

It knows what huggingface_hub's create_repo, model_info and create_commit ask for, and nothing else.
"""

import base64
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class UploadHub:
    """`tokens` collects the Authorization headers that came; a wrong one is refused with a message
    that repeats it, as careless servers do."""

    def __init__(self, token: str):
        self.token = token
        self.tokens: set[str] = set()
        self.repositories: dict[str, Repository] = {}
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub

    def log_message(self, *arguments):
        pass

    def answer(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def allowed(self):
        sent = self.headers.get("Authorization", "")
        self.hub.tokens.add(sent)
        if sent != f"Bearer {self.hub.token}":
            self.answer(403, {"error": f"{sent} may not write here"})
        return sent == f"Bearer {self.hub.token}"

    def do_GET(self):
        found = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(\?.*)?", self.path)
        repository = self.hub.repositories.get(found[1]) if found else None
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            self.answer(
                200, {"id": found[1], "private": repository.private, "siblings": [], "tags": []}
            )

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.allowed():
            return None
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.hub.repositories[name] = Repository(private)
            return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})
        found = re.fullmatch(r"/api/models/(.+?/.+?)/(preupload|commit)/main(\?.*)?", self.path)
        repository = self.hub.repositories.get(found[1]) if found else None
        if repository is None:
            return self.answer(
                404, {"error": f"nothing at {self.path}"}, X_Error_Code="RepoNotFound"
            )
        if found[2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                assert item["value"]["encoding"] == "base64"
                repository.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        repository.commits += 1
        commit = f"{repository.commits:040x}"
        address = f"{self.hub.url}/{found[1]}/commit/{commit}"
        return self.answer(200, {"commitUrl": address, "commitOid": commit, "success": True})
