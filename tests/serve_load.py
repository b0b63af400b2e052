"""A server of the bundled pair under load; ``python tests/serve_load.py`` prints the figures.

32 clients send 500 requests: a third are answered whole, a third are streamed to their end, and of a third the client
leaves after the first piece; one more client in each half is a process that is killed. Every text is compared with the
one that its request gets alone.
"""

import gc
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from serving import Served, served

from kangaroo_kernels import Generation, Kangaroo
from kangaroo_kernels.model.demo import bundled_pair
from kangaroo_kernels.model.serving.metrics import OUTCOMES
from kangaroo_kernels.model.session import Session, Writing

CLIENTS, REQUESTS, PARALLEL, KILLED = 32, 500, 4, 2
WHOLE, STREAMED, LEFT = 0, 1, 2

KILLED_CLIENT = """
import json, socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
body = json.dumps({"prompt": "import ", "max_tokens": 400, "stream": True, "ignore_eos": True})
head = "POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
client.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
client.recv(100)
print("reading", flush=True)
client.recv(1 << 20, socket.MSG_WAITALL)
"""


@dataclass
class Load:
    """What came of it; pairs are before and after the second half of the requests."""

    wrong: list[int] = field(default_factory=list)
    answered: int = 0
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    requests_per_second: float = 0.0
    resident_bytes: list[int] = field(default_factory=list)
    session_bytes: list[int] = field(default_factory=list)
    texts_left: int = 0


def jobs() -> list[dict[str, Any]]:
    """Different texts, greedy and sampled, short and long, many with the same beginning."""
    draw, prompts = random.Random(0), list(bundled_pair().prompts().values())
    made = []
    for number in range(REQUESTS):
        prompt = draw.choice(prompts)[: draw.randrange(20, 120)]
        chosen = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0}
        made.append({"prompt": f"{prompt}  # {number % 50}\n", "max_tokens": draw.randrange(4, 17), **chosen})
    return made


def alone(kangaroo: Kangaroo, job: dict[str, Any]) -> Generation:
    """The text that a request gets without a server."""
    settings = {name: value for name, value in job.items() if name not in ("prompt", "max_tokens")}
    return kangaroo.generate(job["prompt"], max_new_tokens=job["max_tokens"], **settings)


def ask(client: openai.OpenAI, job: dict[str, Any], kind: int) -> tuple[str, str | None]:
    """A client's request: the text that came, and why it ended."""
    if kind == WHOLE:
        choice = client.completions.create(model="demo", **job).choices[0]
        return choice.text, choice.finish_reason
    text, reason = "", None
    with client.completions.create(model="demo", **job, stream=True) as stream:
        for chunk in stream:
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason
            if kind == LEFT:
                break
    return text, reason


def half(server: Served, todo: dict[int, tuple[dict[str, Any], Generation]], load: Load) -> None:
    """All clients at once, each with its share, one request after the other; one more is killed meanwhile."""

    def work(numbers: list[int]) -> None:
        with server.client() as client:
            for number in numbers:
                job, right = todo[number]
                kind, began = number % 3, time.perf_counter()
                text, reason = ask(client, job, kind)
                if kind == LEFT:
                    load.left += 1
                    good = right.text.startswith(text)
                else:
                    load.answered += 1
                    load.seconds.append(time.perf_counter() - began)
                    good = (text, reason) == (right.text, right.finish_reason)
                if not good:
                    load.wrong.append(number)

    with ThreadPoolExecutor(CLIENTS) as clients:
        done = clients.map(work, [list(todo)[first::CLIENTS] for first in range(CLIENTS)])
        command = [sys.executable, "-S", "-c", KILLED_CLIENT, str(server.address[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None and client.stdout.readline() == "reading\n"
            client.kill()
        list(done)
    while server.desk.pool.running:  # the server notices within a step that a client has left
        time.sleep(0.01)
    gc.collect()
    load.resident_bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    load.session_bytes.append(sum(map(bytes_of, server.desk.pool.free)))


def bytes_of(session: Session) -> int:
    """Its memory, but for the rows that its adapter has yet to read: there are some after steps without drafts."""
    return session.nbytes - sum(rows.nbytes for rows in session.memory.drafter_memory.missed)


def texts() -> int:
    """How many texts there are that somebody holds; those that only hold each other, after an error, are let go."""
    gc.collect()
    return sum(type(each) is Writing for each in gc.get_objects())


def run() -> Load:
    """Serve all requests."""
    kangaroo, load = Kangaroo.from_pretrained("demo", device="cpu"), Load()
    todo = {number: (job, alone(kangaroo, job)) for number, job in enumerate(jobs())}
    first = {number: todo.pop(number) for number in range(REQUESTS // 2)}
    before = texts()
    with served(kangaroo, PARALLEL, queue=CLIENTS) as server:
        half(server, first, load)
        began = time.perf_counter()
        half(server, todo, load)
        load.requests_per_second = len(todo) / (time.perf_counter() - began)
        load.texts_left = texts() - before
        metrics = server.metrics()
    load.outcomes = {name: int(metrics[f'kangaroo_requests_total{{outcome="{name}"}}']) for name in OUTCOMES}
    return load


if __name__ == "__main__":
    found = run()
    ordered = sorted(found.seconds)
    figures = {
        "what": f"{REQUESTS} requests of {CLIENTS} clients at once, {PARALLEL} sessions of the bundled pair",
        "wrong_texts": len(found.wrong),
        "answered": found.answered,
        "left_by_their_clients": found.left + KILLED,
        "outcomes": found.outcomes,
        "requests_per_second": round(found.requests_per_second, 1),
        "seconds_p50": round(ordered[len(ordered) // 2], 3),
        "seconds_p95": round(ordered[int(0.95 * len(ordered))], 3),
        "resident_MB": [round(each / 1e6) for each in found.resident_bytes],
        "sessions_MB": [round(each / 1e6) for each in found.session_bytes],
    }
    print(json.dumps(figures, indent=2))
