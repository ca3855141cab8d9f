"""A TCP proxy in front of a server that injects faults on demand; both listen on 127.0.0.1."""

from __future__ import annotations

import asyncio
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Coroutine
from typing import Any, Literal

CHUNK = 2**16  # bytes
Mode = Literal["pass", "refuse", "silent", "mute", "slow"]


class Proxy:
    """Forwards connections at `port` to a server's port, depending on the mode.

    - pass: forward everything
    - refuse: reject connections, and cut open ones
    - silent: accept connections, but forward nothing
    - mute: forward requests, drop the responses
    - slow: delay each chunk by `delay` seconds, both ways

    A connection that lost data is cut when the mode changes. `taken` counts the connections.
    """

    def __init__(self, server: int) -> None:
        self.server, self.port, self.taken = server, 0, 0
        self.mode: Mode = "refuse"
        self.delay = 0.0
        self._open: set[StreamWriter] = set()
        self._spoilt: set[StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.switch("pass")

    def switch(self, mode: Mode, delay: float = 0.0) -> None:
        """Switch the mode, for open connections too."""
        self._wait_for(self._switch(mode, delay))

    def close(self) -> None:
        """Cut all connections and stop listening."""
        self.switch("refuse")
        self._wait_for(self._rest())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10.0)

    async def _switch(self, mode: Mode, delay: float) -> None:
        self.mode, self.delay = mode, delay
        for writer in self._open if mode == "refuse" else self._spoilt:
            writer.transport.abort()
        self._spoilt.clear()
        if mode == "refuse" and self._listener is not None:
            self._listener.close()
            self._listener = None
        elif mode != "refuse" and self._listener is None:
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _rest(self) -> None:
        """Wait until every connection has noticed that it was cut."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    async def _serve(self, asks: StreamReader, answer: StreamWriter) -> None:
        self.taken += 1
        try:
            answers, ask = await asyncio.open_connection("127.0.0.1", self.server)
        except OSError:  # the server is away
            answer.transport.abort()
            return
        pair = {ask, answer}
        self._open |= pair
        ways = [
            asyncio.create_task(self._carry(asks, ask, pair, lost_when=("silent",))),
            asyncio.create_task(self._carry(answers, answer, pair, lost_when=("silent", "mute"))),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if pair & self._spoilt:  # nor does the end of one way get through
            await asyncio.wait(ways)
        for way in ways:
            way.cancel()
        for writer in pair:
            writer.close()
        self._open -= pair
        self._spoilt -= pair

    async def _carry(
        self,
        source: StreamReader,
        sink: StreamWriter,
        pair: set[StreamWriter],
        lost_when: tuple[Mode, ...],
    ) -> None:
        """Forward one direction of a connection until it ends."""
        try:
            while chunk := await source.read(CHUNK):
                if self.mode == "slow":
                    await asyncio.sleep(self.delay)
                if self.mode in lost_when:
                    self._spoilt |= pair
                else:
                    sink.write(chunk)
                    await sink.drain()
        except OSError:  # cut
            pass
