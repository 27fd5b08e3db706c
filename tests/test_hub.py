"""Recipes in folders and on the Hugging Face Hub, of which a server on this machine plays the part."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

import afbs_compile
from afbs_compile import Recipe
from afbs_compile.errors import RecipeError
from tests.toy import Toy, drifting, without_a_clock

hub = pytest.importorskip("huggingface_hub")

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        without_a_clock(patch)
        return afbs_compile.calibrate(Toy().eval(), [drifting(512)], min_length=128)


class Server(ThreadingHTTPServer):
    """Repositories by name, their files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            return self._json({"url": f"{self.server.address}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
            else:
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        return self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, _, place = self.path.strip("/").partition("/resolve/")
        content = self.server.repositories.get(name, {}).get(place.partition("/")[2])
        if content is None:
            self.send_response(404)
            missing = "EntryNotFound" if name in self.server.repositories else "RepoNotFound"
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.constants.ENDPOINT, server.address)
    monkeypatch.setattr(hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def fetched(server: Server, tmp_path: Any, name: str = "me/recipe") -> Recipe:
    return Recipe.from_pretrained(name, endpoint=server.address, cache_dir=tmp_path, token=False)


def pushed(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, server: Server, **options: Any) -> str:
    monkeypatch.setattr(hub, "HfApi", lambda token: REAL_API(endpoint=server.address, token=token))
    return recipe.push_to_hub("me/recipe", token="hf_of_nobody", **options)


REAL_API = hub.HfApi


def test_there_and_back(recipe, server, monkeypatch, tmp_path):
    address = pushed(recipe, monkeypatch, server)
    assert COMMIT in address
    assert server.messages == ["Sparse attention recipe"]
    assert set(server.repositories["me/recipe"]) == {"afbs_recipe.json", "README.md"}
    assert fetched(server, tmp_path) == recipe


def test_a_readme_that_is_there_stays(recipe, server, monkeypatch):
    server.repositories["me/recipe"] = {"README.md": b"a model's own page"}
    pushed(recipe, monkeypatch, server, commit_message="thresholds")
    assert server.repositories["me/recipe"]["README.md"] == b"a model's own page"
    assert server.messages == ["thresholds"]


def test_what_is_not_there_is_one_sentence(recipe, server, monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match=r"^afbs_recipe.json of me/recipe cannot be had from the Hub: "):
        fetched(server, tmp_path)
    server.repositories["me/recipe"] = {}
    with pytest.raises(RecipeError, match="cannot be had from the Hub"):
        fetched(server, tmp_path)
    with pytest.raises(RecipeError, match="cannot be had from the Hub"):
        Recipe.from_pretrained("no name//at all")
    server.repositories["me/recipe"] = {"afbs_recipe.json": b"{"}
    with pytest.raises(RecipeError, match="is damaged: it is not JSON"):
        fetched(server, tmp_path)


def test_offline_only_the_cache_answers(recipe, server, monkeypatch, tmp_path):
    pushed(recipe, monkeypatch, server)
    fetched(server, tmp_path)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert fetched(server, tmp_path) == recipe
    with pytest.raises(RecipeError, match="cannot be had from the Hub"):
        fetched(server, tmp_path / "empty")


def test_a_folder(recipe, tmp_path):
    recipe.save_pretrained(tmp_path / "model", name="me/recipe")
    assert Recipe.from_pretrained(tmp_path / "model") == recipe
    page = (tmp_path / "model" / "README.md").read_text()
    assert 'from_pretrained("me/recipe")' in page
    assert "| `layers.0` | sparse | 4 |" in page
    (tmp_path / "model" / "README.md").write_text("mine")
    recipe.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_pretrained(tmp_path)
