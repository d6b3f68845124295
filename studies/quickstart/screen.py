"""Which tasks need sight? Cloning from the simulator's state, with and without the objects' positions.

    python studies/quickstart/screen.py run      # a few minutes; results in screen.jsonl beside this file
    python studies/quickstart/screen.py table

No image is rendered. A small network learns each task alone, from as many demonstrations as the quickstart
has: once from the hand and gripper only ("blind"), once with the positions of objects and goal ("state").
A task is worth showing to a policy with eyes when the second clearly beats the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from spatial_forcing.envs import EVALUATION_SEEDS
from spatial_forcing.envs.metaworld import STATE_DIM, MetaWorldEnv
from spatial_forcing.nano_teacher.tasks import RESERVED_TASKS

RESULTS = Path(__file__).with_name("screen.jsonl")
PRIVILEGED = [*range(18), 36, 37, 38]
"""Of the simulator's 39 numbers: hand, gripper, two objects with their rotations, goal."""
SETTLE, WIDTH = 5, 256

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Screen:
    """What is compared.

    Attributes:
        tasks: Meta-World tasks; default all that the teacher was not pretrained on.
        demos: expert demonstrations of each.
        steps: optimizer steps of batch 64.
        chunk: actions that are predicted, and executed, at a time.
        episodes: evaluation episodes of each task and input.
        horizon: steps after which an episode has failed.
    """

    tasks: tuple[str, ...] = RESERVED_TASKS
    demos: int = 15
    steps: int = 500
    chunk: int = 8
    episodes: int = 20
    horizon: int = 200


def run(options: tyro.conf.OmitArgPrefixes[Screen]) -> None:
    """Screen the tasks that are not in the results yet."""
    torch.set_num_threads(1)
    done = {row["task"] for row in read()}
    for task in track([task for task in options.tasks if task not in done], "screening"):
        env = MetaWorldEnv(task, image_size=16, horizon=options.horizon)
        demos = demonstrations(env, options)
        row: dict[str, Any] = {"task": task, "episodes": options.episodes}
        for name, columns in (("blind", list(range(STATE_DIM))), ("state", PRIVILEGED)):
            policy = clone(demos, columns, options)
            seeds = EVALUATION_SEEDS[: options.episodes]
            row[name] = sum(play(env, policy, seed, options.chunk) for seed in seeds)
        env.close()
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    table()


def demonstrations(env: MetaWorldEnv, options: Screen) -> list[tuple[Array, Array]]:
    """(states (T, 39), actions (T, 4)) of successful expert episodes, as `data record` makes them."""
    expert, found, seed = env.expert(), [], 0
    while len(found) < options.demos and seed < 10 * options.demos:
        env.reset(seed=seed)
        states, actions, left, solved, over = [], [], SETTLE, False, False
        while not over and left >= 0:
            states.append(env.privileged_state())
            actions.append(expert.action(env))
            _, _, _, over, info = env.step(actions[-1])
            solved = solved or info["success"]
            left -= solved
        if solved:
            found.append((np.array(states), np.array(actions, np.float64)))
        seed += 1
    return found


def clone(demos: list[tuple[Array, Array]], columns: list[int], options: Screen) -> Callable[[Array], Array]:
    """A policy from the state to a chunk of actions (chunk, 4), trained on the L1 error."""
    ahead = np.arange(options.chunk)
    states = np.concatenate([states[:, columns] for states, _ in demos])
    chunks = [a[np.minimum(np.arange(len(a))[:, None] + ahead, len(a) - 1)] for _, a in demos]
    mean, std = states.mean(0), states.std(0) + 1e-3
    inputs = torch.tensor((states - mean) / std, dtype=torch.float32)
    targets = torch.tensor(np.concatenate(chunks), dtype=torch.float32).flatten(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(len(columns), WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, targets.shape[1]),
    )
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps)
    for _ in range(options.steps):
        rows = torch.randint(len(inputs), (64,))
        loss = (net(inputs[rows]) - targets[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def policy(state: Array) -> Array:
        seen = torch.tensor((state[columns] - mean) / std, dtype=torch.float32)
        return net(seen).view(options.chunk, -1).numpy()

    return policy


def play(env: MetaWorldEnv, policy: Callable[[Array], Array], seed: int, chunk: int) -> bool:
    """Whether one episode succeeds."""
    env.reset(seed=seed)
    over = False
    while not over:
        for action in policy(env.privileged_state())[:chunk]:
            _, _, _, over, info = env.step(action.astype(np.float32))
            if info["success"]:
                return True
            if over:
                break
    return False


def read() -> list[dict[str, Any]]:
    """All rows of the results file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> None:
    """Print success in percent, largest gain from seeing first."""
    shown = Table("task", "blind", "with positions", title="Success, %, by what the policy knows")
    for row in sorted(read(), key=lambda row: row["blind"] - row["state"]):
        shown.add_row(row["task"], *(f"{100 * row[key] / row['episodes']:.0f}" for key in ("blind", "state")))
    Console().print(shown)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "table": table})
