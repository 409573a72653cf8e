"""See that a built site needs no network: ``python .ci/check_site.py site``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path


class Fetched(HTMLParser):
    """What a browser fetches for a page: all but links."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        address = told.get("src") or (tag == "link" and told.get("rel") != "canonical" and told.get("href"))
        if address:
            self.addresses.append(address)


def problems(site: Path) -> list[str]:
    """Addresses that lead out of the site or to nothing in it."""
    found = []
    for page in sorted(site.rglob("*.html")):
        fetched = Fetched()
        fetched.feed(page.read_text(encoding="utf-8"))
        for address in fetched.addresses:
            path = address.partition("?")[0].partition("#")[0]
            outside = "//" in path and not path.startswith("data:")
            is_rooted = path.startswith("/") and page.name == "404.html"  # which is served from anywhere
            if outside or not (path.startswith("data:") or is_rooted or (page.parent / path).exists()):
                found.append(f"{page.relative_to(site)}: {address}")
    if not (site / "search.js").exists():
        found.append("no search.js: pages that are opened as files cannot be searched")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(Path(sys.argv[1]))) or None)
