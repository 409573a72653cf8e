"""The example that serves, with a model: its answers under load, images that are none, batches padded and captured."""

import asyncio
import io
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from pages import ROOT, commands, words
from PIL import Image
from serving_marks import client_of, example, httpx, mark, running

__all__ = ["example"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine(example):
    torch.manual_seed(0)
    return example.engine.Engine("test_vit", r=8, max_batch=4, device="cpu")


@pytest.fixture(scope="module")
def alone(example, engine):
    """The answer to each image of the load test, by the model itself, one at a time."""
    answers = []
    for body, _ in example.load.GOOD:
        with torch.inference_mode(), Image.open(io.BytesIO(body)) as image:
            share = engine.model(engine.pixels.normalised(engine.pixels(image)[None])).softmax(dim=1)[0]
        answers.append({int(i): float(share[i]) for i in share.topk(5).indices})
    return answers


def test_each_gets_the_answer_of_the_model_alone(example, engine, alone):
    """Forty at once, in batches of up to four."""
    order = [(7 * i) % len(alone) for i in range(40)]

    async def test():
        async with client_of(example.app.application(engine, 4)) as client:
            posts = [client.post("/classify", content=example.load.GOOD[i][0]) for i in order]
            return await asyncio.gather(*posts), (await client.get("/health")).json()

    responses, health = running(test())
    for i, response in zip(order, responses, strict=True):
        assert response.status_code == 200
        top5 = response.json()["top5"]
        assert {each["class"]: each["probability"] for each in top5} == pytest.approx(alone[i], rel=1e-4)
        assert [each["probability"] for each in top5] == sorted((each["probability"] for each in top5), reverse=True)
    assert health["status"] == "ok"
    assert health["images"] == 40
    assert 10 <= health["batches"] < 40
    assert health["r"] == "8"


def half_an_image():
    Image.effect_noise((64, 64), 50).save(file := io.BytesIO(), "PNG")
    return file.getvalue()[:1500]


def many_pixels():
    Image.new("1", (10_000, 6_000)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


BAD = [
    (b"", "none of JPEG, PNG"),
    (b"no image", "none of JPEG, PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"),
    (half_an_image(), "the image cannot be read: "),
    (many_pixels(), "10000x6000 are more than 50000000 pixels"),
]


def test_bad_images_are_refused_and_the_others_are_answered(example, engine, alone):
    async def test():
        async with client_of(example.app.application(engine, 4, 50)) as client:
            bodies = [part for pair in zip(example.load.GOOD, BAD, strict=False) for part in (pair[0][0], pair[1][0])]
            return await asyncio.gather(*(client.post("/classify", content=body) for body in bodies))

    responses = running(test())
    for good, answer in zip(responses[::2], alone, strict=False):
        assert {each["class"]: each["probability"] for each in good.json()["top5"]} == pytest.approx(answer, rel=1e-4)
    for bad, (_, reason) in zip(responses[1::2], BAD, strict=True):
        assert bad.status_code == 400
        assert reason in bad.json()["detail"]
        assert "\n" not in bad.json()["detail"]
        assert "object at" not in bad.json()["detail"]


def test_padded_rows_are_dropped(example, engine, alone):
    """As where each size of a batch is captured: three images go as four, behind them one of an earlier batch."""
    images = [engine.pixels(Image.open(io.BytesIO(body))) for body, _ in example.load.GOOD]
    few, seen = example.engine.Engine("test_vit", r=8, max_batch=4, device="cpu"), []
    few.model = lambda x: (seen.append(len(x)), engine.model(x))[1]
    few.steps = {size: few.steps[size] for size in (1, 4)}
    for some in ([4, 5, 6, 7], [0], [1, 2, 3], [8, 9]):
        answers = few([images[i] for i in some])
        assert len(answers) == len(some)
        for i, answer in zip(some, answers, strict=True):
            assert {each["class"]: each["probability"] for each in answer} == pytest.approx(alone[i], rel=1e-4)
    assert seen == [4, 1, 4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_on_a_gpu(example):
    """Each size and what is padded to it, against the model's own answers; from another thread, as it is served."""
    engine = example.engine.Engine("test_vit", r=8, max_batch=8, device="cuda")
    assert list(engine.steps) == [1, 2, 4, 8]
    images = [engine.pixels(Image.open(io.BytesIO(body))) for body, _ in example.load.GOOD]
    alone = [engine([image])[0] for image in images]
    with torch.inference_mode():
        x = engine.pixels.normalised(torch.stack(images).cuda()).half()
        share = engine.model(x).float().softmax(dim=1).cpu()
    for i, answer in enumerate(alone):
        for each in answer:
            assert each["probability"] == pytest.approx(float(share[i, each["class"]]), rel=2e-2)

    async def test():
        async with client_of(example.app.application(engine, 8)) as client:
            order = [(5 * i) % len(images) for i in range(150)]
            posts = (client.post("/classify", content=example.load.GOOD[i][0]) for i in order)
            responses = await asyncio.gather(*posts)
            return [
                (example.load.GOOD[i], r.status_code, r.json()["top5"]) for i, r in zip(order, responses, strict=True)
            ]

    assert {example.load.verdict(*each, alone) for each in running(test())} == {"answered"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "many"], "not a schedule"),
        (["--r", "90"], "90 is too large for test_vit"),
        (["--model", "no_such_model"], "unknown model 'no_such_model'"),
        (["--device", "tpu"], "use cpu, cuda or cuda:N"),
        (["--max-batch", "0"], "0 is not in the range"),
    ],
)
def test_wrong_options_end_in_a_line(example, arguments, message):
    result = CliRunner().invoke(example.app.main, ["--model", "test_vit", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]


@pytest.mark.parametrize("command", [each for each in commands("docs/serving.md") if "examples/" in each])
def test_commands_of_the_page_have_options_that_there_are(example, command):
    _, script, *arguments = words(command.removesuffix("&"))
    main = {"examples/serving.py": example.app.main, "examples/serving_load.py": example.load.main}[script]
    main.make_context(script, [each for each in arguments if each != "--help"])


def test_options_are_variables_of_the_environment(example, monkeypatch):
    made = {}
    monkeypatch.setattr(example.app, "Engine", lambda **model: made.update(model))
    monkeypatch.setattr(example.app.uvicorn, "run", lambda app, **server: made.update(server))
    variables = {"SERVING_R": "8,-1.0", "SERVING_PORT": "8123", "SERVING_MAX_BATCH": "3", "SERVING_PRETRAINED": "1"}
    assert CliRunner().invoke(example.app.main, [], env=variables).exit_code == 0
    assert (made["r"], made["port"], made["max_batch"], made["pretrained"]) == ((8, -1.0), 8123, 3, True)


@pytest.fixture
def server(tmp_path):
    """A process that serves, and its address; an image waits for others for a while."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "SERVING_R": "8"}
    command = [sys.executable, ROOT / "examples" / "serving.py", "--model", "test_vit", "--device", "cpu"]
    options = ["--port", str(port), "--max-batch", "8", "--max-wait", "200"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen([*command, *options], env=environment, stderr=log) as it:
        yield it, f"http://127.0.0.1:{port}"
        it.kill()
    print((tmp_path / "log").read_text())


def test_under_load_and_ended_by_a_signal(example, server):
    process, url = server
    options = ["--clients", "16", "--requests", "80", "--rounds", "2", "--bad", "0.2"]
    loaded = CliRunner().invoke(example.load.main, [url, *options])
    assert loaded.exit_code == 0, loaded.output
    assert re.search(r"^r 8: \d+\.\d images/s, 1\.00x \(1\.00 to 1\.00\), batches of \d\.\d, latency", loaded.output)
    assert len(re.findall(r"(\d+) answered, (\d+) refused|(\d+) refused, (\d+) answered", loaded.output)) == 1

    async def end():
        async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
            waiting = [asyncio.create_task(client.post("/classify", content=mark(i))) for i in range(7)]
            while not waiting[0].done() and (await client.get("/health")).json()["waiting"] < 7:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return [response.status_code for response in await asyncio.gather(*waiting)]

    assert running(end()) == [200] * 7
    assert process.wait(20) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


def test_the_load_test_counts_what_goes_wrong(example, alone):
    own = [[{"class": i, "probability": p} for i, p in answer.items()] for answer in alone]
    good, bad = example.load.GOOD[3], example.load.BAD[3]
    told = [(good, 200, own[3]), (good, 200, own[4]), (good, 500, None), (good, None, None), (bad, 413, None)]
    verdicts = [example.load.verdict(*each, own) for each in [*told, (bad, 200, own[3])]]
    assert verdicts == ["answered", "wrong", "wrong (500)", "lost", "refused", "wrong (200)"]
