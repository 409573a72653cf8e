"""The example that serves: each request its own answer, errors for whom they belong, and an end that loses nothing."""

import asyncio
import tracemalloc
from types import SimpleNamespace

import pytest
from serving_marks import Marks, classes, client_of, example, httpx, mark, running, until

__all__ = ["example"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_waits_goes_in_its_order_in_full_batches(example):
    engine = Marks()
    engine.free.clear()

    async def test():
        batcher = example.engine.Batcher(engine, 4, 0)
        run = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.answer(0))
        await until(engine.begun.is_set)
        rest = [asyncio.create_task(batcher.answer(i)) for i in range(1, 12)]
        await asyncio.sleep(0)
        engine.free.set()
        answers = await asyncio.gather(first, *rest)
        batcher.close()
        await run
        return [answer[0]["class"] for answer in answers]

    assert running(test()) == list(range(12))
    assert engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


def test_a_full_batch_does_not_wait_and_a_single_image_does_not_wait_for_ever(example):
    engine = Marks()

    async def test(max_wait, numbers):
        async with client_of(example.app.application(engine, 3, max_wait)) as client:
            return await asyncio.gather(*(classes(client.post("/classify", content=mark(i))) for i in numbers))

    assert running(test(60_000, range(3))) == [(200, i) for i in range(3)]
    assert running(test(50, [7])) == [(200, 7)]
    assert [sorted(batch) for batch in engine.batches] == [[0, 1, 2], [7]]


def test_a_body_that_is_too_large_is_refused(example, monkeypatch):
    monkeypatch.setattr(example.app, "MOST_BYTES", 1000)
    largest = mark(3) + bytes(1000 - len(mark(3)))

    async def test():
        async with client_of(example.app.application(Marks())) as client:
            return [await client.post("/classify", content=body) for body in (largest, largest + b"0")]

    fits, too_large = running(test())
    assert fits.json()["top5"][0]["class"] == 3
    assert too_large.status_code == 413
    assert too_large.json()["detail"] == "the image has more than 1000 bytes"


def test_a_body_that_is_too_large_is_not_kept(example, monkeypatch):
    monkeypatch.setattr(example.app, "MOST_BYTES", 1000)

    async def stream():
        for _ in range(1000):
            yield bytes(10_000)

    tracemalloc.start()
    with pytest.raises(example.app.HTTPException):
        running(example.app.read_body(SimpleNamespace(stream=stream)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1_000_000


def test_a_full_queue_refuses_and_keeps_what_it_has(example):
    engine = Marks()
    engine.free.clear()

    async def test():
        async with client_of(example.app.application(engine, 1, 0, max_queue=3)) as client:
            kept = [asyncio.create_task(classes(client.post("/classify", content=mark(i)))) for i in range(3)]
            await until(engine.begun.is_set)
            refused = await client.post("/classify", content=mark(3))
            engine.free.set()
            return refused, await asyncio.gather(*kept), await classes(client.post("/classify", content=mark(4)))

    refused, kept, later = running(test())
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["detail"] == "3 requests wait already"
    assert kept == [(200, 0), (200, 1), (200, 2)]
    assert later == (200, 4)


def test_an_error_of_the_model_reaches_its_batch_and_no_other(example):
    engine = Marks()

    async def test():
        async with client_of(example.app.application(engine, 2, 60_000)) as client:
            pairs = []
            for pair in ((1, 2), (13, 3), (4, 5), (13, 13), (13, 13), (13, 13)):
                pairs.append(await asyncio.gather(*(classes(client.post("/classify", content=mark(i))) for i in pair)))
            sick = await client.get("/health")
            well = await asyncio.gather(*(classes(client.post("/classify", content=mark(i))) for i in (6, 7)))
            reason = client.post("/classify", content=mark(13)), client.post("/classify", content=mark(0))
            return pairs, sick, well, (await asyncio.gather(*reason))[1], await client.get("/health")

    pairs, sick, well, failed, health = running(test())
    failure = [(500, False)] * 2
    assert pairs == [[(200, 1), (200, 2)], failure, [(200, 4), (200, 5)], failure, failure, failure]
    assert (sick.status_code, sick.json()["status"]) == (503, "failing")
    assert well == [(200, 6), (200, 7)]
    assert failed.json()["detail"] == "the model failed: RuntimeError"
    assert health.status_code == 200


def test_who_goes_away_takes_nobody_along(example):
    engine = Marks()
    engine.free.clear()

    async def test():
        async with client_of(example.app.application(engine, 4, 0)) as client:
            first = asyncio.create_task(classes(client.post("/classify", content=mark(0))))
            await until(engine.begun.is_set)
            rest = [asyncio.create_task(classes(client.post("/classify", content=mark(i)))) for i in (1, 2, 3)]
            await asyncio.sleep(0.2)
            first.cancel()
            rest[1].cancel()
            await asyncio.sleep(0)
            engine.free.set()
            told = await asyncio.gather(first, *rest, return_exceptions=True)
            return told, await classes(client.post("/classify", content=mark(4)))

    told, later = running(test())
    assert [told[1], told[3], later] == [(200, 1), (200, 3), (200, 4)]
    assert isinstance(told[0], asyncio.CancelledError)


def test_the_end_answers_what_waits_and_refuses_what_comes(example):
    engine = Marks()
    engine.free.clear()

    async def test():
        app = example.app.application(engine, 2, 60_000)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            lifespan = app.router.lifespan_context(app)
            await lifespan.__aenter__()
            waiting = [asyncio.create_task(classes(client.post("/classify", content=mark(i)))) for i in range(5)]
            await until(engine.begun.is_set)
            await asyncio.sleep(0.3)
            end = asyncio.create_task(lifespan.__aexit__(None, None, None))
            await asyncio.sleep(0)
            late = await client.post("/classify", content=mark(9))
            health = await client.get("/health")
            assert not end.done()
            engine.free.set()
            await end
            return await asyncio.gather(*waiting), late, health

    waiting, late, health = running(test())
    assert waiting == [(200, i) for i in range(5)]
    assert (late.status_code, late.json()["detail"]) == (503, "shutting down")
    assert (health.status_code, health.json()["status"]) == (503, "closing")
