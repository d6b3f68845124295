"""Websocket policy server that speaks openpi's protocol, so that `openpi-client` works unchanged.

On connection the server sends its metadata, then answers each request (one binary msgpack frame) with
{"actions": (chunk, action_dim) float32, "policy_timing": ..., "server_timing": ...}. A wrong request is
answered by a text frame that names the field, and the connection stays; when the policy itself fails, a text
frame is followed by close code 1011, as openpi does.

Plain HTTP on the same port: /healthz (the process lives), /readyz (it takes requests), /metrics (Prometheus)
and /metadata (JSON). The last two ask for the API key, if there is one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from spatial_forcing.errors import ConfigError, EnvironmentSetupError, SpatialForcingError
from spatial_forcing.serving import codec
from spatial_forcing.serving.batching import Answer, Batcher
from spatial_forcing.serving.metrics import Counters
from spatial_forcing.serving.policy import ServedPolicy

log = logging.getLogger(__name__)
GOING_AWAY, INTERNAL_ERROR = 1001, 1011
MAX_REFUSAL = 2000
"""Characters of a refusal, which quotes names and values of the request."""
DRAINING = "The server is shutting down."
NEED_KEY = "Send the header `Authorization: Api-Key KEY` with the server's key.\n"


@dataclass(frozen=True)
class ServerConfig:
    """How a policy is served.

    Attributes:
        host: address to listen on; 0.0.0.0 for other machines (give an API key then).
        port: TCP port; 0 takes a free one.
        api_key: what clients must send as `Authorization: Api-Key KEY`; None lets anyone in.
        max_batch: most requests in one policy call; 1 gives answers that no neighbour can change by rounding.
        max_message_mb: larger requests close the connection (code 1009).
        max_clients: connections at a time; more get HTTP 503.
        drain_seconds: how long open requests may take after SIGTERM.
        debug: send tracebacks to clients; for development only, they show paths and code.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_batch: int = 16
    max_message_mb: float = 32.0
    max_clients: int = 64
    drain_seconds: float = 10.0
    debug: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}; expected 0 to 65535.")
        if self.max_batch < 1 or self.max_clients < 1 or self.max_message_mb <= 0 or self.drain_seconds < 0:
            raise ConfigError(
                "max_batch, max_clients and max_message_mb must be positive, drain_seconds >= 0."
            )
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty; give one, or none at all.")


@dataclass(eq=False)
class _Client:
    """One connection: what it waits for, and whether it has been told to go."""

    connection: ServerConnection
    pending: asyncio.Future[Answer] | None = None
    previous_ms: float | None = None


class _ClientGone(Exception):
    """The connection ended while its request was being answered."""


