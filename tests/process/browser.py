"""A real browser for the tests of the dashboard page, and a proxy to put before it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

SIZES = ((1280, 800), (1920, 1080))
MISSING = "needs selenium, Chromium and its driver (Debian: apt install chromium chromium-driver)"


def programs() -> tuple[str, str]:
    """Return where Chromium and its driver are; skip the test where they are not."""
    pytest.importorskip("selenium", reason=MISSING)
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if None in found:
        pytest.skip(MISSING)
    return str(found[0]), str(found[1])


@contextlib.contextmanager
def chromium(width: int, height: int) -> Iterator[Any]:
    """Start a browser without a screen, whose pages have this size."""
    program, driver = programs()
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",  # containers' users may make no namespaces
        "--disable-dev-shm-usage",  # that is where the pool is
        "--disable-background-networking",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    try:
        browser.set_page_load_timeout(60)
        yield browser
    finally:
        browser.quit()


def fit(browser: Any, width: int, height: int) -> None:
    """Have the page itself, without the window's frame, be of this size."""
    outer = browser.get_window_size()
    has = browser.execute_script("return [innerWidth, innerHeight]")
    browser.set_window_size(outer["width"] + width - has[0], outer["height"] + height - has[1])
    deadline = time.monotonic() + 10
    while browser.execute_script("return [innerWidth, innerHeight]") != [width, height]:
        assert time.monotonic() < deadline, "the window did not take its size"
        time.sleep(0.05)


def complaints(browser: Any) -> list[str]:
    """Return what the page wrote to the console besides information."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def column(browser: Any, name: str, key: str, renderer: str = "renderers[0].data_source") -> Any:
    """Return a column of what a plot shows, by the name of the plot; None before it is there."""
    return browser.execute_script(
        f"""
        const doc = window.Bokeh && Bokeh.documents[0];
        const plot = doc && doc.get_model_by_name(arguments[0]);
        if (!plot) return null;
        const source = plot.source || plot.{renderer};
        const values = source.data[arguments[1]];
        return values === undefined ? null : Array.from(values);
        """,
        name,
        key,
    )


def members(browser: Any) -> list[list[str]]:
    """Return the rows of the table of members as they are drawn, without their colour."""
    found: list[list[str]] = browser.execute_script(
        """
        const rows = [];
        const walk = root => {
            for (const one of root.querySelectorAll("*")) {
                if (one.matches("table.shm tbody tr"))
                    rows.push(Array.from(one.cells).slice(1).map(cell => cell.textContent));
                if (one.shadowRoot) walk(one.shadowRoot);
            }
        };
        walk(document);
        return rows;
        """
    )
    return found


def title(browser: Any, name: str) -> str | None:
    """Return a plot's title."""
    found: str | None = browser.execute_script(
        """
        const doc = window.Bokeh && Bokeh.documents[0];
        const plot = doc && doc.get_model_by_name(arguments[0]);
        return plot ? plot.title.text : null;
        """,
        name,
    )
    return found


@contextlib.contextmanager
def proxy(port: int, path: str) -> Iterator[int]:
    """Serve ``http://127.0.0.1:port/`` under a path of another port, WebSockets too.

    As JupyterHub's and Jupyter's proxies do: the server sees requests without the path.
    """
    loop = asyncio.new_event_loop()
    started: Any = {}
    ready = threading.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        first, _, rest = head.decode().partition("\r\n")
        method, target, version = first.split(" ")
        if not urlsplit(target).path.startswith(path):
            writer.write(
                b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            writer.close()
            return
        lines = [f"{method} {target.removeprefix(path) or '/'} {version}"]
        upgrade = "upgrade: websocket" in rest.lower()
        for line in rest.strip().split("\r\n"):
            if upgrade or not line.lower().startswith("connection:"):
                lines.append(line)
        if not upgrade:  # one request for each connection
            lines.append("Connection: close")
        behind, ahead = await asyncio.open_connection("127.0.0.1", port)
        ahead.write("\r\n".join([*lines, "", ""]).encode())
        await asyncio.gather(pump(reader, ahead), pump(behind, writer))

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        started["port"] = server.sockets[0].getsockname()[1]
        started["stop"] = asyncio.Event()
        ready.set()
        async with server:
            await started["stop"].wait()
            server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield started["port"]
    finally:
        loop.call_soon_threadsafe(started["stop"].set)
        thread.join(10)
        loop.close()
