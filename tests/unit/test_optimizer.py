"""What a gradient does to the weights: its parts, the learning rate, the loss scale of float16."""

import pytest
import torch
from torch import nn

from pipeline.errors import TrainingDiverged
from pipeline.training.optimizer import LEAST_SCALE, MAX_BAD_STEPS, LossScale, learning_rate
from tests.unit.test_training import CPU, config, everything, fresh, run


@pytest.mark.parametrize("objective", ["uniform", "loss_second_moment"])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole_batch(objective: str) -> None:
    """By the first moments of the optimizer after a step: a tenth of the clipped gradient."""
    moments = []
    for accumulate in (1, 2, 8):
        training = config(steps=1, accumulate=accumulate, timestep_sampler=objective, grad_clip=1e9)
        state = fresh(training)
        (loss,) = run(state, training)
        of = {name: value for name, value in everything(state).items() if "exp_avg/" in name}
        assert max(float(value.abs().max()) for value in of.values()) > 1e-4
        moments.append((loss, of))
    for loss, of in moments[1:]:
        assert loss == pytest.approx(moments[0][0], rel=1e-6)
        for name, value in of.items():
            torch.testing.assert_close(value, moments[0][1][name], rtol=1e-4, atol=1e-8)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    training = config(steps=102, warmup_steps=2, lr_schedule="cosine", lr=1.0)
    assert [learning_rate(step, training) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(52, training) == pytest.approx(0.5)
    assert learning_rate(101, training) < 1e-3
    constant = config(steps=102, warmup_steps=0, lr=1.0)
    assert {learning_rate(step, constant) for step in range(102)} == {1.0}


def test_learning_rate_falls_with_the_root_of_the_step() -> None:
    training = config(
        steps=10**6, warmup_steps=10, lr_schedule="inverse_sqrt", lr_reference_steps=100, lr=1.0
    )
    rates = [learning_rate(step, training) for step in (4, 10, 99, 100, 400, 10_000)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 0.5, 0.1]


def parameter_and_optimizer() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(2))
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def backward(scale: LossScale, parameter: nn.Parameter, factor: float) -> None:
    parameter.grad = None
    scale.backward((factor * parameter).sum())


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_halved() -> None:
    scale = LossScale(CPU, enabled=True)
    parameter, optimizer = parameter_and_optimizer()
    before = scale.scaler.get_scale()
    backward(scale, parameter, float("inf"))
    scale.scaler.unscale_(optimizer)
    scale.step(optimizer)
    assert parameter.tolist() == [1.0, 1.0]
    assert scale.scaler.get_scale() == before / 2
    assert scale.bad_steps == 1
    backward(scale, parameter, 0.25)
    scale.scaler.unscale_(optimizer)
    scale.step(optimizer)
    assert parameter.tolist() == [0.75, 0.75], "the scale is taken out again"
    assert scale.bad_steps == 0


def test_the_scale_has_a_floor_and_bad_steps_a_limit() -> None:
    scale = LossScale(CPU, enabled=True)
    parameter, optimizer = parameter_and_optimizer()
    for _ in range(MAX_BAD_STEPS - 1):
        backward(scale, parameter, float("nan"))
        scale.scaler.unscale_(optimizer)
        scale.step(optimizer)
    assert scale.scaler.get_scale() == LEAST_SCALE
    backward(scale, parameter, float("nan"))
    scale.scaler.unscale_(optimizer)
    with pytest.raises(TrainingDiverged, match=r"overflowed in 50 steps.*use training.precision"):
        scale.step(optimizer)


def test_a_scale_that_is_saved_and_loaded_goes_on_as_it_was() -> None:
    one, other = LossScale(CPU, enabled=True), LossScale(CPU, enabled=True)
    parameter, optimizer = parameter_and_optimizer()
    for factor in (float("inf"), 1.0, 1.0, float("inf")):
        backward(one, parameter, factor)
        one.scaler.unscale_(optimizer)
        one.step(optimizer)
    other.load(one.tensors())
    assert other.tensors() == one.tensors()
    assert one.tensors()["scale"] == 2.0**14
    assert LossScale(CPU, enabled=False).tensors() == {}
