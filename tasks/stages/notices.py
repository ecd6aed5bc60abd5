"""What a person should hear of where a training runs: one sentence each, from facts.

Each has a name, since many workers may have the same to say, and it is said once a run.
"""

from typing import Literal

from pipeline.training.config import Precision


def chosen(precision: Precision, kept: bool, small: bool) -> dict[str, str]:
    """What `training.precision: auto` has become.

    Args:
        kept: the run began with it.
        small: the network is, see precision.is_small.
    """
    if kept:
        why = "in which it began"
    elif small:
        why = "in which CPUs compute so small a network fastest"
    elif precision == "bfloat16":
        why = "which all workers compute natively"
    else:
        why = "since not all workers compute bfloat16 natively"
    return {"chosen": f"training.precision=auto is {precision}, {why}"}


def emulated(
    asked: Literal["auto"] | Precision, precision: Precision, device: str, slowdown: float
) -> dict[str, str]:
    """Where a worker has no instructions for `precision`.

    Args:
        device: of that worker, such as `CPU`.
        slowdown: how many times as long as in float32 the network takes.
    """
    begin, remedy = f"training.precision={precision} is emulated", "; use training.precision=auto"
    if asked == "auto":  # it has been kept, and a run cannot change it
        begin, remedy = f"training goes on in {precision}, emulated", ""
    return {
        "emulated": f"{begin} by a worker's {device}: the network takes {slowdown:.1f} times as "
        f"long as in float32{remedy}"
    }


def crowded(workers: int, cpus_per_worker: int, cores: int) -> dict[str, str]:
    """Where the `workers` of a node have more threads than it has `cores`."""
    threads = workers * cpus_per_worker
    if threads <= cores:
        return {}
    return {
        "crowded": f"{threads} threads (cluster.workers, cluster.cpus_per_worker) share the "
        f"{cores} core{'s' * (cores > 1)} of a node, and wait for each other: ask for fewer"
    }


def idle_gpus(gpus_per_worker: int, gpus: int) -> dict[str, str]:
    """Where CPUs train on a node that has `gpus`."""
    if gpus_per_worker or not gpus:
        return {}
    return {
        "idle GPUs": f"cluster.gpus_per_worker=0 trains on the CPUs of a node that has {gpus} "
        f"GPU{'s' * (gpus > 1)}: use cluster.gpus_per_worker=1, with a worker a GPU"
    }
