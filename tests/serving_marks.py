"""The example that serves, and in the place of its model one whose answers, failures and pauses a test chooses."""

import asyncio
import io
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example():
    """The modules of the example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        import serving
        import serving_engine
        import serving_load

        yield SimpleNamespace(app=serving, engine=serving_engine, load=serving_load)


class Marks:
    """In the place of an engine: answers with the image's number, as soon as it may; fails at 13."""

    def __init__(self):
        self.about = {}
        self.batches, self.free, self.begun = [], threading.Event(), threading.Event()
        self.free.set()

    def pixels(self, image):
        return image.getpixel((0, 0))

    def __call__(self, images):
        self.batches.append(list(images))
        self.begun.set()
        assert self.free.wait(20)
        if 13 in images:
            raise RuntimeError("out of luck")
        return [[{"class": number, "probability": 1.0}] for number in images]


def mark(number):
    """An image that Marks knows by its number."""
    Image.new("L", (2, 2), number).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@asynccontextmanager
async def client_of(app):
    """Within its lifespan, which ends before the client does."""
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)
    async with client, app.router.lifespan_context(app):
        yield client


def running(test):
    """Run a coroutine for at most twenty seconds."""
    return asyncio.run(asyncio.wait_for(test, 20))


async def classes(response):
    response = await response
    return response.status_code, response.status_code == 200 and response.json()["top5"][0]["class"]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.002)
