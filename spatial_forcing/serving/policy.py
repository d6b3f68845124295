"""A checkpoint made ready to be served: the bare policy, what it expects, and batched answers.

Nothing here imports a teacher or a projector: the exported policy needs neither.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.protocols import Student
from spatial_forcing.serving.codec import plain
from spatial_forcing.serving.request import Request, Signature
from spatial_forcing.students import load_student
from spatial_forcing.students.base import CONFIG_FILE, POLICY, WEIGHTS_FILE, StudentModule, read_json
from spatial_forcing.students.card import SECTION, load_header
from spatial_forcing.students.normalize import Normalizer

WARM_UP_SIDE = 224
UNKNOWN = "not stated in the checkpoint's README.md"


class ServedPolicy:
    """A student in eval mode, with its `Signature`.

    Args:
        student: the policy.
        signature: what it expects.
    """

    def __init__(self, student: Student, signature: Signature) -> None:
        self.student, self.signature = student, signature
        if isinstance(student, nn.Module):
            student.eval()

    def act(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Action chunks, (chunk, action_dim) each, in the order of `requests`.

        Requests with and without `overlap` go through the policy apart: only the former need gradients.
        """
        answers: dict[int, NDArray[np.float32]] = {}
        for continuing in (False, True):
            rows = [i for i, request in enumerate(requests) if (request.overlap is not None) == continuing]
            if rows:
                chunks = self._act([requests[i] for i in rows], continuing)
                answers.update(zip(rows, chunks, strict=True))
        return [answers[i] for i in range(len(requests))]

    def infer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request in this process, as a client would get it from a server.

        Raises:
            DataError: names the field that is wrong.
        """
        (actions,) = self.act([self.signature.parse(plain(message))])
        return {"actions": actions}

    def warm_up(self) -> None:
        """Answer one blank request: the first call allocates, and a policy that cannot act shows it here.

        Raises:
            CheckpointError: the chunk has not the shape that the signature says.
        """
        signature = self.signature
        side = self.signature.image_shape or (WARM_UP_SIDE, WARM_UP_SIDE)
        blank = np.zeros((*side, 3), np.uint8)
        state = np.zeros(signature.state_dim, np.float32)
        images = dict.fromkeys(signature.cameras, blank)
        (chunk,) = self.act([Request({"images": images, "state": state, "task": "warm up"}, seed=0)])
        if chunk.shape != (signature.chunk, signature.action_dim):
            raise CheckpointError(
                f"the policy answers with shape {chunk.shape}, but its config.json says "
                f"{(signature.chunk, signature.action_dim)}; the checkpoint is inconsistent."
            )

    def _act(self, requests: Sequence[Request], continuing: bool) -> NDArray[np.float32]:
        seeds = [secrets.randbits(63) if r.seed is None else r.seed for r in requests]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        extra: dict[str, Any] = {"overlaps": [r.overlap for r in requests]} if continuing else {}
        with torch.inference_mode():
            chunks = self.student.act([r.observation for r in requests], generators, **extra)
        actions: NDArray[np.float32] = chunks.float().cpu().numpy()
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy returned an action that is not finite")
        return actions


def load_policy(
    folder: str | Path,
    *,
    statistics: str | None = None,
    image_shape: tuple[int, int] | None = None,
    default_prompt: str | None = None,
    aliases: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> ServedPolicy:
    """The policy saved in `folder` (an export, or a run whose `policy` folder is taken).

    Args:
        folder: holds `config.json` and `model.safetensors`.
        statistics: the dataset whose statistics are used, where the checkpoint holds those of several.
        image_shape: refuse images of another (height, width).
        default_prompt: instruction of requests that bring none.
        aliases: names under which clients send cameras -> the policy's camera.
        device: e.g. "cuda".

    Raises:
        CheckpointError: no policy there, weights that do not fit, or no normalisation statistics.
        ConfigError: an alias of an unknown camera, or an unknown device.
    """
    folder = policy_folder(Path(folder))
    student = load_student(folder, statistics=statistics)
    if not isinstance(student, StudentModule):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} describes a {type(student).__name__}, which declares no cameras "
            "and sizes (`StudentSpec`): requests could not be checked. Serve it with its own package."
        )
    check_statistics(student, folder)
    try:
        student.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used ({error}); try --device cpu.") from error
    signature = Signature(
        cameras=student.spec.cameras,
        state_dim=student.spec.state_dim,
        action_dim=student.spec.action_dim,
        chunk=student.spec.chunk,
        image_shape=image_shape,
        continues_chunks=student.spec.continues_chunks,
        default_prompt=default_prompt,
        aliases=dict(aliases or {}),
        about=describe(student, folder),
    )
    return ServedPolicy(student, signature)


def policy_folder(folder: Path) -> Path:
    """`folder`, or the `policy` folder of a run. Raises `CheckpointError` when neither holds a policy."""
    # A run has a config.json of its own, so its policy is looked for first.
    for candidate in (folder / POLICY, folder):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise CheckpointError(
        f"{folder} holds no policy ({folder / CONFIG_FILE} does not exist); give an exported policy or a run."
    )


def check_statistics(student: Student, folder: Path) -> None:
    """Refuse a policy whose normalisation was never fitted: it would move the robot in the wrong units.

    Raises:
        CheckpointError: every normaliser is the identity; the file is named.
    """
    if not isinstance(student, nn.Module):
        return
    found = {name: part for name, part in student.named_modules() if isinstance(part, Normalizer)}
    # One of them alone may be: actions in [-1, 1] are normalised by the identity.
    if found and all(bool((n.offset == 0).all() and (n.scale == 1).all()) for n in found.values()):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} lacks normalisation statistics ({', '.join(found)} are the identity); "
            "train the policy with its dataset's meta/stats.json, or export it again from its run."
        )


def describe(student: Student, folder: Path) -> dict[str, Any]:
    """Model type, base model, licence, teacher, normalisation and policy resolution, for the metadata.

    Raises:
        CheckpointError: the model card's header cannot be read.
    """
    config, card = read_json(folder), load_header(folder)
    # LeRobot's own files name a `type`.
    kind = config.get("model_type") or f"lerobot:{config.get('type')}"
    used = card.get(SECTION)
    used = used if isinstance(used, dict) else {}
    norms = {k: v for k, v in config.items() if k.endswith("_norm") and isinstance(v, str)}
    return {
        "model_type": kind,
        "base_model": str(card.get("base_model", UNKNOWN)),
        "licence": str(card.get("license", UNKNOWN)),
        "teacher": str(used.get("teacher", UNKNOWN) or "none"),
        "teacher_licence": str(used.get("teacher_licence", UNKNOWN)),
        "normalisation": norms,
        "policy_image_size": config.get("image_size"),
        "torch_threads": torch.get_num_threads(),
    }
