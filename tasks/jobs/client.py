"""Runs as jobs of a Ray cluster: the same `ddpm run`, started by the cluster's head.

A job belongs to the cluster: it goes on when who submitted it is gone. A run is known by its config
and its places, so whoever submits it again finds the job that is at it, or starts the next one,
which goes on from what is finished.
"""

import asyncio
import getpass
import hashlib
import json
import logging
import os
import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from pipeline.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUN, CONFIG, BY = "ddpm.run", "ddpm.config", "ddpm.by"
"""What is kept with a job: which run it is, the file of its config, who submitted it."""
NOT_SENT = ["runs", "mlruns", "mlflow.db*", "samples"]
"""Of the working folder, besides what .gitignore names: what runs made here."""
ANSWER_SECONDS = 10.0
AWAY_SECONDS = 60.0
"""So long may a head that had answered be away."""
START_SECONDS = 60.0
"""So long may a head take until it can start a job."""
STOP_SECONDS = 30.0
POLL_SECONDS = 1.0


class Run(NamedTuple):
    """What is submitted.

    Args:
        name: of its config.
        identity: text that is the same for the same run.
        config: path of the config file, relative to the working folder or in the image.
        arguments: of `ddpm run`, after the config.
    """

    name: str
    identity: str
    config: str
    arguments: list[str]

    @property
    def key(self) -> str:
        return f"{self.name}-{hashlib.sha256(self.identity.encode()).hexdigest()[:8]}"


