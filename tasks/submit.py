"""Submit: the same `ddpm run` as a job on a Ray cluster."""

import logging
import shlex
import time
from collections.abc import Iterator

from pipeline.errors import ClusterError

POLL_SECONDS = 1.0


def submit(
    address: str, config_path: str, overrides: list[str], working_dir: str
) -> tuple[str, str]:
    """Send the working folder and start the run there.

    Args:
        address: of the cluster's job server, e.g. http://HEAD:8265.
        config_path: of the config file, relative to working_dir.

    Returns:
        (job id, shell command to follow it).

    Raises:
        ClusterError: nothing answers at the address, or it refuses the job.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of every file that it packs
    words = ["python", "-m", "tasks", "run", config_path]
    for override in overrides:
        words += ["--set", override]
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(words),
            runtime_env={
                "working_dir": working_dir,
                "excludes": ["runs", "mlruns", "mlflow.db*", "samples"],
            },
        )
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ClusterError(
            f"cannot submit to {address}: {reason}; give the address of the head's job server, as "
            "in --address http://HEAD:8265"
        ) from error
    return job, f"ray job logs --address {address} --follow {job}"


def follow(address: str, job: str) -> Iterator[str]:
    """The job's output as it comes, until the job is over."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    shown = 0
    while True:
        over = client.get_job_status(job).is_terminal()
        text = client.get_job_logs(job)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if over:
            return
        time.sleep(POLL_SECONDS)


def exit_code(address: str, job: str) -> int:
    """The exit code of a job that is over: that of its driver, 1 if it has none."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    info = JobSubmissionClient(address).get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return int(info.driver_exit_code or 1)
