"""A test server that speaks the dialects of OpenAI's API, well and badly; each test says what it sends."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DONE = b"data: [DONE]\n\n"

def event(choice, **more):
    """A server-sent event of one choice."""
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"

def entry(confidence, k=20):
    """A token as chat describes it; all alternatives have log P = -confidence, as in no distribution."""
    return {"token": "x", "logprob": -0.5, "top_logprobs": [{"token": "x", "logprob": -confidence}] * k}

def chat(text, *confidences, end=None):
    """A chunk of vLLM's chat: some text, and a token for each confidence."""
    content = [entry(confidence) for confidence in confidences]
    return event({"delta": {"content": text}, "logprobs": {"content": content}, "finish_reason": end})

def reply(text, *confidences):
    """The pieces of a usual chat reply: a token per confidence, of which the first holds the text."""
    role = event({"delta": {"role": "assistant", "content": ""}, "logprobs": None})
    tokens = [chat("" if i else text, confidence) for i, confidence in enumerate(confidences)]
    return [role, *tokens, chat("", end="stop"), DONE]

class Server(ThreadingHTTPServer):
    """respond(body, number) answers a request with pieces to send, or with (status, headers, pieces).
    Functions among the pieces are called in between. number: 0 for the first after the probe's two."""
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, respond):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.requests = []  # (path, body)
        self.open = 0  # replies under way
        self.most = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *where):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up is no error
            super().handle_error(*where)

    def count(self, change):
        with self.lock:
            self.open += change
            self.most = max(self.most, self.open)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests) - 2
            server.requests.append((self.path, body))
        answer = server.respond(body, number)
        status, headers, pieces = answer if isinstance(answer, tuple) else (200, {}, answer)
        self.send_response(status)
        for name, value in {"Transfer-Encoding": "chunked", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        server.count(1)
        try:
            for piece in pieces:
                if callable(piece):
                    piece()
                else:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client hung up
            self.close_connection = True
        finally:
            server.count(-1)
