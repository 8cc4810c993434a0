"""A target whose artifacts run in a runner's process; everything else is the target's own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowexport.core.errors import InputError, UnavailableError, VerificationError
from flowexport.core.types import Artifact, RuntimeInfo, Session, Target
from flowexport.runners.machine import OLD_TFLITE, Machine
from flowexport.runners.server import length

SERVER = Path(__file__).with_name("server.py")
MAX_BYTES = 64 << 20
"""An emulated inference takes some hundred times as long as a native one."""
EMULATED_SAMPLES = 32


class RunnerTarget:
    """A target with its ``load`` on another machine.

    Args:
        target: what reads and describes the artifact.
        machine: from :func:`flowexport.runners.prepare`.
    """

    def __init__(self, target: Target, machine: Machine) -> None:
        self._target, self._machine = target, machine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def refusal(self, artifact: Artifact) -> UnavailableError | None:
        """Return why the runner does not run this artifact, or None."""
        machine = self._machine
        if artifact.target not in machine.targets:
            return UnavailableError(
                f"runner {machine.name}: runs {' and '.join(machine.targets)} alone.",
                fix=f"flowexport verify BUNDLE --target {artifact.target}",
            )
        if machine.execution == "emulated" and artifact.size_bytes > MAX_BYTES:
            return UnavailableError(
                f"runner {machine.name}: {artifact.path.name} has {artifact.size_bytes} bytes;"
                f" expected at most {MAX_BYTES}, what an emulator runs in minutes.",
                fix="verify it natively, on a device",
            )
        return None

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Return a session in the runner's process.

        Raises:
            UnavailableError: see :meth:`refusal`.
            InputError: the runtime there refuses the file.
        """
        if (refusal := self.refusal(artifact)) is not None:
            raise refusal
        return RunnerSession(artifact, self._machine, threads, self._target)


class RunnerSession(Session):
    """One artifact in a child process; :mod:`flowexport.runners.server` tells how they talk."""

    def __init__(self, artifact: Artifact, machine: Machine, threads: int, target: Target) -> None:
        super().__init__(artifact)
        self._file_feeds = getattr(target, "file_feeds", None)
        self._where = f"run {artifact.target} {artifact.model} on {machine.name}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the session
        arguments = (machine.site, artifact.target, artifact.path, artifact.entry, threads)
        self._process = subprocess.Popen(
            [*machine.command, str(SERVER), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(machine.environment),
        )
        try:
            hello = self._answer()
        except InputError as error:
            self.close()
            if machine.name == OLD_TFLITE and "compat" not in artifact.details:
                fix = f"`tflite: {{compat: {OLD_TFLITE}}}` in the recipe, and convert again"
                raise InputError(error.message, fix=fix) from error
            raise
        except BaseException:
            self.close()
            raise
        self._info = RuntimeInfo(
            name=hello["name"],
            version=hello["version"],
            threads=threads,
            execution=machine.execution,
            details={"runner": machine.name, **machine.details, **hello["details"]},
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        if self._file_feeds is not None:  # the file's ends are not the artifact's
            feeds = self._file_feeds(self.artifact, feeds)
        arrays = {n: np.ascontiguousarray(v) for n, v in feeds.items()}
        told = [[n, v.dtype.str, v.shape] for n, v in arrays.items()]
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the answer tells why
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.writelines(v.tobytes() for v in arrays.values())
            self._process.stdin.flush()
        return {
            name: np.frombuffer(self._process.stdout.read(length(dtype, shape)), dtype)
            .reshape(shape)
            .copy()
            for name, dtype, shape in self._answer()["results"]
        }

    def _answer(self) -> dict[str, Any]:
        """Return the process's next line.

        Raises:
            InputError: the runtime refused the file or the feeds.
            VerificationError: the process ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines()
            raise VerificationError(
                f"{self._where}: the process ended with {code}: {said[-1][:300] if said else ''}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise InputError(f"{self._where}: {str(answer['error'])[:300]}")
        return answer

    def close(self) -> None:
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._log):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
