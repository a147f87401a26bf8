# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A Hub on 127.0.0.1 for the real client: models, and datasets to read, in memory, with faults by route.

Standard library only.

It keeps an upload only when it is complete and its sha256 is right, refuses a commit that names a missing object or
whose parent is not the head, and sends downloads of large files to another origin, where no token may arrive.
"""

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
API = "/api/(?:models|datasets)"
ROUTES = (  # name, method, path
    ("whoami", "GET", r"/api/whoami-v2"),
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("refs", "GET", rf"/api/models/{REPO}/refs"),
    ("tree", "GET", rf"{API}/{REPO}/tree/{REVISION}(/.*)?"),
    ("paths", "POST", rf"{API}/{REPO}/paths-info/{REVISION}"),
    ("branch", "POST", rf"/api/models/{REPO}/branch/{REVISION}"),
    ("preupload", "POST", rf"/api/models/{REPO}/preupload/{REVISION}"),
    ("commit", "POST", rf"/api/models/{REPO}/commit/{REVISION}"),
    ("info", "GET", rf"{API}/{REPO}(/revision/{REVISION})?"),
    ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/_store/(?P<oid>\w{64})"),
    ("download", "GET", r"/_cdn/(?P<oid>\w{64})"),
    ("download", "HEAD", r"/_cdn/(?P<oid>\w{64})"),
    ("resolve", "GET", rf"(/datasets)?/{REPO}/resolve/{REVISION}/(?P<path>.+)"),
    ("resolve", "HEAD", rf"(/datasets)?/{REPO}/resolve/{REVISION}/(?P<path>.+)"),
)
LICENSES = "apache-2.0 mit cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 openrail creativeml-openrail-m other".split()
LARGE = 1 << 16  # bytes; weights are large whatever their size
ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Repo:
    private: bool = False
    gated: object = False
    readers: set = field(default_factory=set)  # who may see a gated one
    heads: dict = field(default_factory=dict)  # branch, or refs/pr/N, to commit
    commits: list = field(default_factory=list)  # (id, title, parent, {path: content}), oldest first

    def add(self, ref, title, parent, files) -> str:
        listed = json.dumps([title, parent, sorted((p, hashlib.sha256(c).hexdigest()) for p, c in files.items())])
        commit = hashlib.sha1(f"{len(self.commits)} {listed}".encode()).hexdigest()
        self.commits.append((commit, title, parent, files))
        self.heads[ref] = commit
        return commit

    def resolve(self, revision) -> str | None:
        known = [commit for commit, *_ in self.commits]
        return self.heads.get(revision, revision if revision in known else None)

    def files(self, revision="main") -> dict[str, bytes]:
        commit = self.resolve(revision)
        return next(files for name, _, _, files in self.commits if name == commit)


class Refusal(Exception):
    def __init__(self, status, code="", message="", **headers):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message, **headers}


class LoopbackHub:
    """`url` is the endpoint. Use as a context manager.

    `faults` maps a name of ROUTES to a list of faults, each of which happens once, in order: a status, "reset" (the
    connection is dropped before anything is done), "lost" (it is done, and dropped then), "cut" (half of the answer),
    "slow" (a quarter of a second), "flip" (a wrong byte, in what was sent or in the answer), "page" (of a proxy in the
    Hub's place), or a callable that is called. The list can be endless: `itertools.repeat`.
    """

    def __init__(self):
        self.repos, self.objects, self.faults, self.log = {}, {}, {}, []
        self.tokens = {"hf_loopback_writer_token": ("me", "write")}
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            def __init__(self, *args):
                self.hub = hub
                super().__init__(*args)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def clear(self):
        """Forget everything but the tokens."""
        self.faults, self.log = {}, []
        self.repos.clear()
        self.objects.clear()
        self.tokens = {"hf_loopback_writer_token": ("me", "write")}

    def publish(self, repo_id, files: dict[str, bytes]) -> Repo:
        """A repository that somebody else has made."""
        repo = self.repos[repo_id] = Repo()
        repo.add("main", "initial commit", None, {".gitattributes": b""})
        repo.add("main", "upload", repo.heads["main"], {".gitattributes": b"", **files})
        for content in files.values():
            self.objects[hashlib.sha256(content).hexdigest()] = content
        return repo

    # ------------------------------------------------------------------------------------------------------- answers

    def who(self, authorization):
        token = (authorization or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def repo(self, repo_id, user, *, write=False, content=False) -> Repo:
        repo = self.repos.get(repo_id)
        mine = user is not None and repo_id.split("/")[0] == user[0]
        if repo is None or (repo.private and not mine):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (mine and user[1] == "write"):
            raise Refusal(403, message="You don't have the rights to do this")
        if content and repo.gated and not mine and not (user and user[0] in repo.readers):
            raise Refusal(403 if user else 401, "GatedRepo", "Access to this model is restricted")
        return repo

    def revision(self, repo, revision) -> str:
        commit = repo.resolve(unquote(revision or "main"))
        if commit is None:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit

    def whoami(self, request):
        if request.user is None:
            raise Refusal(401, message="Invalid username or password.")
        name, role = request.user
        return {"name": name, "type": "user", "orgs": [], "auth": {"accessToken": {"displayName": "t", "role": role}}}

    def create(self, request):
        asked, user = request.json(), request.user
        if user is None:
            raise Refusal(401, message="Invalid username or password.")
        repo_id = f"{asked.get('organization') or user[0]}/{asked['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id.split("/")[0] != user[0] or user[1] != "write":
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.repos:
            return 409, {**answer, "error": "You already created this model repo"}
        self.repos[repo_id] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.repos[repo_id].add("main", "initial commit", None, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return answer

    def validate(self, request):
        errors = card_errors(request.json()["content"])
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}

    def info(self, request, repo, revision=None):
        found = self.repo(repo, request.user)
        commit = self.revision(found, revision)
        siblings = [{"rfilename": path} for path in found.files(commit)]
        known = {"id": repo, "modelId": repo, "private": found.private, "gated": found.gated, "tags": []}
        return {**known, "sha": commit, "siblings": siblings, "downloads": 0, "likes": 0}

    def refs(self, request, repo):
        heads = self.repo(repo, request.user).heads
        named = [{"name": n.removeprefix("refs/pr/"), "ref": n, "targetCommit": c} for n, c in heads.items()]
        pulls = [ref for ref in named if ref["ref"].startswith("refs/pr/")]
        branches = [{**ref, "ref": f"refs/heads/{ref['name']}"} for ref in named if ref not in pulls]
        return {"branches": branches, "converts": [], "tags": [], "pullRequests": pulls}

    def branch(self, request, repo, revision):
        found = self.repo(repo, request.user, write=True)
        name = unquote(revision)
        if name in found.heads:
            raise Refusal(409, message="Reference already exists")
        start = request.json().get("startingPoint") if request.body else None
        found.heads[name] = self.revision(found, start)
        return {}

    def tree(self, request, repo, revision):
        found = self.repo(repo, request.user)
        return [entry(path, content) for path, content in found.files(self.revision(found, revision)).items()]

    def paths(self, request, repo, revision):
        asked = parse_qs(request.body.decode()).get("paths", [])
        return [item for item in self.tree(request, repo, revision) if item["path"] in asked]

    def preupload(self, request, repo, revision):
        pull = "create_pr" in request.query
        found = self.repo(repo, request.user, write=not pull)
        there = found.files(self.revision(found, revision))
        answers = []
        for file in request.json()["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            known = entry(file["path"], there[file["path"]]) if file["path"] in there else {}
            oid = known.get("lfs", {}).get("oid") or known.get("oid")
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, request, repo):
        self.repo(repo, request.user)
        answers = []
        for wanted in request.json()["objects"]:
            upload = {"upload": {"href": f"{self.url}/_store/{wanted['oid']}"}}
            answers.append({**wanted, **({} if wanted["oid"] in self.objects else {"actions": upload})})
        return {"transfer": "basic", "objects": answers}

    def put(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(422, message="The content does not have the announced sha256")
        self.objects[oid] = request.body
        return {}

    def commit(self, request, repo, revision):
        pull = "create_pr" in request.query
        found = self.repo(repo, request.user, write=not pull)
        ref = unquote(revision)
        head = self.revision(found, ref)
        lines = [json.loads(line) for line in request.body.decode().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(found.files(head))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, message="The commit names an object that was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(name.startswith("refs/pr/") for name in found.heads) + 1
        commit = found.add(f"refs/pr/{number}" if pull else ref, header["summary"], head, files)
        answer = {"commitOid": commit, "commitUrl": f"{self.url}/{repo}/commit/{commit}"}
        return answer | ({"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if pull else {})

    def resolve(self, request, repo, revision, path):
        found = self.repo(repo, request.user, content=True)
        commit = self.revision(found, revision)
        content = found.files(commit).get(unquote(path))
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        item = entry(unquote(path), content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{item["oid"]}"'}
        if "lfs" not in item:
            return request.bytes(content, headers)
        oid = item["lfs"]["oid"]
        large = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": f"{self.cdn}/_cdn/{oid}"}
        return request.bytes(b"", headers | large, status=302)

    def download(self, request, oid):
        return request.bytes(self.objects[oid], {"ETag": f'"{oid}"'})


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # answers are small, and written in two parts

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer(self):
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = None
        routes = ((name, re.fullmatch(path, split.path)) for name, method, path in ROUTES if method == self.command)
        name, match = next(((name, match) for name, match in routes if match), (None, None))
        self.hub.log.append((name or split.path, self.command, self.headers.get("Authorization"), split.path))
        if name is None:
            return self.bytes(b"", {"X-Error-Code": "EntryNotFound"}, status=404)
        with self.hub.lock:
            self.fault = next(iter(self.hub.faults.get(name, ())), None)
            if isinstance(self.hub.faults.get(name), list) and self.fault is not None:
                self.hub.faults[name].pop(0)
        if self.befallen():
            return None
        if self.fault == "flip" and self.body:
            self.body = flipped(self.body)
        try:
            self.user = self.hub.who(self.headers.get("Authorization"))
            with self.hub.lock:
                given = {key: value for key, value in match.groupdict().items() if value is not None}
                answer = getattr(self.hub, name)(self, **given)
        except Refusal as refusal:
            return self.bytes(b"{}", refusal.headers, status=refusal.status)
        except (KeyError, UnicodeDecodeError, ValueError):  # a byte of the request was wrong
            return self.bytes(b'{"errors": [{"message": "malformed request"}]}', {}, status=400)
        if self.fault == "lost":
            return self.drop()
        if answer is not None:
            status, value = answer if isinstance(answer, tuple) else (200, answer)
            self.bytes(json.dumps(value).encode(), {"Content-Type": "application/json"}, status=status)

    def befallen(self) -> bool:
        """Whether a fault has taken the place of an answer."""
        if callable(self.fault):
            self.fault()
        elif self.fault == "slow":
            time.sleep(0.25)
        elif self.fault == "reset":
            self.drop()
        elif self.fault == "page":
            self.bytes(b"<html>Bad Gateway</html>", {}, status=502)
        elif isinstance(self.fault, int):
            error = json.dumps({"error": f"fault {self.fault}"}).encode()
            self.bytes(error, {"Retry-After": "0"} if self.fault == 429 else {}, status=self.fault)
        return self.fault in ("reset", "page") or isinstance(self.fault, int)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def json(self):
        return json.loads(self.body)

    def bytes(self, content, headers, status=200):
        """The answer, or the part of it that a Range asks for, or what a fault makes of it."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            content, status = content[start : end + 1], 206
        if self.fault == "flip" and self.command == "GET":
            content = flipped(content)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def drop(self):
        """End the connection as a crash does, with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content


def is_large(path, size) -> bool:
    return path.endswith((".safetensors", ".bin")) or size > LARGE


def entry(path, content) -> dict:
    """A file as the Hub lists it."""
    size = len(content)
    plain = hashlib.sha1(f"blob {size}\0".encode() + content).hexdigest()
    if not is_large(path, size):
        return {"type": "file", "path": path, "size": size, "oid": plain}
    oid = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
    pointer_oid = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()
    large = {"oid": oid, "size": size, "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": size, "oid": pointer_oid, "lfs": large}


def card_errors(content: str) -> list[str]:
    """What is wrong with a model card's metadata: the Hub's documented rules for the fields that cards here have."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]

    def texts(name):
        value = data.get(name, [])
        return [value] if isinstance(value, str) else value if isinstance(value, list) else [None]

    rules = {
        '"license" must be one of the known identifiers': data.get("license", "mit") in LICENSES,
        '"license_name" belongs to license: other': "license_name" not in data or data.get("license") == "other",
        '"license_link" must be an address': str(data.get("license_link", "https://")).startswith("https://"),
        '"base_model" must be ids': all(ID.fullmatch(str(name)) for name in texts("base_model")),
        '"datasets" must be ids': all(ID.fullmatch(str(name)) for name in texts("datasets")),
        '"tags" must be text': all(isinstance(tag, str) for tag in texts("tags")),
        '"pipeline_tag" must be a task': data.get("pipeline_tag", "text-to-image") == "text-to-image",
        '"base_model_relation" must be known': data.get("base_model_relation", "finetune")
        in ("finetune", "adapter", "merge", "quantized"),
        '"widget" must be a list of mappings with text': all(
            isinstance(item, dict) and isinstance(item.get("text"), str) for item in data.get("widget", [])
        ),
        '"model-index" must have name, results, task.type, dataset.type, dataset.name, metrics': all(
            map(_is_model_index, data.get("model-index", []))
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _is_model_index(item) -> bool:
    try:
        return bool(item["name"]) and all(
            result["task"]["type"]
            and result["dataset"]["type"]
            and result["dataset"]["name"]
            # a number, as the Hub cannot show anything else
            and all(metric["type"] and isinstance(metric["value"], (int, float)) for metric in result["metrics"])
            for result in item["results"]
        )
    except (KeyError, TypeError):
        return False
