"""Records demonstrations of scripted experts, in parallel worker processes, into a LeRobot v3.0 dataset.

Every episode has its own seed and workers hand finished episodes back in order, so the dataset does not
depend on the number of workers. Only successful demonstrations are kept. Interrupted, it resumes.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatial_forcing.data.episode import EncodedEpisode, EpisodeEncoder
from spatial_forcing.data.info import INFO_FILE, DatasetInfo
from spatial_forcing.data.writer import DatasetWriter
from spatial_forcing.envs.base import DEMONSTRATION_SEEDS, expand_tasks, make_env, suite_of
from spatial_forcing.errors import ConfigError, DataError, EnvironmentSetupError
from spatial_forcing.progress import progress_bar
from spatial_forcing.protocols import DeferredEnv, ExpertEnv
from spatial_forcing.storage import require_disk, write_json

RECORDING_FILE = "meta/recording.json"
"""What was asked for, the seed of every episode and the number of failed attempts by task."""
MAX_ATTEMPTS = 10
SEED_STRIDE = len(DEMONSTRATION_SEEDS) // MAX_ATTEMPTS
"""Attempt a of episode m has the seed `first_seed + m + a * SEED_STRIDE`."""
NOISE_STREAM, CORRELATION = 170309327, 0.8
"""Of the disturbances: their random stream, apart from the simulator's, and from one step to the next."""
EXPECTED_STEPS = 150
"""Frames of an episode that the disk estimate assumes; experts need 45 to 145."""


@dataclass(frozen=True)
class RecordConfig:
    """What to record.

    Attributes:
        root: folder of the dataset.
        tasks: names such as "reach-v3"; a suite's name (libero_spatial) stands for all of its tasks that
            the scripted expert solves; a warning names the others.
        env: a suite whose tasks are recorded where `tasks` is empty.
        episodes_per_task: successful demonstrations of each.
        cameras: the simulator's camera names, in the order of the views; None: the suite's.
        image_size: pixels on a side.
        first_seed: of episode 0 of each task; seeds stay within `envs.base.DEMONSTRATION_SEEDS`.
        depth: also store depth maps, intrinsics and extrinsics.
        video: store colour as mp4 instead of lossless PNG.
        settle_steps: frames recorded after the first success.
        horizon: steps after which an attempt has failed; None: the suite's.
        noise: largest standard deviation of a disturbance, in units of the action, that pushes the robot
            while the expert's own action is stored: the demonstrations show how to recover (DART, Laskey
            et al., arXiv 1703.09327). Each episode draws its share of it; 0 is the undisturbed expert.
        workers: processes; default one a core.
        progress: show a progress bar on stderr.
    """

    root: Path
    tasks: tuple[str, ...] = ()
    env: str | None = None
    episodes_per_task: int = 20
    cameras: tuple[str, ...] | None = None
    image_size: int = 128
    first_seed: int = 0
    depth: bool = False
    video: bool = False
    settle_steps: int = 5
    horizon: int | None = None
    noise: float = 0.0
    workers: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        wanted = self.tasks or ((self.env,) if self.env else ())
        object.__setattr__(self, "tasks", _solvable(wanted))
        suites = [suite_of(task) for task in self.tasks]
        if suites and self.cameras is None:
            object.__setattr__(self, "cameras", suites[0].cameras)
        if suites and self.horizon is None:
            object.__setattr__(self, "horizon", max(suite.horizon for suite in suites))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"record.tasks is {self.tasks}; give at least one task, each once.")
        last = SEED_STRIDE - self.first_seed
        if self.first_seed < 0 or not 1 <= self.episodes_per_task <= last:
            raise ConfigError(
                f"record.first_seed {self.first_seed} and episodes_per_task {self.episodes_per_task}: "
                f"expected 0 or more, at least 1, and at most {SEED_STRIDE} together."
            )
        if self.image_size < 1 or (self.horizon or 0) < 1 or self.settle_steps < 0:
            raise ConfigError("record.image_size and horizon must be at least 1, settle_steps at least 0.")
        if not 0 <= self.noise <= 1:
            raise ConfigError(f"record.noise is {self.noise}; expected 0 to 1, in units of the action.")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"record.workers is {self.workers}; expected at least 1.")

    @property
    def views(self) -> tuple[str, ...]:
        """`cameras`, with the suite's default filled in."""
        return self.cameras or ()

    @property
    def content(self) -> dict[str, Any]:
        """The settings that decide what the dataset holds."""
        settings = asdict(self)
        for name in ("root", "workers", "progress", "env"):
            settings.pop(name)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}

    @property
    def estimated_bytes(self) -> int:
        """An upper estimate of the disk space needed while recording."""
        pixels = self.image_size**2 * len(self.views) * (5 if self.depth else 3)
        # Lossless PNG of rendered frames takes about half; twice, because finalising copies.
        return len(self.tasks) * self.episodes_per_task * EXPECTED_STEPS * pixels


