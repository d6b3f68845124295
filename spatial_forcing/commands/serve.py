"""`spatial-forcing serve`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from spatial_forcing.errors import ConfigError, EnvironmentSetupError

if TYPE_CHECKING:
    from spatial_forcing.serving.policy import ServedPolicy
    from spatial_forcing.serving.server import PolicyServer

API_KEY_VARIABLE = "SPATIAL_FORCING_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class ServeOptions:
    """The policy and the settings of the server.

    Attributes:
        checkpoint: an exported policy, or a run.
        protocol: "openpi", for robots and openpi's clients, or "vla-eval", so that the benchmarks of the
            package vla-eval play the policy (docs/vla_eval.md).
        execute: with vla-eval, actions of a chunk that are carried out before the policy is asked again;
            none: all.
        host: address to listen on; 0.0.0.0 lets other machines in (set an API key then).
        port: TCP port; 0 takes a free one.
        api_key_file: file with the key that clients must send; the variable SPATIAL_FORCING_API_KEY
            works as well. A key on the command line would show in the process list.
        camera_map: names under which clients send cameras, e.g. `image front wrist_image wrist`.
        statistics: the dataset whose statistics the policy uses, where its checkpoint holds those of several.
        prompt: instruction of requests that bring none.
        image_shape: refuse images of another height and width.
        device: where the policy runs, e.g. cuda.
        max_batch: most requests of different clients in one policy call.
        max_message_mb: larger requests close the connection.
        max_clients: connections at a time.
        drain_seconds: how long open requests may take after SIGTERM or Ctrl-C.
        debug: send tracebacks to clients; for development only.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    protocol: Literal["openpi", "vla-eval"] = "openpi"
    execute: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    camera_map: Mapping[str, str] = field(default_factory=dict)
    statistics: str | None = None
    prompt: str | None = None
    image_shape: tuple[int, int] | None = None
    device: str = "cpu"
    max_batch: int = 16
    max_message_mb: float = 32.0
    max_clients: int = 64
    drain_seconds: float = 10.0
    debug: bool = False


def serve(options: tyro.conf.OmitArgPrefixes[ServeOptions]) -> None:
    """Serve a policy to robots: openpi's websocket protocol, /healthz, /readyz, /metrics, /metadata."""
    try:
        from spatial_forcing.serving.policy import load_policy
        from spatial_forcing.serving.server import PolicyServer, ServerConfig
    except ModuleNotFoundError as error:
        raise EnvironmentSetupError(
            f"{error.name} is not installed; run `pip install 'spatial-forcing[serve]'`."
        ) from error
    if options.execute is not None and options.protocol != "vla-eval":
        raise ConfigError(
            "--execute is vla-eval's; with openpi's protocol the client decides how much of a chunk it "
            "carries out. Leave it out."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("websockets").setLevel(logging.WARNING)
    shared = ("host", "port", "max_batch", "max_message_mb", "max_clients", "drain_seconds", "debug")
    config = ServerConfig(
        **{name: getattr(options, name) for name in shared}, api_key=read_api_key(options.api_key_file)
    )
    policy = load_policy(
        options.checkpoint,
        statistics=options.statistics,
        image_shape=options.image_shape,
        default_prompt=options.prompt,
        aliases=options.camera_map,
        device=options.device,
    )
    policy.warm_up()
    if options.protocol == "vla-eval":
        _serve_harness(policy, options, config.api_key)
        return
    server = PolicyServer(policy, config)
    # The policy's thread and the network's share one interpreter: hand over ten times as often.
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(_until_told(server, options))


def _serve_harness(policy: ServedPolicy, options: ServeOptions, api_key: str | None) -> None:
    try:
        from spatial_forcing.serving.harness import PolicyServer, serve
    except ModuleNotFoundError as error:
        raise EnvironmentSetupError(
            f"{error.name} is not installed; run `pip install 'spatial-forcing[vla-eval]'`."
        ) from error
    if api_key is not None:
        raise ConfigError(
            f"vla-eval's protocol has no keys: unset {API_KEY_VARIABLE} and --api-key-file, and let only the "
            "benchmark's machine reach the port."
        )
    log = logging.getLogger(__name__)

    def ready(port: int) -> None:
        log.info("serving %s to vla-eval on ws://%s:%d", options.checkpoint, options.host, port)

    with suppress(KeyboardInterrupt):
        serve(
            PolicyServer(policy, execute=options.execute, max_batch=options.max_batch),
            options.host,
            options.port,
            ready,
        )


async def _until_told(server: PolicyServer, options: ServeOptions) -> None:
    log = logging.getLogger(__name__)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready() -> None:
        log.info("serving %s on ws://%s:%d", options.checkpoint, options.host, server.port)
        if options.host not in LOCAL and server.config.api_key is None:
            log.warning("anyone who reaches %s can move the robot: set %s", options.host, API_KEY_VARIABLE)

    await server.run(ready, stop)
    log.info("drained; every open request was answered or timed out")


def read_api_key(path: Path | None) -> str | None:
    """The key in `path`, else in the environment, else None.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if path is None:
        return os.environ.get(API_KEY_VARIABLE)
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read ({error}).") from error
    if not key:
        raise ConfigError(f"--api-key-file {path} is empty; write the key into it.")
    return key
