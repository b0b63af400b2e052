"""The server under load and at its end: nothing is lost, nobody gets another's text, and what ends leaves nothing."""

import asyncio
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import openai
import pytest
import serve_load
import torch
from conftest import Pair
from serving import Served, served

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.commands import cli, serve
from kangaroo_kernels.model.loop import host as host_module
from kangaroo_kernels.model.loop.state import Written
from kangaroo_kernels.model.serving import desk as desk_module
from kangaroo_kernels.model.serving import server as server_module
from kangaroo_kernels.model.serving import transport
from kangaroo_kernels.model.serving.app import TOKENIZING_THREADS
from kangaroo_kernels.model.serving.desk import is_lost
from kangaroo_kernels.model.serving.pool import choose
from kangaroo_kernels.model.serving.server import bind, reaches_out, url_of


@pytest.fixture
def kangaroo(pair: Pair) -> Kangaroo:
    return pair.load(device="cpu")


def until(true: Callable[[], bool]) -> None:
    """Wait for what must come."""
    for _ in range(3000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it never came")


class Gate:
    """Holds every step back while it is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.inside, verify = threading.Event(), threading.Event(), host_module.verify
        self.open.set()

        def gated(*arguments: Any) -> Any:
            self.inside.set()
            assert self.open.wait(60)
            return verify(*arguments)

        monkeypatch.setattr(host_module, "verify", gated)

    def shut(self) -> None:
        """Let no step through any more."""
        self.open.clear()
        self.inside.clear()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def send(server: Served, stream: bool, **parameters: Any) -> socket.socket:
    """A client that has sent its request and reads nothing yet."""
    body = json.dumps({"prompt": "ABC", "max_tokens": 400, "temperature": 0, "stream": stream} | parameters)
    client = socket.create_connection(server.address, timeout=60)
    client.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def send_a_part(server: Served) -> socket.socket:
    """A client of whose body the server has only the first byte."""
    client = socket.create_connection(server.address, timeout=60)
    client.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode())
    until(lambda: len(server.server.server_state.tasks) > 0)
    return client


def status_of(client: socket.socket) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(client)
    response.begin()
    return response


# ---- clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_session(
    stream: bool, kangaroo: Kangaroo, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its text, and while it waits in the queue."""
    with served(kangaroo, parallel=1) as server:
        gate.shut()
        first = send(server, stream)
        until(gate.inside.is_set)
        second = send(server, stream)
        until(lambda: server.desk.pool.waiting == 1)
        second.close()
        until(lambda: server.desk.pool.waiting == 0)
        first.close()
        gate.open.set()
        until(lambda: server.desk.pool.running == 0)
        assert server.metrics()['kangaroo_requests_total{outcome="cancelled"}'] == 2
        assert server.metrics()["kangaroo_generated_tokens_total"] < 100
        with server.client() as client:
            right = kangaroo.generate("ABC", max_new_tokens=16)
            assert (
                client.completions.create(model=kangaroo.name, prompt="ABC", temperature=0).choices[0].text
                == right.text
            )


def test_a_client_that_leaves_while_it_sends(kangaroo: Kangaroo, caplog: pytest.LogCaptureFixture) -> None:
    with served(kangaroo) as server:
        send_a_part(server).close()
        until(lambda: server.metrics()['kangaroo_requests_total{outcome="cancelled"}'] == 1)
    assert caplog.records == []


def test_a_body_that_never_comes(kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STALLED", 0.5)
    with served(kangaroo) as server, send_a_part(server) as client, status_of(client) as refused:
        assert (refused.status, refused.headers["Connection"]) == (408, "close")
        assert "the body was not complete after 0.5 seconds" in json.loads(refused.read())["error"]["message"]
        assert server.metrics()['kangaroo_requests_total{outcome="refused"}'] == 1


def test_a_full_queue_is_told_at_once(kangaroo: Kangaroo, gate: Gate) -> None:
    with served(kangaroo, parallel=1, queue=1) as server:
        gate.shut()
        clients = [send(server, stream=False, max_tokens=4)]
        until(gate.inside.is_set)
        clients.append(send(server, stream=True, max_tokens=4))
        until(lambda: server.desk.pool.waiting == 1)
        with send(server, stream=True) as third, status_of(third) as refused:
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) >= 1
            told = json.loads(refused.read())["error"]
            assert told["code"] == "queue_full" and told["type"] == "server_error"
        assert server.metrics()["kangaroo_queue_length"] == 1
        gate.open.set()
        for client in clients:
            with client, status_of(client) as response:
                assert response.status == 200
                assert "finish_reason" in response.read().decode()
        assert server.metrics()['kangaroo_requests_total{outcome="busy"}'] == 1


def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STALLED", 0.01)
    closed = []

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {}
        finally:
            closed.append(True)

    async def nothing(message: Any = None) -> Any:
        if message is None or message["type"] == "http.response.body":
            await asyncio.sleep(60)

    asyncio.run(transport.EventStream(events())({}, nothing, nothing))
    assert closed == [True]


# ---- errors


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KangarooError("the logits are not finite."), "the logits are not finite."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory for this text"),
        (ZeroDivisionError("secret"), "the text ended with an error that the server's log has"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "there is not enough memory",
        ),
        (RuntimeError("the device memory is damaged"), "the text ended with an error that the server's log has"),
    ],
)
def test_errors_of_a_step(error: Exception, sentence: str, kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status before the first event, an event behind it; the session is whole again."""
    verify, left = host_module.verify, [100]

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return verify(*arguments)

    monkeypatch.setattr(host_module, "verify", failing)
    asked = {"model": kangaroo.name, "prompt": "ABC", "temperature": 0}
    with served(kangaroo, parallel=1) as server, server.client() as client:
        for stream in (False, True):
            left[0] = 0
            with pytest.raises(openai.InternalServerError, match=sentence):
                client.completions.create(**asked, stream=stream)
        left[0] = 2
        chunks = []
        with pytest.raises(openai.APIError, match=sentence):
            chunks += client.completions.create(**asked, stream=True)
        left[0] = 100
        right = kangaroo.generate("ABC", max_new_tokens=16).text
        left[0] = 100
        assert client.completions.create(**asked).choices[0].text == right
        assert server.metrics()['kangaroo_requests_total{outcome="error"}'] == 3


def test_a_gpu_that_fails_is_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", failing)
    assert is_lost(torch.device("cuda"))
    assert not is_lost(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(torch.device("cuda"))


@pytest.mark.parametrize("lost", [True, False])
def test_a_gpu_that_is_lost_is_no_healthy_server(
    lost: bool, kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later text would fail, so whoever watches the server is told to start it again."""

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with served(kangaroo, parallel=1) as server, server.client() as client:
        monkeypatch.setattr(host_module, "verify", failing)
        monkeypatch.setattr(desk_module, "is_lost", lambda device: lost)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=kangaroo.name, prompt="ABC", temperature=0)
        connection = http.client.HTTPConnection(*server.address)
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert response.status == (503 if lost else 200)
        assert ("the GPU has failed" in json.loads(response.read())["status"]) == lost
        connection.close()


