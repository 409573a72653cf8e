"""Load servers of examples/serving.py in turns: speed, latency, and what became of each request.

python examples/serving.py --port 8001 & python examples/serving.py --port 8002 --r 8 &
python examples/serving_load.py http://localhost:8001 http://localhost:8002
"""

import asyncio
import io
import random
import statistics
import sys
import time
from collections import Counter

import click
import httpx2 as httpx
from PIL import Image


def spots(seed):
    """A JPEG of 320x240 pixels."""
    image = Image.frombytes("RGB", (8, 6), random.Random(seed).randbytes(8 * 6 * 3)).resize((320, 240))
    image.save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


GOOD = [(spots(seed), 200) for seed in range(16)]
BAD = [(b"", 400), (b"text", 400), (GOOD[0][0][:999], 400), (bytes(10_000_001), 413)]


async def load(url, requests, clients):
    """Seconds of all, and (request, status, answer, seconds) of each. A client sends its next when it has an answer."""
    left, answers = requests[::-1], []

    async def one(client):
        while left:
            request, begin, status, top5 = left.pop(), time.perf_counter(), None, None
            try:
                response = await client.post("/classify", content=request[0])
                status, top5 = response.status_code, response.json().get("top5")
            except httpx.TransportError as error:
                print(f"lost: {error!r}", file=sys.stderr)
            answers.append((request, status, top5, time.perf_counter() - begin))

    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return time.perf_counter() - begin, answers


def verdict(request, status, top5, alone):
    """What became of it. Of the answers to images sent alone, that to the same image must be the nearest."""
    if status != 200 or status != request[1]:
        return "lost" if status is None else "refused" if status == request[1] else f"wrong ({status})"
    a, *others = ({each["class"]: each["probability"] for each in top5} for top5 in (top5, *alone))
    far = [sum(abs(a.get(name, 0) - b.get(name, 0)) for name in a.keys() | b.keys()) for b in others]
    return "answered" if far.index(min(far)) == GOOD.index(request) else "wrong"


def health(url):
    """What a server says of itself, once it runs."""
    while True:
        try:
            return httpx.get(f"{url}/health", trust_env=False).raise_for_status().json()
        except httpx.TransportError:
            time.sleep(0.5)


@click.command()
@click.argument("urls", nargs=-1, required=True)
@click.option("--clients", default=64, show_default=True)
@click.option("--requests", default=400, show_default=True, help="In each round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--bad", default=0.04, show_default=True, help="The share that is no image.")
def main(urls, clients, requests, rounds, bad):
    """Print what each server did, against the first; status 1 if a request was lost, or got not its own answer."""
    draw, first = random.Random(0), [health(url) for url in urls]
    alone = [[top5 for _, _, top5, _ in asyncio.run(load(url, GOOD, 1))[1]] for url in urls]
    rates, seconds, became = ([kind() for _ in urls] for kind in (list, list, Counter))
    for i in [*range(len(urls))] * rounds:
        chosen = [draw.choice(BAD if draw.random() < bad else GOOD) for _ in range(requests)]
        took, answers = asyncio.run(load(urls[i], chosen, clients))
        became[i].update(found := [verdict(*each[:3], alone[i]) for each in answers])
        rates[i].append(found.count("answered") / took)
        seconds[i] += [each[3] for each in answers if each[1] == 200]
    for i, old in enumerate(first):
        new = health(urls[i])
        batch = (new["images"] - old["images"]) / (new["batches"] - old["batches"])
        ratios = sorted(rate / base for rate, base in zip(rates[i], rates[0], strict=True))
        p50, p95, p99 = (1e3 * statistics.quantiles(seconds[i], n=100)[at] for at in (49, 94, 98))
        print(f"r {new['r']}: {statistics.median(rates[i]):.1f} images/s, {statistics.median(ratios):.2f}x", end=" ")
        print(f"({ratios[0]:.2f} to {ratios[-1]:.2f}), batches of {batch:.1f}, latency {p50:.0f} ms", end=" ")
        print(f"(p95 {p95:.0f}, p99 {p99:.0f}); {', '.join(f'{n} {what}' for what, n in became[i].items())}")
    print(", ".join(f"{name} {told}" for name, told in [*first[0].items()][4:] if name != "r"))
    sys.exit(any(set(found) - {"answered", "refused"} for found in became))


if __name__ == "__main__":
    main()
