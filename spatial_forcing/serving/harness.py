"""A policy as a model server of vla-eval (PyPI `vla-eval`), so that its benchmarks can play it.

    spatial-forcing serve policy --protocol vla-eval --camera-map agentview image wrist wrist_image
    vla-eval run --config libero.yaml                       # in the benchmark's own environment

The harness sends one observation a step and gets one action; of a chunk, `execute` actions are carried out
before the policy is asked again. Observations of several simulators are batched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.model_servers.serve import serve_async
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec

from spatial_forcing.errors import ConfigError
from spatial_forcing.serving.codec import plain
from spatial_forcing.serving.policy import ServedPolicy

logger = logging.getLogger(__name__)

STATES = ("states", "state")
"""What benchmarks call the proprioceptive state."""


class PolicyServer(PredictModelServer):
    """vla-eval's model server around a served policy.

    The noise of step n is the same in every episode, so that a run can be repeated.

    Args:
        policy: with the cameras' other names as aliases.
        execute: actions of a chunk that are carried out; None: all.
        max_batch: most observations of different simulators in one policy call.

    Raises:
        ConfigError: more actions than a chunk has.
    """

    def __init__(self, policy: ServedPolicy, *, execute: int | None = None, max_batch: int = 16) -> None:
        chunk = policy.signature.chunk
        if execute is not None and not 1 <= execute <= chunk:
            raise ConfigError(
                f"execute is {execute}; the policy's chunks have {chunk} actions, so 1 to {chunk}."
            )
        super().__init__(chunk_size=execute or chunk, max_batch_size=max_batch)
        self.policy = policy

    def predict_batch(
        self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]
    ) -> list[dict[str, Any]]:
        """Chunks in environment units, one for each observation.

        Raises:
            DataError: an observation lacks a camera or the state; names what is there.
        """
        requests = [
            self.policy.signature.parse(as_request(obs, seed=context.step))
            for obs, context in zip(obs_batch, ctx_batch, strict=True)
        ]
        return [{"actions": actions} for actions in self.policy.act(requests)]

    def get_observation_params(self) -> dict[str, Any]:
        """What benchmarks are asked to send, where they know these names."""
        return {"send_state": True, "send_wrist_image": len(self.policy.signature.cameras) > 1}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Actions go through as the policy's training data had them."""
        return {"actions": RAW}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Images, state and language."""
        return {"image": IMAGE_RGB, "state": RAW, "language": LANGUAGE}


def as_request(observation: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """An observation of the harness by the names that `request.Signature` takes."""
    images = observation.get("images")
    state = next((observation[name] for name in STATES if name in observation), None)
    message: dict[str, Any] = {"images": dict(images) if isinstance(images, Mapping) else {}, "seed": seed}
    if state is not None:
        message["state"] = state
    if "task_description" in observation:
        message["prompt"] = observation["task_description"]
    request: dict[str, Any] = plain(message)
    return request


def serve(server: PolicyServer, host: str, port: int, ready: Callable[[int], None] | None = None) -> None:
    """Serve until interrupted; `ready` is called with the port (0 takes a free one)."""

    async def main() -> None:
        async with anyio.create_task_group() as group:
            bound = await group.start(serve_async, server, host, port)
            if ready is not None:
                ready(bound)

    anyio.run(main)
