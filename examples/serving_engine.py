"""A model that answers images in batches, for examples/serving.py: each image its own answer, whatever came with it."""

import asyncio
import logging
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from tome import data, measure
from tome.cli import models


class Engine:
    """The five likeliest classes of images; on a GPU compiled, and a CUDA graph for each of a few sizes of batches."""

    def __init__(self, model, r=None, max_batch=32, device=None, pretrained=False, checkpoint=None):
        device = models.find_device(device)
        made = models.load(model, pretrained, device, checkpoint)
        self.model, self.pixels, self.best = made.model, data.pixels(made.model, made.pixels()), {}
        if r is not None:
            models.checked_plan(model, models.patched_shape(self.model), r)
            self.model.r = r
        self.about = {"model": model, "r": str(r), **measure.machine(device)}
        self.x = torch.zeros(max_batch, *self.pixels.config["input_size"], dtype=torch.uint8, device=device)
        self.steps = {size: partial(self.step, size, torch.float32) for size in range(1, max_batch + 1)}
        if device.type == "cuda":
            self.model = torch.compile(self.model.half(), dynamic=False)
            sizes = sorted({1, *(max(1, max_batch >> halvings) for halvings in range(4))})
            with torch.cuda.device_of(self.x):
                self.steps = {size: measure.graphed(partial(self.step, size, torch.float16)) for size in sizes}
        self([torch.zeros_like(self.x[0], device="cpu")] * max_batch)  # the first call is slow: not a request's

    def step(self, size, dtype):
        """Read the first rows of x. Each replay of a graph writes into the tensor that its capture left in best."""
        out = self.model(self.pixels.normalised(self.x[:size]).to(dtype))
        share = getattr(out, "logits", out).float().softmax(dim=1)
        self.best[size] = torch.stack([part.double() for part in share.topk(min(5, share.shape[1]))], dim=2)

    @torch.inference_mode()
    def __call__(self, images):
        """An answer for each image, uint8 [C, H, W]; at most max_batch, by one thread at a time."""
        size = next(size for size in self.steps if size >= len(images))
        with torch.cuda.device_of(self.x):
            self.x[: len(images)] = torch.stack(images)  # the rows behind are of earlier images, and not read below
            self.steps[size]()
            rows = self.best[size][: len(images)].tolist()
        return [[{"class": int(index), "probability": share} for share, index in row] for row in rows]


class NoAnswerError(Exception):
    """The status in HTTP, and why."""


class Batcher:
    """Hands what waits to an engine, as soon as that is free and the batch is full or its first image waited enough."""

    def __init__(self, engine, max_batch, max_wait):
        self.engine, self.max_batch, self.max_wait = engine, max_batch, max_wait
        self.waiting, self.more, self.closed = deque(), asyncio.Event(), False
        self.counts, self.failed_in_a_row = Counter(images=0, batches=0), 0

    async def answer(self, image):
        """The engine's answer; NoAnswerError if it fails, or takes no more."""
        if self.closed:
            raise NoAnswerError(503, "shutting down")
        loop = asyncio.get_running_loop()
        self.waiting.append((image, future := loop.create_future(), loop.time() + self.max_wait))
        self.more.set()
        return await future

    def close(self):
        self.closed = True
        self.more.set()

    async def run(self):
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while self.waiting or not self.closed:
                self.more.clear()
                left = self.waiting[0][2] - loop.time() if self.waiting else None
                if len(self.waiting) < self.max_batch and not self.closed and (left is None or left > 0):
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self.more.wait(), left)
                    continue
                batch = [self.waiting.popleft() for _ in range(min(self.max_batch, len(self.waiting)))]
                try:
                    answers = await loop.run_in_executor(thread, self.engine, [image for image, _, _ in batch])
                    self.failed_in_a_row = 0
                except Exception as error:  # whatever a model raises is the answer to its batch, and the server goes on
                    logging.getLogger("uvicorn.error").exception("a batch of %d images failed", len(batch))
                    answers = [NoAnswerError(500, f"the model failed: {type(error).__name__}")] * len(batch)
                    self.failed_in_a_row += 1
                for (_, future, _), answer in zip(batch, answers, strict=True):
                    if not future.done():  # whoever waited may have gone
                        (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)
                self.counts.update(images=len(batch), batches=1)
