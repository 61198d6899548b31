"""Whether a Prefect server answers, and waiting for one that is only starting."""

from __future__ import annotations

import http.server
import threading
import time

from flows.prefect_server import problem_of, wait_for

NOBODY = "http://127.0.0.1:9/api"


class Health(http.server.BaseHTTPRequestHandler):
    """Answers as a Prefect server does to who asks for its health."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silence."""


def test_nobody_there_is_a_problem_in_words() -> None:
    assert "refused" in str(problem_of(NOBODY))
    assert problem_of("") is not None


def test_waiting_ends_with_patience() -> None:
    began = time.monotonic()
    wait_for(NOBODY, 0.6)
    assert 0.5 < time.monotonic() - began < 30


def test_a_server_that_comes_up_late_is_waited_for() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Health, bind_and_activate=False) as server:
        server.server_bind()  # bound and not listening: refused until it is
        api = f"http://127.0.0.1:{server.server_address[1]}/api"
        assert problem_of(api) is not None

        def come_up() -> None:
            time.sleep(0.2)
            server.server_activate()
            server.serve_forever(0.05)

        thread = threading.Thread(target=come_up)
        thread.start()
        wait_for(api, 60)
        assert problem_of(api) is None
        server.shutdown()
        thread.join()
