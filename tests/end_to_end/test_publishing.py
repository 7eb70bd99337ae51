"""From a run to the Hub: the documented upload, and the command of the model card, executed as they stand."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import LORA, SCRIPT

ROOT = SCRIPT.parents[2]


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs; `server.files` is what it got, by path."""

    server: ThreadingHTTPServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_port}/somebody/my-cola"
        assert self.headers["Authorization"] == "Bearer hf_fake"
        if self.path.endswith("/repos/create"):
            answer: dict = {"url": url, "id": f"somebody/{json.loads(body)['name']}"}
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            answer = {"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {"errors": [], "warnings": []}  # of the model card
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def finished(fork, glue, tiny_model, tmp_path_factory) -> Path:
    """The output folder of a run on CSV files."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("train", "dev"):
        rows = [line.split("\t") for line in (glue / "CoLA" / f"{name}.tsv").read_text().splitlines()]
        text = "sentence,label\n" + "".join(f"{row[3]},{('no', 'yes')[int(row[1])]}\n" for row in rows)
        (folder / f"{name}.csv").write_text(text)
    files = ["--train_file", folder / "train.csv", "--validation_file", folder / "dev.csv", "--max_seq_length", "64"]
    outcome = fork(*files, "--do_train", "--do_eval", *LORA, "--max_steps", "4", "--output_dir", folder / "output")
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def shell(tmp_path, environment):
    """Runs lines of bash in an empty folder, where `python` and `hf` are this environment's."""
    (tmp_path / "bin").mkdir()
    for name, words in (("python", ""), ("hf", "-m huggingface_hub.cli.hf")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "here").mkdir()
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(lines: str, **settings: str) -> str:
        command = ["bash", "-e", "-c", lines]
        environ = environment | path | settings
        done = subprocess.run(command, cwd=tmp_path / "here", env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def block(text: str) -> str:
    """The first block of bash in a document."""
    return re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)[0]


def test_the_command_of_a_runs_model_card_gives_the_figure_of_the_card(finished, tiny_model, shell, tmp_path):
    here = tmp_path / "here"
    (here / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(finished / "output", here / "adapter")
    (here / "base").symlink_to(tiny_model)
    shutil.copy(finished / "dev.csv", here / "examples.csv")
    card = (here / "adapter" / "README.md").read_text()
    for place in ("this folder as adapter", "the base model's as base", "labelled examples as examples.csv"):
        assert place in card
    shell(block(card))
    (accuracy,) = re.findall(r"^- accuracy: ([\d.]+)$", card, re.M)
    results = json.loads((here / "adapter-evaluated" / "eval_results.json").read_text())
    assert f"{results['eval_accuracy']:.4f}" == accuracy


def test_the_documented_upload_sends_the_converted_folder(finished, hub, shell, tmp_path):
    page = (ROOT / "docs" / "adapters.md").read_text().partition("## Publish one")[2]
    here = tmp_path / "here"
    (here / "output").mkdir()
    shutil.copytree(finished / "output", here / "output" / "roberta_base_cola")
    lines = [line for line in block(page).splitlines() if "hf auth login" not in line]  # the token is set instead
    assert [line.split()[0] for line in lines] == ["python", "hf"]
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    out = shell("\n".join(lines), HF_ENDPOINT=endpoint, HF_TOKEN="hf_fake", HF_HUB_OFFLINE="0")
    assert "somebody/my-cola" in out
    sent = {path.name: path.read_bytes() for path in (here / "my-cola").iterdir()}
    assert hub.files == sent and {*sent} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