class PolicyServer:
    """Serves one policy until `stop`.

    Args:
        policy: what answers.
        config: where and how.
    """

    def __init__(self, policy: ServedPolicy, config: ServerConfig | None = None) -> None:
        self.policy, self.config = policy, config or ServerConfig()
        self.counters = Counters()
        self.port = self.config.port
        self._metadata = policy.signature.metadata()
        self._clients: set[_Client] = set()
        self._draining = False

    async def run(self, ready: Callable[[], None] | None = None, stop: asyncio.Event | None = None) -> None:
        """Listen until `stop` is set, then drain; `ready` is called once requests are taken.

        Raises:
            EnvironmentSetupError: the address cannot be listened on.
        """
        self._batcher = Batcher(self.policy.act, self.counters, self.config.max_batch)
        try:
            server = await self._listen()
            self.port = next(iter(server.sockets)).getsockname()[1]
            if ready:
                ready()
            try:
                await (stop or asyncio.Event()).wait()
            finally:
                await self._drain(server)
        finally:
            self._batcher.close(self.config.drain_seconds)

    async def _listen(self) -> Server:
        config = self.config
        try:
            return await serve(
                self._handle,
                config.host,
                config.port,
                process_request=self._route,
                compression=None,
                max_size=int(config.max_message_mb * 2**20),
                max_queue=2,  # a client that sends without reading waits, instead of filling memory
                close_timeout=2,
                server_header="spatial-forcing",
            )
        except OSError as error:
            raise EnvironmentSetupError(
                f"cannot listen on {config.host}:{config.port} ({error}); choose another --port or --host."
            ) from error

    async def _drain(self, server: Server) -> None:
        """Stop listening, answer what is open, say goodbye to everyone."""
        self._draining = True
        server.close(close_connections=False)
        await self._dismiss(client for client in self._clients if client.pending is None)
        try:
            await asyncio.wait_for(server.wait_closed(), self.config.drain_seconds)
        except TimeoutError:
            log.warning("%d requests were not answered in time", len(self._clients))
            await self._dismiss(self._clients)

    @staticmethod
    async def _dismiss(clients: Iterable[_Client]) -> None:
        """Close connections, all at once: a dead one takes its time."""
        await asyncio.gather(*(client.connection.close(GOING_AWAY, DRAINING) for client in clients))

    def _route(  # noqa: PLR0911  (one return a path)
        self, connection: ServerConnection, request: HttpRequest
    ) -> Response | None:
        """Answer plain HTTP; None goes on with the websocket handshake."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if request.path == "/readyz":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._draining else HTTPStatus.OK
            return connection.respond(status, "draining\n" if self._draining else "ready\n")
        if not self._authorised(request):
            return self._turn_away(connection, HTTPStatus.UNAUTHORIZED, NEED_KEY)
        if request.path == "/metrics":
            return connection.respond(HTTPStatus.OK, self.counters.page())
        if request.path == "/metadata":
            return connection.respond(HTTPStatus.OK, json.dumps(self._metadata, indent=1) + "\n")
        if len(self._clients) >= self.config.max_clients:
            text = (
                f"{len(self._clients)} clients are connected, the limit (--max-clients); try again later.\n"
            )
            return self._turn_away(connection, HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    def _turn_away(self, connection: ServerConnection, status: HTTPStatus, text: str) -> Response:
        self.counters.rejected()
        return connection.respond(status, text)

    def _authorised(self, request: HttpRequest) -> bool:
        if self.config.api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self.config.api_key}".encode()
        # Constant time: how long it takes must not tell how much of a guess is right.
        return len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "replace"), expected)

    async def _handle(self, connection: ServerConnection) -> None:
        client = _Client(connection)
        self._clients.add(client)
        self.counters.connected(+1)
        watch = asyncio.create_task(connection.wait_closed())
        watch.add_done_callback(lambda _: client.pending and client.pending.cancel())
        try:
            await connection.send(codec.pack(self._metadata))
            while not self._draining:
                await self._serve_one(client, await connection.recv())
            await connection.close(GOING_AWAY, DRAINING)
        except (ConnectionClosed, _ClientGone):
            pass
        finally:
            watch.cancel()
            self._clients.discard(client)
            self.counters.connected(-1)

    async def _serve_one(self, client: _Client, message: str | bytes) -> None:
        """Answer one message; raises `ConnectionClosed` or `_ClientGone` when the client has left."""
        started = time.perf_counter()
        reply: str | bytes
        try:
            reply, outcome = await self._answer(client, message, started), "answered"
        except SpatialForcingError as error:
            reply, outcome = f"Request refused: {error}"[:MAX_REFUSAL], "refused"
        except asyncio.CancelledError:
            if client.connection.close_code is None:
                raise  # the server is being torn down
            raise _ClientGone from None
        except Exception:
            reply, outcome = self._failure(), "failed"
        await client.connection.send(reply)
        seconds = time.perf_counter() - started
        client.previous_ms = seconds * 1000
        self.counters.request(outcome, seconds, len(message))
        if outcome == "failed":
            reason = "Traceback included in previous frame." if self.config.debug else "See the server's log."
            await client.connection.close(INTERNAL_ERROR, f"Internal server error. {reason}")

    async def _answer(self, client: _Client, message: str | bytes, started: float) -> bytes:
        if isinstance(message, str):
            raise ConfigError("the request is a text frame; send one binary msgpack frame.")
        request = self.policy.signature.parse(codec.unpack(message))
        answer = self._batcher.at_once(request) if len(self._clients) == 1 else None
        if answer is None:
            client.pending = self._batcher.submit(request, client=id(client))
            try:
                answer = await client.pending
            finally:
                client.pending = None
        timing = {"infer_ms": (time.perf_counter() - started) * 1000, "queue_ms": answer.queue_ms}
        if client.previous_ms is not None:
            timing["prev_total_ms"] = client.previous_ms
        return codec.pack(
            {
                "actions": answer.actions,
                "policy_timing": {"infer_ms": answer.infer_ms},
                "server_timing": timing,
            }
        )

    def _failure(self) -> str:
        """Called while the policy's exception is handled."""
        if self.config.debug:
            log.exception("the policy failed")
            return traceback.format_exc()
        reference = secrets.token_hex(4)
        log.exception("the policy failed (reference %s)", reference)
        return f"The policy failed; the server's log says why under reference {reference}."
