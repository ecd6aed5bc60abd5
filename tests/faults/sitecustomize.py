"""Python imports this as it starts, where this folder is in PYTHONPATH: network calls of the
processes whose numbers are in the file DDPM_FAILING fail, as those of a broken device do.
"""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def _break() -> None:
    while not hasattr(sys.modules.get("pipeline.serving.engine"), "Engine"):
        time.sleep(0.05)
    engine = sys.modules["pipeline.serving.engine"].Engine
    x_0 = engine.x_0

    def failing(self: Any, *arguments: Any) -> Any:
        numbers = Path(os.environ["DDPM_FAILING"])
        if numbers.exists() and str(os.getpid()) in numbers.read_text().split():
            raise RuntimeError("device-side assert triggered")
        return x_0(self, *arguments)

    engine.x_0 = failing


if "DDPM_FAILING" in os.environ:
    threading.Thread(target=_break, daemon=True).start()