def _solvable(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that `names` mean, less those of a whole suite that its expert does not solve.

    Raises:
        ConfigError: such a task is named itself.
    """
    tasks = expand_tasks(names)
    unsolved = [task for task in tasks if task in suite_of(task).unsolved]
    if named := [task for task in unsolved if task in names]:
        raise ConfigError(f"record.tasks: the scripted expert does not solve {named}; leave them out.")
    if unsolved:
        warnings.warn(f"not recorded, as the expert does not solve them: {unsolved}", stacklevel=4)
    return tuple(task for task in tasks if task not in unsolved)


def record(config: RecordConfig) -> Path:
    """Record until every task has its demonstrations; returns the dataset's folder.

    A finished dataset of the same settings is returned as it is, an unfinished one is continued.

    Raises:
        ConfigError: the folder holds a dataset of other settings; both values are named.
        DataError: an expert fails `MAX_ATTEMPTS` times for one episode.
        EnvironmentSetupError: no simulator or GL library, too little disk, or a worker died.
    """
    root = Path(config.root)
    jobs = [(task, slot) for task in config.tasks for slot in range(config.episodes_per_task)]
    _check_same_recording(root, config)
    finished = DatasetInfo.load(root).total_episodes if (root / INFO_FILE).is_file() else 0
    if finished >= len(jobs):
        return root
    require_disk(root, config.estimated_bytes, "the recording")
    writer = DatasetWriter.resume(root) if (root / INFO_FILE).is_file() else _create(config)
    log = _read_log(root, config)
    todo = jobs[writer.num_episodes :]
    with progress_bar(config.progress) as bar:
        shown = bar.add_task("recording episodes", total=len(jobs), completed=writer.num_episodes)
        for (task, _), (episode, seed, failures) in zip(
            todo, _demonstrations(config, writer.info, todo), strict=True
        ):
            log["seeds"][str(writer.num_episodes)] = seed
            log["failures"][task] = log["failures"].get(task, 0) + failures
            write_json(root / RECORDING_FILE, log)
            writer.write_episode(episode)
            failed = sum(log["failures"].values())
            bar.update(shown, advance=1, description=f"recording episodes ({failed} failed attempts)")
    writer.finalize()
    return root


Demonstration = tuple[EncodedEpisode, int, int]
"""An episode, its seed, and the number of failed attempts before it."""


def demonstrate(config: RecordConfig, info: DatasetInfo, env: Any, slot: int) -> Demonstration:
    """One successful demonstration in `env`.

    Raises:
        DataError: no attempt succeeded.
    """
    for attempt in range(MAX_ATTEMPTS):
        seed = config.first_seed + slot + attempt * SEED_STRIDE
        encoder = EpisodeEncoder(info)
        if _attempt(config, env, encoder, seed):
            return encoder.finish(), seed, attempt
    raise DataError(
        f"the expert of {env.task} failed {MAX_ATTEMPTS} times in a row for episode {slot} "
        f"(horizon {config.horizon}). Raise the horizon or leave the task out."
    )


def _attempt(config: RecordConfig, env: Any, encoder: EpisodeEncoder, seed: int) -> bool:
    """Play the expert until `settle_steps` frames after the first success; False when it fails.

    Images take most of an episode's time: where they can be drawn later, a failed attempt has none.
    """
    observation, _ = env.reset(seed=seed)
    expert = env.expert()
    solved, left = False, config.settle_steps
    pushes = disturbances(config.noise, int(env.action_space.shape[0]), seed)
    undrawn: list[tuple[Any, dict[str, Any], str]] = []
    for _ in range(env.horizon):
        frame: dict[str, Any] = {"state": observation["state"]}
        if config.depth:
            frame["extrinsics"] = {c: env.camera_parameters(c)[1] for c in config.views}
        action = np.clip(expert.action(env), -1, 1)
        frame["action"] = action
        if isinstance(env, DeferredEnv):
            undrawn.append((env.moment(), frame, observation["task"]))
        else:
            frame["images"] = dict(observation["images"])
            if config.depth:
                frame["depth"] = {camera: env.depth(camera) for camera in config.views}
            encoder.add(frame, observation["task"])
        pushed = np.clip(action + next(pushes), -1, 1).astype(np.float32)
        observation, _, terminated, truncated, info = env.step(pushed)
        solved = solved or bool(info["success"])
        left -= solved
        if left < 0 or terminated or truncated:
            break
    if solved:
        for moment, frame, task in undrawn:
            drawn = env.draw(moment)
            frame["images"] = {camera: drawn[camera][0] for camera in config.views}
            if config.depth:
                frame["depth"] = {camera: drawn[camera][1] for camera in config.views}
            encoder.add(frame, task)
    return solved


def disturbances(noise: float, action_dim: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Endless disturbances (action_dim,) of one episode: zero-mean, correlated over about five steps.

    White noise would average out within an action chunk. The last number, the gripper's, is left alone: a
    dropped object ends the demonstration instead of showing a recovery.
    """
    rng = np.random.default_rng((NOISE_STREAM, seed))
    scale = noise * rng.random()
    push = rng.standard_normal(action_dim)
    free = np.ones(action_dim)
    free[-1] = 0
    while True:
        yield scale * push * free
        push = CORRELATION * push + math.sqrt(1 - CORRELATION**2) * rng.standard_normal(action_dim)


def _create(config: RecordConfig) -> DatasetWriter:
    env = _make_env(config, config.tasks[0])
    try:
        observation, _ = env.reset(seed=config.first_seed)
        side = config.image_size
        intrinsics = {c: env.camera_parameters(c)[0] for c in config.views} if config.depth else None
        return DatasetWriter.create(
            config.root,
            fps=int(env.metadata["render_fps"]),
            cameras=dict.fromkeys(config.views, (side, side)),
            state_dim=len(observation["state"]),
            action_dim=int(env.action_space.shape[0]),
            video=config.video,
            depth=config.depth,
            extrinsics=config.depth,
            intrinsics=intrinsics,
            robot_type=type(env).__name__,
        )
    finally:
        env.close()


def _make_env(config: RecordConfig, task: str) -> Any:
    env = make_env(task, cameras=config.views, image_size=config.image_size, horizon=config.horizon)
    if not isinstance(env, ExpertEnv):
        raise ConfigError(f"{task} has no scripted expert; record Meta-World tasks, or write the dataset.")
    return env


def _read_log(root: Path, config: RecordConfig) -> dict[str, Any]:
    path = root / RECORDING_FILE
    if path.is_file():
        log: dict[str, Any] = json.loads(path.read_text())
        return log
    log = {"config": config.content, "seeds": {}, "failures": {}}
    write_json(path, log)
    return log


def _check_same_recording(root: Path, config: RecordConfig) -> None:
    if not root.exists() or not any(root.iterdir()):
        return
    there = _read_log(root, config)["config"] if (root / RECORDING_FILE).is_file() else {}
    if not there and (root / INFO_FILE).is_file() and not DatasetInfo.load(root).total_episodes:
        return  # interrupted before the first episode
    if not there:
        raise ConfigError(f"{root} is not empty and holds no recording; choose another folder.")
    different = {k: (there.get(k), v) for k, v in config.content.items() if there.get(k) != v}
    if different:
        listed = "; ".join(
            f"{key}: there {old!r}, asked for {new!r}" for key, (old, new) in different.items()
        )
        raise ConfigError(
            f"{root} holds another recording ({listed}). Choose another folder, or delete that one."
        )


def _demonstrations(
    config: RecordConfig, info: DatasetInfo, jobs: list[tuple[str, int]]
) -> Iterator[Demonstration]:
    """Demonstrations in the order of `jobs`; a bounded number is made ahead."""
    workers = min(config.workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:  # none where a recording ended after its last episode and before it was packed
        with _cached_env():
            for task, slot in jobs:
                yield _work(config, info, task, slot)
        return
    context = multiprocessing.get_context("spawn")  # a forked GL context does not work
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting: deque[Future[Demonstration]] = deque()
    queue = iter(jobs)
    try:
        while True:
            while len(waiting) < 2 * workers and (job := next(queue, None)) is not None:
                waiting.append(pool.submit(_work, config, info, *job))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise EnvironmentSetupError(
            "a recording worker died (out of memory, or killed). Run the same command again, it resumes; "
            "lower record.workers if it happens again."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_env: dict[str, Any] = {}  # this process's environment, by task: at most one


def _work(config: RecordConfig, info: DatasetInfo, task: str, slot: int) -> Demonstration:
    if task not in _env:
        _close_env()
        _env[task] = _make_env(config, task)
    return demonstrate(config, info, _env[task], slot)


def _close_env() -> None:
    while _env:
        _env.popitem()[1].close()


@contextmanager
def _cached_env() -> Iterator[None]:
    try:
        yield
    finally:
        _close_env()
