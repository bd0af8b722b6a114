"""A local HTTP server in the place of an API, for faults that no real one has at will: it plays back what vLLM once said.

The recorded answers are those of `vllm serve` 0.32 on a random model; every prompt gets the same two tokens.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

KEY = "sk-a-secret"
MODELS = {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": "vllm", "max_model_len": 64}]}
OUTPUT_IDS = [212, 222]
TEXT = "ab"
TOPS = [
    {"token_id:212": -3.732551336288452, "token_id:754": -4.024319648742676, "token_id:814": -4.053122520446777},
    {"token_id:222": -4.077272891998291, "token_id:172": -4.120352745056152, "token_id:774": -4.164700508117676},
]
COMPLETION = {
    "object": "text_completion",
    "model": "tiny",
    "choices": [
        {
            "index": 0,
            "text": TEXT,
            "logprobs": {
                "text_offset": [0, 12],
                "token_logprobs": [-3.732551336288452, -4.077272891998291],
                "tokens": ["token_id:212", "token_id:222"],
                "top_logprobs": TOPS,
            },
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": OUTPUT_IDS,
            "prompt_logprobs": None,
        }
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}


class Said(NamedTuple):
    """One answer of the server."""

    status: int = 200
    body: Any = COMPLETION
    headers: tuple[tuple[str, str], ...] = ()


HANG = Said(status=0)
"""No answer at all, for as long as the client stays."""


def refuse(status: int, message: str, **headers: str) -> Said:
    """An error in the words of the API."""
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Said(status, {"error": {"message": message, "code": status}}, named)


def completion(**changes: Any) -> Said:
    """The recorded completion with its choice changed; None takes a key away."""
    body = copy.deepcopy(COMPLETION)
    for name, value in changes.items():
        if value is None:
            del body["choices"][0][name]
        else:
            body["choices"][0][name] = value
    return Said(body=body)


class CompletionServer:
    """What a test sees of the server: what it was asked, and what it is to say next."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}/v1"
        self.models: Any = MODELS
        self.asked: list[dict[str, Any]] = []  # bodies of requests for completions
        self.keys: list[str | None] = []
        self.next: list[Said] = []  # said once each, in this order
        self.answer: Callable[[dict[str, Any]], Said] = lambda body: completion()
        self.over = threading.Event()


@contextmanager
def completion_server() -> Iterator[CompletionServer]:
    """A server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(Said(body=said.models) if self.path == "/v1/models" else refuse(404, "Not Found"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said.asked.append(body)
            said.keys.append(self.headers.get("Authorization"))
            self._say(said.next.pop(0) if said.next else said.answer(body))

        def _say(self, words: Said) -> None:
            if words == HANG:
                said.over.wait()
                self.close_connection = True
                return
            data = words.body if isinstance(words.body, bytes) else json.dumps(words.body).encode()
            self.send_response(words.status)
            for name, value in words.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    said = CompletionServer(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield said
    finally:
        said.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def prompts(num_rows: int, length: int = 3) -> pa.Table:
    ids = [list(range(5, 5 + length))] * num_rows
    return pa.table({"uid": np.arange(num_rows), "prompt_ids": pa.array(ids, pa.list_(pa.int32()))})


def reasons(table: pa.Table) -> list[str]:
    return table["finish_reason"].to_pylist()
