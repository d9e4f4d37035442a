"""`make run`: the demo model and the chat page, and one Ctrl-C for both."""

import os
import re
import signal
import sys

import httpx
from started import ROOT, START_S, Started, until


def test_both_run_and_end_together(tmp_path):
    command = (sys.executable, ROOT / "scripts" / "run_demo.py", "--port", 0, "--chat-port", 0)
    with Started(tmp_path / "demo", *command) as demo:
        places = []

        def both() -> bool:
            places[:] = re.findall(r"(?:is served|page is) on (http://[^\s,]+)", demo.out.read_text())
            return len(places) == 2 or demo.process.poll() is not None

        until(both, START_S)
        assert len(places) == 2, demo.said()
        assert httpx.get(f"{places[0]}/models").json()["data"][0]["id"] == "demo"
        assert httpx.get(places[1]).status_code == 200
        os.killpg(demo.process.pid, signal.SIGINT)  # as a terminal does
        demo.end(0)
