"""Recordings in foreign layouts, small, with a different picture in every frame: for converters' tests.

`WRITERS[kind](folder, lengths)` writes one and returns what a faithful conversion holds of every episode:
{"states": (N, S), "actions": (N, A), "images": {camera: [(H, W, 3), ...]}}.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 16


def picture(episode, frame, camera):
    """Lossless in PNG; no two frames are alike."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    base = [x * 8 + 11 * frame, y * 8 + 37 * episode, (x + y) * 4 + 60 * camera]
    return (np.stack(base, -1) % 256).astype(np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def numbers(episode, length, width, kind):
    rng = np.random.default_rng([episode, kind])
    return rng.normal(size=(length, width)).astype(np.float32)


def stack(episode, length, camera):
    return np.stack([picture(episode, i, camera) for i in range(length)])


def write_aloha(folder, lengths):
    found = []
    for episode, length in enumerate(lengths):
        state, action = numbers(episode, length, 14, 0), numbers(episode, length, 14, 1)
        images = {name: stack(episode, length, i) for i, name in enumerate(("cam_high", "cam_low"))}
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            file["observations/qpos"], file["action"] = state, action
            for name, frames in images.items():
                file[f"observations/images/{name}"] = frames
            file.attrs["task"] = "lift"
        found.append({"states": state, "actions": action, "images": images})
    return found


def write_robotwin(folder, lengths):
    found = []
    (folder / "data").mkdir()
    (folder / "instructions").mkdir()
    cameras = ("head_camera", "left_camera", "right_camera")
    for episode, length in enumerate(lengths):
        joints = numbers(episode, length + 1, 14, 0)
        images = {name: stack(episode, length + 1, i) for i, name in enumerate(cameras)}
        with h5py.File(folder / "data" / f"episode{episode}.hdf5", "w") as file:
            file["joint_action/vector"] = joints
            for name, frames in images.items():
                encoded = [png(frame[..., ::-1]) for frame in frames]
                file[f"observation/{name}/rgb"] = np.array(encoded, f"S{max(map(len, encoded))}")
        told = json.dumps({"seen": ["lift"], "unseen": []})
        (folder / "instructions" / f"episode{episode}.json").write_text(told)
        shown = {name: frames[:-1] for name, frames in images.items()}
        found.append({"states": joints[:-1], "actions": joints[1:], "images": shown})
    return found


def write_libero(folder, lengths):
    found = []
    with h5py.File(folder / "put_it_there_demo.hdf5", "w") as file:
        for episode, length in enumerate(lengths):
            group = file.create_group(f"data/demo_{episode}")
            state, action = numbers(episode, length, 8, 0), numbers(episode, length, 7, 1)
            group["actions"] = action.astype(np.float64)
            group["states"] = numbers(episode, length, 20, 2).astype(np.float64)
            group["obs/ee_states"], group["obs/gripper_states"] = state[:, :6], state[:, 6:]
            images = {}
            for i, (name, key) in enumerate(
                (("agentview", "agentview_rgb"), ("robot0_eye_in_hand", "eye_in_hand_rgb"))
            ):
                frames = stack(episode, length, i)
                group[f"obs/{key}"] = frames
                images[name] = frames[:, ::-1, ::-1]  # upside down in the file, mirrored as OpenVLA has them
            found.append({"states": state, "actions": action, "images": images})
    return found


def write_rlds(folder, lengths):
    from tfrecord.example_pb2 import Example

    found = []
    with (folder / "libero-train.tfrecord-00000-of-00001").open("wb") as file:
        for episode, length in enumerate(lengths):
            example = Example()
            features = example.features.feature
            state, action = numbers(episode, length, 8, 0), numbers(episode, length, 7, 1)
            features["steps/action"].float_list.value.extend(action.ravel().tolist())
            features["steps/observation/state"].float_list.value.extend(state.ravel().tolist())
            images = {}
            for i, (name, key) in enumerate((("agentview", "image"), ("robot0_eye_in_hand", "wrist_image"))):
                images[name] = stack(episode, length, i)
                features[f"steps/observation/{key}"].bytes_list.value.extend(map(png, images[name]))
            features["steps/language_instruction"].bytes_list.value.extend([b"put it there"] * length)
            payload = example.SerializeToString()
            file.write(struct.pack("<Q", len(payload)) + bytes(4) + payload + bytes(4))
            found.append({"states": state, "actions": action, "images": images})
    return found


def write_robomimic(folder, lengths):
    found = []
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(
            {"env_name": "NutAssemblySquare", "env_kwargs": {"control_freq": 25}}
        )
        for episode, length in enumerate(lengths):
            group = data.create_group(f"demo_{episode}")
            state, action = numbers(episode, length, 9, 0), numbers(episode, length, 7, 1)
            group["actions"] = action.astype(np.float64)
            for key, part in (("pos", state[:, :3]), ("quat", state[:, 3:7])):
                group[f"obs/robot0_eef_{key}"] = part
            group["obs/robot0_gripper_qpos"] = state[:, 7:]
            images = {"agentview": stack(episode, length, 0), "wrist": stack(episode, length, 1)}
            for name, frames in images.items():
                group[f"obs/{name}_image"] = frames
            found.append({"states": state, "actions": action, "images": images})
    return found


def write_v2(folder, lengths, images=True, version="v2.1"):
    """A LeRobot v2 dataset whose images lie in the parquet files."""
    found, episodes = [], []
    (folder / "meta").mkdir()
    (folder / "data/chunk-000").mkdir(parents=True)
    features = {
        "observation.state": {"dtype": "float32", "shape": [4], "names": None},
        "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "note": {"dtype": "string", "shape": [1], "names": None},
    }
    for name in ("front", "wrist") if images else ():
        features[f"observation.images.{name}"] = {
            "dtype": "image", "shape": [3, SIDE, SIDE], "names": ["channels", "height", "width"],
        }  # fmt: skip
    start = 0
    for episode, length in enumerate(lengths):
        state, action = numbers(episode, length, 4, 0), numbers(episode, length, 2, 1)
        shown = {n: stack(episode, length, i) for i, n in enumerate(("front", "wrist"))} if images else {}
        columns = {
            "observation.state": state.tolist(),
            "action": action.tolist(),
            "next.done": [i == length - 1 for i in range(length)],
            "note": ["a"] * length,
            "timestamp": (np.arange(length) / 10).astype(np.float32).tolist(),
            "frame_index": list(range(length)),
            "episode_index": [episode] * length,
            "index": list(range(start, start + length)),
            "task_index": [episode % 2] * length,
        }
        for name, frames in shown.items():
            columns[f"observation.images.{name}"] = [{"bytes": png(f), "path": None} for f in frames]
        pq.write_table(pa.table(columns), folder / f"data/chunk-000/episode_{episode:06d}.parquet")
        episodes.append({"episode_index": episode, "tasks": [f"task {episode % 2}"], "length": length})
        found.append({"states": state, "actions": action, "images": shown})
        start += length
    info = {
        "codebase_version": version, "robot_type": "so100", "fps": 10, "chunks_size": 1000,
        "features": features,
        "total_episodes": len(lengths), "total_frames": start, "total_tasks": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))
    tasks = [{"task_index": i, "task": f"task {i}"} for i in range(2)]
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    return found


WRITERS = {
    "aloha": write_aloha,
    "robotwin": write_robotwin,
    "libero": write_libero,
    "rlds": write_rlds,
    "robomimic": write_robomimic,
    "lerobot-v2": write_v2,
}


def recording(kind, folder: Path, lengths=(5, 3, 4)):
    folder.mkdir(parents=True)
    return WRITERS[kind](folder, lengths)
