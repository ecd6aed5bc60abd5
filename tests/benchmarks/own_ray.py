"""A Ray of a benchmark's own, and stages of the pipeline run on it."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator

from pipeline.config import RunConfig


@contextlib.contextmanager
def started_ray(num_cpus: int) -> Iterator[None]:
    """Quiet, without a dashboard; it ends with this process, however that ends."""
    import ray
    import ray.data

    logging.disable(logging.WARNING)  # Ray Data reports every execution
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets want a short path
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()  # with Serve; its own shutdown makes Ray complain on the terminal


def run_stage(config: RunConfig, stage: str) -> str:
    """Run the stages up to one, as `ddpm` does; the folder of its output."""
    from tasks.stages import workflow
    from tasks.stages.declarations import STAGES
    from tasks.stages.plan import make_plan
    from tasks.stages.preprocess import look_on_cluster
    from tasks.stages.progress import Board
    from tasks.stages.stage import Look
    from tasks.stages.tracking import tracked_run

    tracking_uri = f"sqlite:///{config.storage}/mlflow.db"
    look = Look(remember=True, into=look_on_cluster)
    with contextlib.redirect_stdout(io.StringIO()):
        plan = make_plan(STAGES, config, tracking_uri, stage, look)
        workflow.run(plan, Board(), tracked_run)
    return plan[stage].folder
