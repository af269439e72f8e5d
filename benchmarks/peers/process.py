"""Starts worker processes, and talks to them."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from pathlib import Path
from typing import Any

from peer import About, Job

WORKER = Path(__file__).parent / "worker.py"
# Far more than a measurement takes; a worker that hangs must not stop the whole comparison.
PATIENCE_S = 900


class WorkerError(Exception):
    """A worker failed; the message says where to read why."""


class Worker:
    """A process that has built and loaded one model."""

    def __init__(self, python: Path, module: str, job: Job, log: Path) -> None:
        self.job = job
        self.log = log
        arguments = [module, job.to_json()]
        with log.open("wb") as errors:
            try:
                subprocess.run(
                    [python, WORKER, "build", *arguments],
                    stdin=subprocess.DEVNULL,
                    stderr=errors,
                    check=True,
                )
            except subprocess.CalledProcessError:
                raise WorkerError(self._reason()) from None
            self.process = subprocess.Popen(
                [python, WORKER, "serve", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.about = About(**self._answer())

    def ask(self, **request: Any) -> float:
        """Seconds that the requested measurement gave."""
        assert self.process.stdin is not None
        # A process that is gone gives no answer, either.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def stop(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        output = self.process.stdout
        assert output is not None
        # One answer for each request, so nothing can be waiting in the buffer.
        ready, _, _ = select.select([output], [], [], PATIENCE_S)
        line = output.readline() if ready else ""
        if not line:
            self.stop()
            raise WorkerError(self._reason() if ready else f"no answer in {PATIENCE_S} s")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"{said[-1] if said else 'it said nothing'} (see {self.log})"
