"""A server that answers as a test says: for the faults that a real one does not have on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # HTTP state, and what is sent: JSON, or bytes as they are
VOCAB = 30


def best_ids(ids: list[int], k: int) -> list[Any]:
    """`prompt_logprobs` of a made-up teacher: at every position id j has log-probability −j, what was sampled too."""
    found: list[Any] = [None]
    for token in ids[1:]:
        tops = {str(j): {"logprob": -float(j), "rank": j + 1, "decoded_token": None} for j in range(k)}
        found.append({str(token): {"logprob": -float(token), "rank": token + 1, "decoded_token": None}} | tops)
    return found


def vllm(path: str, body: Any) -> Answer:
    """As vLLM answers."""
    if path == "/v1/models":
        return 200, {"object": "list", "data": [{"id": "teacher", "max_model_len": 64}]}
    if body["model"] != "teacher":
        return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
    if max(body["prompt"]) >= VOCAB:
        return 400, {"error": {"message": "Token id is out of vocabulary", "code": 400}}
    if body.get("prompt_logprobs", 0) > 20:
        return 400, {"error": {"message": "Requested prompt logprobs of 21, which is greater than max allowed: 20"}}
    return 200, {"choices": [{"prompt_logprobs": best_ids(body["prompt"], body.get("prompt_logprobs", 0))}]}


class Fake:
    """answer: (path, body) → what is sent. asked: all bodies so far. most: requests that were under way together."""

    def __init__(self, answer: Callable[[str, Any], Answer]) -> None:
        self.answer, self.asked, self.most, self._now = answer, list[Any](), 0, 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _reply(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                with fake._lock:
                    fake.asked.append(body)
                    fake._now += 1
                    fake.most = max(fake.most, fake._now)
                state, sent = fake.answer(self.path, body)
                with fake._lock:
                    fake._now -= 1
                content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
                self.send_response(state)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _reply  # the names that http.server looks for

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def running(answer: Callable[[str, Any], Answer] = vllm) -> Iterator[Fake]:
    fake = Fake(answer)
    thread = threading.Thread(target=fake.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.server.shutdown()
        fake.server.server_close()


def slowly(seconds: float) -> Callable[[str, Any], Answer]:
    """As vLLM, after a while."""

    def answer(path: str, body: Any) -> Answer:
        time.sleep(seconds)
        return vllm(path, body)

    return answer


def failing(times: int, state: int) -> Callable[[str, Any], Answer]:
    """As vLLM, after so many answers of this state."""
    left = [times]

    def answer(path: str, body: Any) -> Answer:
        left[0] -= 1
        return (state, b"busy") if left[0] >= 0 else vllm(path, body)

    return answer