def test_a_full_queue_is_told_before_the_prompt_is_read(
    kangaroo: Kangaroo, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(kangaroo, parallel=1, queue=0) as server:
        gate.shut()
        first = send(server, stream=False, max_tokens=4)
        until(gate.inside.is_set)
        monkeypatch.setattr(server.desk, "resolve", lambda asked: pytest.fail("it was tokenized"))
        with send(server, stream=True) as second, status_of(second) as refused:
            assert refused.status == 503
        assert server.metrics()['kangaroo_requests_total{outcome="busy"}'] == 1
        gate.open.set()
        with first, status_of(first) as response:
            assert response.status == 200


def test_prompts_that_are_tokenized_hold_no_text_up(
    kangaroo: Kangaroo, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are threads for, and more, are being tokenized while a text is written to its end."""
    with served(kangaroo, parallel=1, queue=32) as server:
        resolve, free, entered = server.desk.resolve, threading.Event(), []

        def slow(asked: Any) -> Any:
            request = resolve(asked)
            if asked.settings.max_new_tokens == 5:
                entered.append(asked)
                assert free.wait(60)
            return request

        monkeypatch.setattr(server.desk, "resolve", slow)
        gate.shut()
        written = send(server, stream=True, max_tokens=30)
        until(gate.inside.is_set)
        clients = [send(server, stream=False, max_tokens=5) for _ in range(12)]
        until(lambda: len(entered) == TOKENIZING_THREADS)
        gate.open.set()
        with written, status_of(written) as response:
            assert "[DONE]" in response.read().decode()
        free.set()
        for client in clients:
            with client, status_of(client) as response:
                assert response.status == 200


# ---- the end


def test_the_end_lets_texts_end(kangaroo: Kangaroo, gate: Gate) -> None:
    """The one under way is written to its end, the one in the queue is refused, and so are new ones."""
    with served(kangaroo, parallel=1) as server:
        gate.shut()
        first = send(server, stream=True, max_tokens=12)
        until(gate.inside.is_set)
        second = send(server, stream=False)
        until(lambda: server.desk.pool.waiting == 1)
        server.server.should_exit = True
        with second, status_of(second) as refused:
            assert refused.status == 503
            assert "the server is shutting down" in json.loads(refused.read())["error"]["message"]
        gate.open.set()
        with first, status_of(first) as response:
            events = [line[6:] for line in response.read().decode().splitlines() if line]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert text == kangaroo.generate("ABC", max_new_tokens=12).text
        assert events[-1] == "[DONE]"


def test_the_end_does_not_wait_for_ever(kangaroo: Kangaroo, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "GRACE", 0.0)
    monkeypatch.setattr(server_module, "FAREWELL", 60.0)
    with served(kangaroo, parallel=1) as server:
        gate.shut()
        client = send(server, stream=True)
        until(gate.inside.is_set)
        server.server.should_exit = True
        until(lambda: server.desk.pool.ended)
        gate.open.set()
        with client, status_of(client) as response:
            assert "the server is shutting down" in response.read().decode()


def test_a_second_ctrl_c_ends_texts_at_once(
    kangaroo: Kangaroo, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "GRACE", 1000.0)
    monkeypatch.setattr(server_module, "FAREWELL", 60.0)
    with served(kangaroo, parallel=1) as server:
        gate.shut()
        client = send(server, stream=True)
        until(gate.inside.is_set)
        server.server.handle_exit(signal.SIGINT, None)
        until(lambda: server.desk.pool.closed)
        server.server.handle_exit(signal.SIGINT, None)
        until(lambda: server.desk.pool.ended)
        gate.open.set()
        with client, status_of(client) as response:
            assert "the server is shutting down" in response.read().decode()
    assert caplog.records == []


def test_the_end_hangs_up_on_who_is_left(
    kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "GRACE", 0.0)
    monkeypatch.setattr(server_module, "FAREWELL", 0.0)
    with served(kangaroo) as server, send_a_part(server) as client:
        server.stop()
        assert client.recv(1) == b""
        assert server.metrics()['kangaroo_requests_total{outcome="cancelled"}'] == 1
    assert caplog.records == []


# ---- load


def test_load() -> None:
    """Whole answers, streams, and streams that their clients leave, each compared with its own text alone."""
    found = serve_load.run()
    assert found.wrong == []
    assert found.answered + found.left == serve_load.REQUESTS
    ended = found.outcomes
    assert ended["completed"] + ended["cancelled"] == serve_load.REQUESTS + serve_load.KILLED
    assert 0 < ended["cancelled"] <= found.left + serve_load.KILLED
    assert ended["refused"] == ended["busy"] == ended["error"] == 0
    assert found.texts_left == 0  # what a text holds goes with it
    assert found.session_bytes[1] == found.session_bytes[0]


# ---- the command


def run(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from kangaroo_kernels.model.commands.cli import main; main()", "serve"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "--model", "demo", *arguments], **pipes, **settings)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_command(sent: signal.Signals) -> None:
    """It says how to call it, answers, and ends cleanly."""
    with run(
        "--port", "0", "--parallel", "2", "--context", "100", env=os.environ | {"KANGAROO_API_KEY": "k"}
    ) as server:
        try:
            first = server.stdout.readline()
            url = re.search(r"demo is served at (http://127.0.0.1:\d+/v1) .*: 2 texts side by side", first)
            assert url, first + server.stdout.read()
            assert server.stdout.readline().startswith("at most 100 tokens and ")
            curl = shlex.split(server.stdout.readline())
            assert curl[:4] == ["curl", f"{url[1]}/completions", "-H", "Authorization: Bearer $KANGAROO_API_KEY"]
            with openai.OpenAI(base_url=url[1], api_key="k", max_retries=0) as client:
                answer = client.completions.create(**json.loads(curl[-1]), temperature=0)
            assert answer.choices[0].text
        finally:
            server.send_signal(sent)
        assert server.stdout.read() == ""
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0", "--port", "0"], "0.0.0.0 can be reached from other machines; set KANGAROO_API_KEY"),
        (["--host", "no.such.host.invalid"], "the server cannot listen at no.such.host.invalid, port 8000"),
        (["--port", "TAKEN"], "the server cannot listen at 127.0.0.1, port TAKEN"),
        (["--context", "513"], "the model's own context has 512 tokens, so give at most 512."),
    ],
)
def test_what_cannot_be_served_is_told(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KANGAROO_API_KEY", raising=False)
    with bind("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["kangaroo", "serve", "--model", "demo", *arguments])
        sys.argv = [word.replace("TAKEN", port) for word in sys.argv]
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    assert sentence.replace("TAKEN", port) in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(KangarooError, match="run: pip install uvicorn"):
        serve.serve(model="demo")


def test_only_loopback_stays_inside() -> None:
    for host, outward in (("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("::", True)):
        with bind(host, 0) as listening:
            assert reaches_out(listening) == outward
            port = listening.getsockname()[1]
            known = {"127.0.0.1": "127.0.0.1", "::1": "[::1]"}.get(host, "localhost")
            assert url_of(listening) == f"http://{known}:{port}/v1"


def test_the_session_that_a_text_goes_on_from() -> None:
    """Not the one with which it shares a system prompt alone."""

    class Holding:
        def __init__(self, *tokens: int) -> None:
            self.held = Written(tokens, [0, 0, 0])

    empty, first, second = Holding(), Holding(1, 2, 3, 4, 5, 6), Holding(1, 2, 9, 9, 9)
    assert choose([empty, first, second], [1, 2, 3, 4, 5, 6, 7]) is first
    assert choose([second, empty, first], [1, 2, 3, 8]) is first
    assert choose([empty, first, second], [1, 2, 7, 7]) is empty
    assert choose([second, first], [5]) is second
