"""Whether the Hub answers is known within five seconds, whatever is wrong with the network."""

import socket
import threading
import time

import datasets
import huggingface_hub
import pytest

from lora_nlu import hub


@pytest.fixture
def online(monkeypatch):
    """The state of a process that may use the Hub; put back afterwards."""
    constants, config = huggingface_hub.constants, datasets.config
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_DATASETS_OFFLINE", False)
    yield monkeypatch
    huggingface_hub.close_session()  # the next one reads the proxy again


def answering(monkeypatch, reply: bytes | None) -> None:
    """A Hub at a port of this machine that accepts connections, and sends the reply, or with None nothing."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        held = []
        while True:
            connection, _ = server.accept()
            held.append(connection)
            if reply is not None:
                connection.recv(10_000)
                connection.sendall(reply)

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")


def no_server(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def no_proxy_server(monkeypatch):
    huggingface_hub.close_session()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")


def silent_server(monkeypatch):
    answering(monkeypatch, None)


def broken_server(monkeypatch):
    answering(monkeypatch, b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")


def no_name(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")

    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def no_answer_to_the_name(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(20))


@pytest.mark.parametrize(
    "trouble", [no_server, no_proxy_server, silent_server, broken_server, no_name, no_answer_to_the_name]
)
def test_a_hub_that_does_not_answer_is_named_within_five_seconds_and_left_alone_from_then_on(trouble, online):
    online.setattr(hub, "TIMEOUT_S", 1)  # 4 otherwise
    trouble(online)
    began = time.monotonic()
    line = hub.use_cache_if_unreachable()
    assert time.monotonic() - began < 2.5
    assert line.startswith(f"The Hub ({huggingface_hub.constants.ENDPOINT}) does not answer")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE and datasets.config.HF_DATASETS_OFFLINE
    assert hub.use_cache_if_unreachable() == ""  # said once


def test_a_hub_that_answers_is_used(online):
    answering(online, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    assert hub.use_cache_if_unreachable() == "" and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_hub_is_asked_only_for_names_that_could_be_on_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "use_cache_if_unreachable", lambda: "no answer")
    (tmp_path / "someone" / "tokenizer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.look_for_hub(None, "", ".", str(tmp_path), "someone/tokenizer", "/missing", "a/b/c") == []
    for name in ("roberta-base", "someone/model"):
        assert hub.look_for_hub(None, "someone/tokenizer", name) == ["no answer"]
    monkeypatch.setattr(hub, "use_cache_if_unreachable", lambda: "")
    assert hub.look_for_hub("roberta-base") == []


def test_the_time_that_it_waits_is_below_five_seconds():
    assert hub.TIMEOUT_S < 5
