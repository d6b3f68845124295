"""A thin client: numpy, msgpack and a synchronous websocket; no torch, so it fits a robot's computer.

    with PolicyClient("127.0.0.1", 8000) as policy:
        answer = policy.infer({"observation/front": image, "observation/state": state, "prompt": task})
        answer["actions"]  # (chunk, action_dim)

Its `infer` takes and returns what openpi's `WebsocketClientPolicy` does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from spatial_forcing.errors import ConfigError, EnvironmentSetupError, SpatialForcingError
from spatial_forcing.serving.codec import pack, plain, unpack

log = logging.getLogger(__name__)
ATTEMPTS = 3
"""How often a request is sent when its connection is lost."""
RETRY_SECONDS = (0.05, 2.0)
"""First and longest wait between attempts to connect."""


class RequestRefused(SpatialForcingError):
    """The server answered that a request is wrong; the message names the field."""


class PolicyFailed(SpatialForcingError):
    """The policy raised on the server; its log has the reason."""


class PolicyClient:
    """A connection to a policy server that comes back by itself. A context manager; for one thread at a time.

    A request is a pure function of its content (and seed), so one whose answer was lost is sent again.

    Args:
        host: name or address, or a whole `ws://` / `wss://` URL.
        port: TCP port; None when the URL has it.
        api_key: sent as `Authorization: Api-Key KEY`.
        timeout: seconds that one answer may take.
        proxy: URL of a proxy to connect through, or True for the one that the environment names. A robot's
            server is in its own network, so variables such as `https_proxy` are not looked at by default.
        connect_timeout: seconds until an absent server is given up, at first and after a loss.
        clock, sleep: replaced in tests.

    Raises:
        EnvironmentSetupError: no server answers within `connect_timeout`.
        ConfigError: the server wants another API key, or is not a policy server.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        *,
        api_key: str | None = None,
        proxy: str | Literal[True] | None = None,
        timeout: float = 30.0,
        connect_timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        url = host if host.startswith(("ws://", "wss://")) else f"ws://{host}"
        self.url = url if port is None else f"{url}:{port}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._proxy = proxy
        self._timeout, self._connect_timeout = timeout, connect_timeout
        self._clock, self._sleep = clock, sleep
        self.reconnects = 0
        self._connection, self._metadata = self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, Any]:
        """Cameras, shapes, chunk, normalisation, licence, as the server stated them."""
        return self._metadata

    def get_server_metadata(self) -> dict[str, Any]:
        """`metadata`, under openpi's name."""
        return self._metadata

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer: `actions` (chunk, action_dim) and timings.

        Args:
            observation: images, state, prompt; optionally `seed` and `rtc` (see `serving.request`).

        Raises:
            RequestRefused: the request is wrong.
            PolicyFailed: the policy raised.
            EnvironmentSetupError: no answer within `timeout`, or the server is gone for good.
            DataError: the request holds something that cannot be sent.
        """
        message = pack(plain(observation))
        for _ in range(ATTEMPTS):
            try:
                return self._exchange(message)
            except TimeoutError as error:
                self._reconnect()  # a late answer must not be taken for the next one's
                raise EnvironmentSetupError(
                    f"{self.url} did not answer within {self._timeout:g} s; raise `timeout`, or look at "
                    "the server's /metrics."
                ) from error
            except (ConnectionClosed, OSError) as error:
                log.warning("lost %s (%s); connecting again", self.url, error)
                self.reconnects += 1
                self._reconnect()
        raise EnvironmentSetupError(
            f"{self.url} ended the connection {ATTEMPTS} times over this request; its log may say why "
            "(a request beyond its --max-message-mb, perhaps)."
        )

    def reset(self) -> None:
        """Nothing to do between episodes: the server keeps no state of a client."""

    def close(self) -> None:
        """Leave; harmless when repeated."""
        self._stack.close()

    def _reconnect(self) -> None:
        self._stack.close()
        self._connection, self._metadata = self._connect()

    def _exchange(self, message: bytes) -> dict[str, Any]:
        self._connection.send(message)
        reply = self._connection.recv(timeout=self._timeout)
        if isinstance(reply, bytes):
            answer: dict[str, Any] = unpack(reply)
            return answer
        if reply.startswith("Request refused"):
            raise RequestRefused(f"{self.url}: {reply}")
        raise PolicyFailed(f"{self.url}: {reply}")

    def _connect(self) -> tuple[ClientConnection, dict[str, Any]]:
        deadline = self._clock() + self._connect_timeout
        wait, longest = RETRY_SECONDS
        while True:
            try:
                return self._attempt(max(0.1, deadline - self._clock()))
            except (OSError, ConnectionClosed, InvalidHandshake) as error:
                if isinstance(error, InvalidStatus) and error.response.status_code in (401, 403):
                    raise ConfigError(
                        f"{self.url} refused the API key; give the one the server was started with."
                    ) from error
                if self._clock() + wait > deadline:
                    raise EnvironmentSetupError(
                        f"no policy server answers at {self.url} ({error}); start one with "
                        "`spatial-forcing serve CHECKPOINT`, or check host, port and firewall."
                    ) from error
                self._sleep(wait)
                wait = min(2 * wait, longest)

    def _attempt(self, seconds: float) -> tuple[ClientConnection, dict[str, Any]]:
        opening = connect(
            self.url,
            compression=None,
            max_size=None,
            additional_headers=self._headers,
            proxy=self._proxy,
            open_timeout=seconds,
            close_timeout=2,
        )
        with ExitStack() as stack:
            connection = stack.enter_context(opening)
            first = connection.recv(timeout=seconds)
            metadata = unpack(first) if isinstance(first, bytes) else None
            if not isinstance(metadata, dict):
                raise ConfigError(
                    f"{self.url} sent no metadata; it is not a policy server of openpi's protocol."
                )
            self._stack = stack.pop_all()
        return connection, metadata
