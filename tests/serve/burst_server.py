"""A server that may open few files, on asyncio's own loop: prints its port, and when its stdin ends, how it went."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI

from magicface_rt.serve.connection import most_connections
from magicface_rt.serve.server import Server, listen

FILES = 300


def main() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    app = FastAPI()
    app.add_api_route("/healthz", lambda: "ok")
    service: Any = SimpleNamespace(failure=lambda: None, not_ready=lambda: None)
    server = Server(app, service, loop="asyncio")
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    print(listening.getsockname()[1], flush=True)
    refused = most = 0
    ended = threading.Thread(target=sys.stdin.read, daemon=True)
    ended.start()
    while ended.is_alive():
        try:
            open("/dev/null").close()
        except OSError:
            refused += 1
        most = max(most, len(server.server_state.connections))
        time.sleep(0.0005)
    print(json.dumps({"refused": refused, "most": most, "limit": most_connections()}), flush=True)


if __name__ == "__main__":
    main()
