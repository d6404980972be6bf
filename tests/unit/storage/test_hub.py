"""Models on the Hugging Face Hub: a small hub on this machine, asked by the hub's own library."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from internevo.config.hub import may_be_on_hub

COMMIT = "a" * 40
ASK = """
import json, sys
from internevo.errors import UsageError
from internevo.storage.hub import model_folder
answers = []
for name, weights in json.loads(sys.argv[1]):
    try:
        answers.append(sorted(path.name for path in model_folder(name, weights).iterdir()))
    except UsageError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    """What the library asks of the hub: the list of a model's files, and each file. ``root/owner/name`` has them."""

    root: Path
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append((self.path, self.headers.get("authorization")))
        if path[:2] == ["api", "models"]:
            self._describe("/".join(path[2:4]), "tree" in path)
        elif (file := self.root.joinpath(*path[:2], *path[4:])).is_file():
            self._send(200, file.read_bytes(), X_Repo_Commit=COMMIT, ETag=f'"{sha1(file.read_bytes()).hexdigest()}"')
        else:
            self._send(404, b"", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _describe(self, name: str, tree: bool) -> None:
        folder = self.root / name
        if "/revision/gone" in self.path:
            self._send(404, b"{}", X_Error_Code="RevisionNotFound")
            return
        if name == "some/gated":
            self._send(403, b"{}", X_Error_Code="GatedRepo")
            return
        if not folder.is_dir():
            self._send(401, b"{}", X_Error_Code="RepoNotFound")
            return
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        values: Any = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        if tree:
            values = [
                {"type": "file", "path": n, "size": path.stat().st_size, "oid": sha1(path.read_bytes()).hexdigest()}
                for n, path in zip(names, files, strict=True)
            ]
        self._send(200, json.dumps(values).encode(), Content_Type="application/json")

    def _send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def ask(tmp_path: Path, address: str, *questions: tuple[str, bool], **variables: str) -> list[Any]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", **variables}
    command = [sys.executable, "-c", ASK, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode, done.stderr
    return list(json.loads(done.stdout))


def test_models_are_downloaded_once_and_every_failure_says_what_to_do(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    address, handler = hub
    files = {
        "some/new": ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "onnx.bin", "README.md"),
        "some/old": ("config.json", "pytorch_model.bin"),
        "some/empty": ("config.json",),
    }
    for name, names in files.items():
        (tmp_path / "hub" / name).mkdir(parents=True)
        for file in names:
            (tmp_path / "hub" / name / file).write_text(f"{name}/{file}")
    new, old, empty, missing, gated, pinned, gone, proposed = ask(
        tmp_path, address, ("some/new", True), ("some/old", True), ("some/empty", True), ("some/missing", True),
        ("some/gated", True), ("some/new@v1.0", True), ("some/new@gone", True), ("some/new@refs/pr/3", False),
        HF_TOKEN="secret",
    )  # fmt: skip
    assert pinned == new and any("/some/new/revision/v1.0" in path for path, _ in handler.asked)
    assert "config.json" in proposed and any("/some/new/revision/refs%2Fpr%2F3" in path for path, _ in handler.asked)
    assert "the model some/new@gone cannot be had" in gone and "it has no such revision (what comes after @)" in gone
    assert new == ["config.json", "model.safetensors", "tokenizer.json"] and old == ["config.json", "pytorch_model.bin"]
    assert empty == "the model some/empty has no weights on the hub (model*.safetensors or pytorch_model*.bin)"
    tried = f"is not a path here, and the model some/missing cannot be had from {address}: "
    assert tried in missing and "no such name, or your token (HF_TOKEN) may not read it" in missing
    assert "its owner asks for consent" in gated and "secret" not in missing + gated
    assert {token for path, token in handler.asked if "/some/" in path} == {"Bearer secret"}

    asked = len(handler.asked)
    questions = (("some/new", True), ("some/empty", True), ("some/other", False))
    kept, empty, offline = ask(tmp_path, address, *questions, HF_HUB_OFFLINE="1")
    assert kept == new and len(handler.asked) == asked
    assert "has no weights in the hub's cache" in empty
    assert "HF_HUB_OFFLINE is set, and it is not in the cache. Unset it once, or copy the folder here" in offline
    kept, unreachable = ask(tmp_path, "http://127.0.0.1:9", ("some/new", False), ("some/other", False))
    assert kept == new
    assert "from http://127.0.0.1:9: it cannot be reached, and nothing of this name is in the cache" in unreachable


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a/b@feature/x", True), ("a/b@refs/pr/3", True), ("a/b@v1.0", True), ("a/b@", False), ("a/b@x/", False),
        ("a/b@../x", False), ("a/b/c@x", False), ("models/llama@feature/x", False),
        ("HuggingFaceTB/SmolLM2-135M", True), ("a/b.c_d-e", True), ("models/llama", False), ("runs", False), ("./a/b", False),
        ("../a/b", False), ("/a/b", False), ("~/b", False), ("a/b/c", False), ("a/", False), ("data/train.jsonl", False),
        ("a/tokenizer.json", False), ("a b/c", False), ("", False), (None, False), ("http://x", False), ("\u00e9/b", False),
    ],
)  # fmt: skip
def test_a_path_is_not_taken_for_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, is_one: bool
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert may_be_on_hub(name) == is_one
