"""How one would serve diffusers on Ray Serve: whole requests, in batches or one by one.

A batch holds requests of any settings, as the same load needs: each row of the network's call has
its own timestep and each request its own scheduler. It runs until its longest request is done, and
those that are done before stay in as padding; nothing joins on the way.
"""

import asyncio
import base64
from typing import Any

import diffusers
import torch
from ray import serve
from torch import Tensor

from pipeline.data.images import png, to_uint8

WAIT = 0.01
"""Seconds that a batch that is not full waits for another request: Ray Serve's default."""
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "ancestral": diffusers.DDPMScheduler,
    "dpm_solver_pp": diffusers.DPMSolverMultistepScheduler,
}


class _Member:
    """A request of a batch."""

    def __init__(self, body: dict[str, Any], schedule: Any, null_label: int) -> None:
        self.guidance = float(body["guidance_scale"])
        self.labels = (int(body["class_label"]), null_label)
        self.generator = torch.Generator().manual_seed(int(body["seed"]))
        self.scheduler = SCHEDULERS[body["sampler"]].from_config(schedule)
        self.scheduler.set_timesteps(int(body["num_inference_steps"]))
        self.takes_noise = body["sampler"] != "dpm_solver_pp"  # whose ODE form has none

    def step(self, i: int, output: Tensor, x: Tensor) -> Tensor:
        options = {"generator": self.generator} if self.takes_noise else {}
        t = self.scheduler.timesteps[i]
        stepped: Tensor = self.scheduler.step(output, t, x, **options).prev_sample
        return stepped


class WholeRequests:
    """A replica.

    Args:
        folder: of a DDPMPipeline whose network takes labels.
        batch: the most requests that are drawn together.
    """

    def __init__(self, folder: str, batch: int) -> None:
        unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
        self.unet = unet.eval()
        self.schedule = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.draw.set_max_batch_size(batch)  # type: ignore[attr-defined]
        warm_up = {"seed": 0, "num_inference_steps": 2, "guidance_scale": 1, "class_label": 0}
        for sampler in SCHEDULERS:
            self.run([{**warm_up, "sampler": sampler}] * batch)

    async def __call__(self, request: Any) -> dict[str, Any]:
        picture = await self.draw(await request.json())  # type: ignore[call-arg, arg-type, misc]
        return {"data": [{"b64_json": base64.b64encode(picture).decode()}]}

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=WAIT)
    async def draw(self, bodies: list[dict[str, Any]]) -> list[bytes]:
        return await asyncio.to_thread(self.run, bodies)

    @torch.inference_mode()
    def run(self, bodies: list[dict[str, Any]]) -> list[bytes]:
        null_label = self.unet.config.num_class_embeds - 1
        members = [_Member(body, self.schedule.config, null_label) for body in bodies]
        steps = [len(member.scheduler.timesteps) for member in members]
        is_guided = torch.tensor([member.guidance != 0 for member in members])
        scales = torch.tensor([member.guidance for member in members])[:, None, None, None]
        own, null = torch.tensor([member.labels for member in members]).T
        labels = torch.cat([own, null[is_guided]])
        size = self.unet.config.sample_size
        shape = (1, self.unet.config.in_channels, size, size)
        x = torch.cat([torch.randn(shape, generator=member.generator) for member in members])
        for i in range(max(steps)):
            t = torch.stack(
                [
                    member.scheduler.timesteps[min(i, n - 1)]
                    for member, n in zip(members, steps, strict=True)
                ]
            )
            rows, times = torch.cat([x, x[is_guided]]), torch.cat([t, t[is_guided]])
            output = self.unet(rows, times, class_labels=labels).sample
            output, of_null = output[: len(x)], output[len(x) :]
            w = scales[is_guided]
            output[is_guided] = (1 + w) * output[is_guided] - w * of_null
            for row, (member, n) in enumerate(zip(members, steps, strict=True)):
                if i < n:
                    at = slice(row, row + 1)
                    x[at] = member.step(i, output[at], x[at])
        return [png(pixels) for pixels in to_uint8(x.nan_to_num())]


def whole_requests(folder: str, replicas: int, batch: int) -> serve.Application:
    """The application. A replica has its next batch at hand while it draws one."""
    deployment: Any = serve.deployment(WholeRequests)
    return deployment.options(
        num_replicas=replicas,
        max_ongoing_requests=2 * batch if batch > 1 else 1,
        ray_actor_options={"num_cpus": 1},
    ).bind(folder, batch)
