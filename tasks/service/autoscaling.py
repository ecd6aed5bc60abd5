"""How many replicas a service of [least, most] has: as many as the work in hand keeps busy."""

import math
from typing import Any

SECONDS_OF_WORK = "seconds_of_work"
"""What each replica reports: how long the images in its hands take it."""
TARGET_SECONDS = 5.0
"""Of work for each replica. Less, and replicas come for work that is done before they are up."""


def by_work(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's autoscaling policy: the replicas that are wanted, and its state (none).

    Bounds and delays are Ray Serve's, as of the deployment's AutoscalingConfig.
    """
    of_replicas = (context.aggregated_metrics or {}).get(SECONDS_OF_WORK, {})
    return max(1, math.ceil(sum(of_replicas.values()) / TARGET_SECONDS)), {}
