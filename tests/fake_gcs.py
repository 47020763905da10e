"""A stand-in for Google Cloud Storage on loopback: as much of its JSON API as gcsfs, tensorstore and google-cloud-storage use here.

Written from the public reference of the API. Objects have generations, and writes and deletions hold to `ifGenerationMatch`,
by which tensorstore makes its updates atomic. Listings come in short pages, so that all of them must be asked for.
"""

import itertools
import json
import re
import sys
import threading
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 7  # entries of a listing


class Refused(Exception):
    """An answer that is no success: an HTTP status."""


class FakeGCS(ThreadingHTTPServer):
    """Serves from a thread, as a context. `objects` maps (bucket, name) to content and generation."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets, self.lock = set(buckets), threading.RLock()
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, dict] = {}
        self.refuse = lambda method, name: None  # a status instead of an answer, such as 403
        self.unknown: list[str] = []  # requests that this server does not understand
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        if not isinstance(
            sys.exception(), ConnectionError
        ):  # a client may go away: gcsfs asks two things and needs one
            super().handle_error(request, client_address)

    def names(self, prefix: str, bucket: str = "bucket") -> list[str]:
        with self.lock:
            return sorted(name for where, name in self.objects if where == bucket and name.startswith(prefix))

    def number(self) -> int:
        return next(self._numbers)

    def check(self, key: tuple[str, str], query: dict[str, str]) -> None:
        generation = self.objects[key][1] if key in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise Refused(412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise Refused(304)

    def write(self, key: tuple[str, str], content: bytes, query: dict[str, str]) -> dict:
        with self.lock:
            if key[0] not in self.buckets:
                raise Refused(404)
            self.check(key, query)
            self.objects[key] = content, self.number()
            return self.about(key)

    def read(self, key: tuple[str, str], query: dict[str, str]) -> tuple[bytes, int]:
        with self.lock:
            if key not in self.objects:
                raise Refused(404)
            self.check(key, query)
            return self.objects[key]

    def remove(self, key: tuple[str, str], query: dict[str, str]) -> None:
        with self.lock:
            self.read(key, query)
            del self.objects[key]

    def about(self, key: tuple[str, str]) -> dict:
        content, generation = self.objects[key]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "id": f"{key[0]}/{key[1]}/{generation}",
            "bucket": key[0],
            "name": key[1],
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "timeCreated": time,
            "updated": time,
        }

    def listing(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after, size = query.get("pageToken", ""), min(int(query.get("maxResults", PAGE)), PAGE)
        with self.lock:
            if bucket not in self.buckets:
                raise Refused(404)
            found: dict[str, dict | None] = {}
            for name in self.names(prefix, bucket):
                if name < query.get("startOffset", "") or ("endOffset" in query and name >= query["endOffset"]):
                    continue
                head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                found[prefix + head + mark if mark else name] = None if mark else self.about((bucket, name))
        shown = [entry for entry in found.items() if entry[0] > after]
        page = shown[:size]
        answer = {
            "kind": "storage#objects",
            "items": [item for _, item in page if item],
            "prefixes": [name for name, item in page if not item],
        }
        return answer | ({"nextPageToken": page[-1][0]} if len(shown) > size else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeGCS

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def answer(self):
        body = self.body()
        where = urlsplit(self.path)
        query = dict(parse_qsl(where.query))
        try:
            if status := self.server.refuse(self.command, unquote(where.path) + "?" + query.get("name", "")):
                raise Refused(status)
            for method, pattern, act in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, where.path)):
                    return self.say(*act(self, *(unquote(part) for part in match.groups()), query, body))
            self.server.unknown.append(f"{self.command} {self.path}")
            raise Refused(404)
        except Refused as refused:
            (status,) = refused.args
            said = {"error": {"code": status, "message": f"the stand-in says {status}", "errors": []}}
            self.say(status, b"" if status == 304 else json.dumps(said).encode())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def say(self, status: int, content: bytes | dict = b"", headers: dict[str, str] | None = None) -> None:
        plain = isinstance(content, bytes)
        data = content if plain else json.dumps(content).encode()
        self.send_response(status)
        said = {"Content-Type": "application/octet-stream" if plain else "application/json", **(headers or {})}
        for name, value in {**said, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def bucket(self, bucket, query, body):
        if bucket not in self.server.buckets:
            raise Refused(404)
        return 200, {"kind": "storage#bucket", "name": bucket, "id": bucket}

    def make_bucket(self, query, body):
        self.server.buckets.add(json.loads(body)["name"])
        return 200, {"kind": "storage#bucket"}

    def list(self, bucket, query, body):
        return 200, self.server.listing(bucket, query)

    def get(self, bucket, name, query, body):
        if query.get("alt") != "media" and not self.path.startswith("/download"):
            with self.server.lock:
                self.server.read((bucket, name), query)
                return 200, self.server.about((bucket, name))
        content, generation = self.server.read((bucket, name), query)
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return 200, content, headers
        first, last = found.groups()
        begin = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if begin >= len(content):
            raise Refused(416)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        return 206, content[begin:end], headers

    def delete(self, bucket, name, query, body):
        self.server.remove((bucket, name), query)
        return 204, b""

    def upload(self, bucket, query, body):
        if "upload_id" in query:
            return self.upload_more(bucket, query, body)
        kind = query["uploadType"]
        if kind == "media":
            return 200, self.server.write((bucket, query["name"]), body, query)
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            about, content = BytesParser().parsebytes(head + body).get_payload()
            name = query.get("name") or json.loads(about.get_payload())["name"]
            return 200, self.server.write((bucket, name), content.get_payload(decode=True), query)
        number = str(self.server.number())
        name = query.get("name") or json.loads(body)["name"]
        self.server.uploads[number] = {"key": (bucket, name), "query": query, "content": b""}
        return 200, {}, {"Location": f"{self.server.url}{urlsplit(self.path).path}?upload_id={number}"}

    def upload_more(self, bucket, query, body):
        upload = self.server.uploads[query["upload_id"]]
        upload["content"] += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return 308, b"", {"Range": f"bytes=0-{len(upload['content']) - 1}"}
        return 200, self.server.write(upload["key"], upload["content"], upload["query"])

    def rewrite(self, bucket, name, to_bucket, to_name, query, body):
        content, _ = self.server.read((bucket, name), {})
        made = self.server.write((to_bucket, to_name), content, query)
        return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": made}

    def move(self, bucket, name, to_name, query, body):
        with self.server.lock:
            content, _ = self.server.read((bucket, name), {})
            made = self.server.write((bucket, to_name), content, query)
            self.server.remove((bucket, name), {})
            return 200, made


B, O = r"/storage/v1/b/([^/]+)", r"/o/([^/]+)"
ROUTES = [
    ("GET", B, Handler.bucket),
    ("POST", "/storage/v1/b", Handler.make_bucket),
    ("GET", B + "/o", Handler.list),
    ("GET", "(?:/download)?" + B + O, Handler.get),
    ("DELETE", B + O, Handler.delete),
    ("POST", "/upload" + B + "/o", Handler.upload),
    ("PUT", "/upload" + B + "/o", Handler.upload_more),
    ("POST", B + O + "/rewriteTo/b/([^/]+)" + O, Handler.rewrite),
    ("POST", B + O + "/moveTo" + O, Handler.move),
]
