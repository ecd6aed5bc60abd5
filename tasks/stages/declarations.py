"""The stages of the pipeline: what each reads of the config and of the outputs before it.

A stage's code lies in a file of its own, and is imported when it runs. Its declaration stands here
and not there, because the code brings torch, Ray and MLflow along, for which `ddpm status`,
`explain` and what else only looks at the stages would wait for seconds.
"""

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.data.config import SCANNED, DataConfig
from pipeline.data.preprocess import SHARD_SET_FORMAT
from pipeline.data.source import scan
from pipeline.registry.versions import find_version, read_reference
from tasks.stages.stage import External, Look, Stage, at

LAST = "sample"
"""What `ddpm run` runs, with all that it needs."""


def _source(config: RunConfig, look: Look) -> External:
    """The images of the source: a hash of what they are in place of where they are."""
    index = storage.join(config.storage, "index")
    found = scan(config.data, index, look.remember, look.progress, look.into)
    return External({"source": found.fingerprint}, found)


def _why_not_registered(folder: str, tracking_uri: str) -> str:
    """Whether the version that the output speaks of is in the registry that is used now."""
    reference = read_reference(folder)
    if reference.tracking_uri == tracking_uri and find_version(
        reference.name, reference.digest, tracking_uri
    ):
        return ""
    return f"the version it made is not in the registry at {tracking_uri}"


STAGES = (
    Stage(
        "preprocess",
        at("tasks.stages.preprocess:run"),
        reads=tuple(f"data.{key}" for key in DataConfig.model_fields if key not in SCANNED),
        format=SHARD_SET_FORMAT,
        inputs_of=_source,
    ),
    Stage(
        "reference",
        at("tasks.stages.reference:run"),
        reads=("name", "seed", "evaluation.classifier_epochs", "evaluation.extractor"),
        apart_from=("evaluation.extractor.file",),  # its hash stands beside it
        inputs=("preprocess",),
        format=3,
    ),
    Stage(
        "train",
        at("tasks.stages.train:run"),
        reads=("seed", "network", "diffusion", "training"),
        inputs=("preprocess",),
        beside=("reference",),
        rows=at("tasks.stages.estimate:of_training"),
        paced=True,
    ),
    Stage(
        "evaluate",
        at("tasks.stages.evaluate:run"),
        reads=("seed", "evaluation", "sampling"),
        apart_from=("evaluation.extractor.file", "evaluation.during_training"),
        inputs=("preprocess", "train", "reference"),
        format=2,
        rows=at("tasks.stages.estimate:of_evaluation"),
    ),
    Stage(
        "register",
        at("tasks.stages.register:run"),
        reads=("name", "registry", "serving"),
        inputs=("preprocess", "train", "evaluate"),
        why_invalid=_why_not_registered,
    ),
    Stage(
        "sample",
        at("tasks.stages.sample:run"),
        reads=("seed", "sampling"),
        inputs=("register",),
        rows=at("tasks.stages.estimate:of_samples"),
    ),
)
"""Each after its inputs."""