class Jobs:
    """The jobs of a cluster.

    Args:
        address: of the head's job server, e.g. http://HEAD:8265.

    Raises:
        ClusterError: nothing answers there, or not Ray, or another version of it; or it asks for
            another token.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address}"
        self._client = self._connect()

    def _connect(self) -> "JobSubmissionClient":
        import ray
        from ray.job_submission import JobSubmissionClient

        logging.disable(logging.INFO)  # its client tells of what it packs and sends
        there = self._version()  # Ray's client would wait for minutes, and takes any version
        if there not in ("", ray.__version__):
            self._refuse(
                f"it runs Ray {there}, and here is Ray {ray.__version__}; install the same on both "
                f"(pip install ray=={there})"
            )
        with self._explained():
            return JobSubmissionClient(self.address)

    def _version(self) -> str:
        """Ray's there; empty where it is told only to who has a token."""
        try:
            with urllib.request.urlopen(
                f"{self.address}/api/version", timeout=ANSWER_SECONDS
            ) as answer:
                return str(json.loads(answer.read(1 << 16))["ray_version"])
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return ""
            reason = f"what answers there ({error.code}) is no job server of Ray"
        except (ValueError, KeyError, TypeError):
            reason = "what answers there is no job server of Ray"
        except OSError as error:
            reason = f"nothing answers there ({getattr(error, 'reason', error)})"
        self._refuse(f"{reason}; give the address of the head's, as in --address http://HEAD:8265")

    def _refuse(self, reason: str) -> NoReturn:
        raise ClusterError(f"the cluster at {self.address} cannot be used: {reason}")

    @contextmanager
    def _explained(self, job: str = "") -> Iterator[None]:
        """Turn what Ray's client raises into one sentence."""
        import requests
        from ray.exceptions import AuthenticationError

        token = (
            "put that of the head, which `ray get-auth-token` prints there, into RAY_AUTH_TOKEN or "
            "~/.ray/auth_token"
        )
        try:
            yield
        except AuthenticationError as error:
            if str(error).startswith("Authentication failed"):
                self._refuse(f"it does not know this token; {token}")
            self._refuse(f"it asks for a token; {token}")
        except (RuntimeError, ValueError, OSError, requests.RequestException) as error:
            if job and "does not exist" in str(error):
                raise ClusterError(
                    f"there is no job {job} at {self.address}; see ddpm jobs --address "
                    f"{self.address}"
                ) from error
            self._refuse(str(error).strip().splitlines()[0].rstrip("."))

    def submit(
        self, run: Run, attempts: int, working_dir: str | None, image: str | None = None
    ) -> tuple[str, bool]:
        """Start a run, unless a job is at it.

        Args:
            attempts: how often its process is started at most.
            working_dir: the folder to send; None to take what the image has.

        Returns:
            (id of the job, whether it is new).

        Raises:
            ClusterError: the cluster does not take it.
        """
        earlier = [job for job in self.all() if (job.metadata or {})[RUN] == run.key]
        for job in earlier:
            if not job.status.is_terminal():
                return str(job.submission_id), False
        numbers = [int(str(job.submission_id).rsplit("-", 1)[-1]) for job in earlier]
        id = f"{run.key}-{max(numbers, default=0) + 1}"
        entrypoint = ["python", "-m", "tasks.jobs.attempts", str(attempts), "run", run.config]
        environment = {"working_dir": working_dir, "excludes": NOT_SENT} if working_dir else {}
        begin = time.monotonic()
        while True:
            try:
                with self._explained():
                    self._client.submit_job(
                        entrypoint=shlex.join([*entrypoint, *run.arguments]),
                        submission_id=id,
                        runtime_env={"image_uri": image} if image else environment,
                        metadata={RUN: run.key, CONFIG: run.config, BY: _me()},
                    )
                return id, True
            except ClusterError as error:
                if "already exists" in str(error):  # somebody else has just done so
                    return id, False
                if "exceeds the maximum size" in str(error):
                    raise ClusterError(
                        f"{error}; name in .gitignore what the run does not need"
                    ) from error
                if "No available agent" not in str(error):
                    raise
                if time.monotonic() - begin > START_SECONDS:  # it is not just about to start
                    self._refuse(
                        "its head starts no jobs, for Ray's agent there does not listen; if "
                        "another Ray on that machine has port 52365, end that, or start the head "
                        "with --dashboard-agent-listen-port and another"
                    )
            time.sleep(POLL_SECONDS)

    def all(self) -> list["JobDetails"]:
        """Those that were submitted here, the newest last."""
        with self._explained():
            jobs = self._client.list_jobs()
        ours = [job for job in jobs if RUN in (job.metadata or {})]
        return sorted(ours, key=lambda job: job.start_time or 0)

    def find(self, id: str) -> "JobDetails":
        """Raises ClusterError if there is none."""
        with self._explained(id):
            return self._client.get_job_info(id)

    def log(self, id: str) -> str:
        """All that a job has printed."""
        with self._explained(id):
            return str(self._client.get_job_logs(id))

    def follow(self, id: str, write: Callable[[str], None]) -> "JobDetails":
        """Write what a job prints, from its beginning, until it is over.

        Raises:
            ClusterError: there is no such job, or the head does not come back.
        """
        self.find(id)
        return asyncio.run(self._follow(id, write))

    async def _follow(self, id: str, write: Callable[[str], None]) -> "JobDetails":
        shown, answered = 0, time.monotonic()
        while True:
            try:
                # asked before the log is read to its end, which is then the end of the log
                job = self.find(id)
                told = 0
                async for text in self._client.tail_job_logs(id):
                    told += len(text)
                    if told > shown:
                        write(text[shown - told :])
                        shown = told
                    answered = time.monotonic()
                if job.status.is_terminal():
                    return job
                answered = time.monotonic()
            except (ClusterError, RuntimeError, OSError) as error:  # aiohttp's are of these
                if time.monotonic() - answered > AWAY_SECONDS:
                    self._refuse(
                        f"it has not answered for {AWAY_SECONDS:.0f} s; when it is back, see "
                        f"ddpm logs {id} --follow, or submit the run again ({error})"
                    )
            await asyncio.sleep(POLL_SECONDS)

    def cancel(self, id: str) -> bool:
        """Stop a job, and wait for its end; returns False if it was over.

        Raises:
            ClusterError: there is no such job, or it does not end.
        """
        with self._explained(id):
            if not self._client.stop_job(id):
                return False
        begin = time.monotonic()
        while not self.find(id).status.is_terminal():
            if time.monotonic() - begin > STOP_SECONDS:
                self._refuse(f"{id} has not stopped within {STOP_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        return True


def exit_code(job: "JobDetails") -> int:
    """Of a job that is over: that of its driver, 130 if it was cancelled, 1 if it has none."""
    from ray.job_submission import JobStatus

    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return 130
    return int(job.driver_exit_code or 1)


def _me() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, of a user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
