"""The names of figures in MLflow, whose pages show a group for what stands before the `/`.

    train/      loss, loss_quartile_1 ..., grad_norm, lr
    speed/      images_per_second, images_per_second_per_worker, utilisation, data_wait
    system/     the machine, by MLflow's own names
    eval/       figures of the evaluation, and holdout_loss of every checkpoint
    eval_n200/  figures of the small evaluation of every checkpoint, of 200 images

Checkpoints, metrics.json and the rules of the gate have the plain name, as MLflow had before.
"""

import re

TRAIN = r"loss|loss_quartile_\d+|grad_norm|lr"
SPEED = r"images_per_second|images_per_second_per_worker|utilisation|data_wait"
SMALL = r"(.+)_n(\d+)"
"""A small evaluation's name, of before there were groups."""


def grouped(name: str) -> str:
    """A figure's name in MLflow, from its plain name; a name with a group stays as it is."""
    if "/" in name:
        return name
    if re.fullmatch(TRAIN, name):
        return f"train/{name}"
    if re.fullmatch(SPEED, name):
        return f"speed/{name}"
    if small := re.fullmatch(SMALL, name):
        return f"eval_n{small[2]}/{small[1]}"
    return f"eval/{name}"
