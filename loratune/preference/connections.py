"""Connections that wait too long, and too many of them: neither keeps a rater from the page.

uvicorn has a limit on idle connections between two requests (timeout_keep_alive) and on requests at a time (limit_concurrency, which
refuses everybody once it is reached), but none on how long a request may take to arrive, so a client that sends half a header holds
its connection for ever.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 20.0  # from the connection, or the reply before, until a request has arrived, was answered, and its answer taken
MOST = 128  # connections at a time; a browser opens up to six


class Patient(H11Protocol):
    """uvicorn's HTTP protocol, with an end to patience.

    A connection whose request is not done after SECONDS is closed, however busily it trickles. Beyond MOST, the one that has waited
    longest makes room for the newcomer: a rater's request takes milliseconds, so that is none of theirs.
    """

    since = 0.0  # by the loop's clock
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > MOST:
            oldest: Any = min(self.connections, key=lambda one: getattr(one, "since", 0.0))
            self.connections.discard(oldest)  # at once: others may come before the loop tells that it is lost
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self.since = self.loop.time()
        # abort, not close: what a client does not read would never be flushed
        self._deadline = self.loop.call_later(SECONDS, self.transport.abort)
