"""Classify images over HTTP by a model that merges; what comes together is computed together. See docs/serving.md.

python examples/serving.py --model vit_small_patch16_224 --pretrained --r 8    # or SERVING_R=8, and so all options
curl --data-binary @photo.jpg localhost:8000/classify
"""

import asyncio
import io
from contextlib import asynccontextmanager

import click
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image, UnidentifiedImageError
from serving_engine import Batcher, Engine, NoAnswerError
from starlette.requests import ClientDisconnect

from tome.cli.arguments import DeviceType, ScheduleType

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MOST_BYTES, MOST_PIXELS = 10_000_000, 50_000_000  # of one image: few bytes may hold many pixels


async def read_body(request):
    """The bytes of a request. Of too many the rest is read, not kept: who still sends would not see the answer."""
    body = bytearray()
    async for part in request.stream():
        body += part[: MOST_BYTES + 1 - len(body)]
    if len(body) > MOST_BYTES:
        raise HTTPException(413, f"the image has more than {MOST_BYTES} bytes")
    return body


def read_image(body, pixels):
    """The image as the model takes it."""
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} are more than {MOST_PIXELS} pixels")
            return pixels(image)
    except Exception as error:  # PIL and zlib raise whatever broken bytes lead them to
        why = f"none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise HTTPException(400, f"the image cannot be read: {why}") from error


def application(engine, max_batch=32, max_wait=5.0, max_queue=256):
    """The app around an engine; the options are those of the command line."""
    batcher, room = Batcher(engine, max_batch, max_wait / 1000), asyncio.Semaphore(max_queue)

    @asynccontextmanager
    async def lifespan(app):
        running = asyncio.create_task(batcher.run())
        yield
        batcher.close()
        await running

    app = FastAPI(title="Classification by a model that merges tokens", lifespan=lifespan)

    @app.post("/classify")
    async def classify(request: Request):
        if room.locked():
            raise HTTPException(503, f"{max_queue} requests wait already", {"Retry-After": "1"})
        async with room:
            try:
                image = await asyncio.to_thread(read_image, await read_body(request), engine.pixels)
                return {"top5": await batcher.answer(image)}
            except NoAnswerError as error:
                raise HTTPException(*error.args) from error
            except ClientDisconnect as error:
                raise HTTPException(400, "the connection ended before the image did") from error

    @app.get("/health")
    async def health(response: Response):
        status = "closing" if batcher.closed else "failing" if batcher.failed_in_a_row > 2 else "ok"
        response.status_code = 200 if status == "ok" else 503
        return {"status": status, "waiting": len(batcher.waiting), **batcher.counts, **engine.about}

    return app


@click.command(context_settings={"auto_envvar_prefix": "SERVING", "show_default": True})
@click.option("--model", default="vit_small_patch16_224")
@click.option("--pretrained", is_flag=True, help="The weights of the model's name; else random ones.")
@click.option("--checkpoint", type=click.Path(exists=True), help="The weights in this file.")
@click.option("--r", type=ScheduleType(), help="What merges; without it nothing is patched.")
@click.option("--device", type=DeviceType(), help="cpu or cuda; the GPU if there is one.")
@click.option("--max-batch", type=click.IntRange(1), default=32)
@click.option("--max-wait", type=click.FloatRange(0), default=5.0, help="Milliseconds that an image waits for others.")
@click.option("--max-queue", type=click.IntRange(1), default=256, help="Requests at a time; others get status 503.")
@click.option("--host", default="127.0.0.1")
@click.option("--port", type=click.IntRange(1), default=8000)
def main(host, port, max_wait, max_queue, **model):
    """Serve until SIGTERM or Ctrl-C; what was accepted is answered before the end."""
    app = application(Engine(**model), model["max_batch"], max_wait, max_queue)
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=30)


if __name__ == "__main__":
    main()
