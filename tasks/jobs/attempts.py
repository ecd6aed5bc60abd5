"""The process of a job on the cluster: it starts `ddpm VERB ...`, up to N times.

`python -m tasks.jobs.attempts N VERB ...` starts the command again when it was killed or has
failed, by whatever; not when the user has made a mistake (exit code 2), nor when the job is
stopped. Each start goes on from what is finished.
"""

import signal
import subprocess
import sys
import time
from types import FrameType

FINAL = (0, 2, 130)
"""Exit codes, see tasks/__main__.py."""
PAUSE_SECONDS = 2.0


def main() -> None:
    attempts, command = int(sys.argv[1]), [sys.executable, "-m", "tasks", *sys.argv[2:]]
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped  # Ray signals the child, too
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    for attempt in range(1, attempts + 1):
        code = subprocess.Popen(command).wait()
        if code in FINAL or stopped or attempt == attempts:
            break
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        print(f"attempt {attempt} of {attempts} {how}: the next goes on", file=sys.stderr)
        time.sleep(PAUSE_SECONDS)
        if stopped:
            break
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
