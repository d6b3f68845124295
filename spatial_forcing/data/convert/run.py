"""Runs a converter: episode after episode into a LeRobot v3.0 dataset, resumable, checked at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from spatial_forcing.data.check import check
from spatial_forcing.data.convert import Converter, EpisodeSkipped, Schema, SourceEpisode
from spatial_forcing.data.info import INFO_FILE, VIDEO_FILE, DatasetInfo
from spatial_forcing.data.writer import STAGING, DatasetWriter
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.progress import progress_bar
from spatial_forcing.storage import require_disk, write_json

logger = logging.getLogger(__name__)

LOG_FILE = "meta/conversion.json"
"""The converter's settings, the source of every episode in order, those left out with the reason, and arrays
that no feature takes."""
NOT_CONTENT = ("output", "progress", "workers")
"""Settings that do not decide what the dataset holds."""


def convert(converter: Converter, *, progress: bool = True) -> Path:
    """Write every episode of `converter`; returns the dataset's folder.

    Interrupted, it goes on after the last complete episode; a finished dataset of the same settings and
    episodes is returned as it is, and episodes that were added to the source are appended.

    Raises:
        ConfigError: the folder holds something else, or a dataset of other settings or other episodes.
        DataError: an episode of the source is damaged (its name is given; those before it are kept), or the
            finished dataset does not pass `check`.
        EnvironmentSetupError: too little disk.
    """
    root = Path(converter.output)
    schema = converter.schema()
    log = _read_log(root, converter)
    if schema.unused and schema.unused != log["unused"]:
        log["unused"] = dict(schema.unused)
        named = "; ".join(f"{name} ({how or 'no option takes it'})" for name, how in schema.unused.items())
        logger.warning("%s: arrays of the source that no feature takes: %s", root, named)
    episodes = [each for each in converter.episodes() if each.name not in log["skipped"]]
    begun = (root / INFO_FILE).is_file()
    _check_prefix(root, log["episodes"], episodes)
    if begun and DatasetInfo.load(root).total_episodes == len(episodes):
        return root
    writer = DatasetWriter.resume(root) if begun else _create(root, schema, converter.video)
    write_json(root / LOG_FILE, log)
    todo = episodes[writer.num_episodes :]
    require_disk(root, estimated_bytes(schema, todo, video=converter.video), "the conversion")
    with progress_bar(progress) as bar:
        line = bar.add_task("converting episodes", total=len(episodes), completed=writer.num_episodes)
        for episode in todo:
            try:
                _convert_one(writer, episode)
            except EpisodeSkipped as reason:
                log["skipped"][episode.name] = str(reason)
                episodes.remove(episode)
            log["episodes"] = [each.name for each in episodes[: writer.num_episodes]]
            write_json(root / LOG_FILE, log)
            note = f" ({len(log['skipped'])} left out)" if log["skipped"] else ""
            bar.update(line, advance=1, description=f"converting episodes{note}")
    if not episodes:
        raise DataError(f"no episode could be converted: {log['skipped']}.")
    writer.finalize()
    _write_splits(root, [episode.split for episode in episodes])
    if problems := [problem for problem in check(root, decode=False) if not problem.note]:
        raise DataError(f"{root} has {len(problems)} problems after conversion; the first: {problems[0]}")
    return root


def _write_splits(root: Path, names: Sequence[str]) -> None:
    """Name the parts of a dataset that has several, each of which is a range of episodes."""
    info = DatasetInfo.load(root)
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    if len(runs) < 2:
        return
    if len({name for name, _ in runs}) != len(runs):
        logger.warning("%s: its splits %s are not ranges of episodes and are not written.", root, runs)
        return
    stops = np.cumsum([count for _, count in runs]).tolist()
    splits = {name: f"{stop - count}:{stop}" for (name, count), stop in zip(runs, stops, strict=True)}
    dataclasses.replace(info, splits=splits).save(root)


def estimated_bytes(schema: Schema, episodes: Sequence[SourceEpisode], *, video: bool) -> int:
    """An upper estimate of the disk space needed while converting."""
    pixels = sum(height * width for height, width in schema.cameras.values())
    # Camera images as PNG take about 1.5 bytes a pixel, as mp4 0.1; twice, because finalising copies.
    a_pixel = (0.1 if video else 1.5) + (1.5 if schema.depth else 0)
    a_frame = pixels * a_pixel + 8 * (len(schema.state_names) + len(schema.action_names))
    return int(2 * a_frame * sum(episode.length for episode in episodes))


def _convert_one(writer: DatasetWriter, episode: SourceEpisode) -> None:
    try:
        if episode.encoded is not None:
            writer.write_episode(episode.encoded())
            return
        for frame, task in episode.frames():
            writer.add_frame(frame, task)
        writer.save_episode()
    except DataError as error:
        raise DataError(
            f"episode {episode.name}: {str(error).rstrip('.')}. Fix it or take it out of the source and "
            f"run the same command again; the {writer.num_episodes} episodes before it are kept."
        ) from error


def _create(root: Path, schema: Schema, video: bool) -> DatasetWriter:
    if schema.features is not None:
        features = dict(schema.features)
        videos = any(feature["dtype"] == "video" for feature in features.values())
        return DatasetWriter.start(
            root,
            DatasetInfo(
                fps=schema.fps,
                features=features,
                robot_type=schema.robot_type,
                video_path=VIDEO_FILE if videos else None,
            ),
        )
    return DatasetWriter.create(
        root,
        fps=schema.fps,
        cameras=schema.cameras,
        state_dim=len(schema.state_names),
        action_dim=len(schema.action_names),
        state_names=schema.state_names,
        action_names=schema.action_names,
        video=video,
        robot_type=schema.robot_type,
        depth=schema.depth,
        extrinsics=schema.extrinsics,
        intrinsics=schema.intrinsics,
    )


def _settings(converter: Converter) -> dict[str, Any]:
    settings = {k: v for k, v in dataclasses.asdict(converter).items() if k not in NOT_CONTENT}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _defaults(converter: Converter) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(converter):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def read_log(root: Path) -> dict[str, Any]:
    """What `meta/conversion.json` holds."""
    content = json.loads((root / LOG_FILE).read_text(encoding="utf-8"))
    return {"skipped": {}, "unused": {}, **content}


def _read_log(root: Path, converter: Converter) -> dict[str, Any]:
    settings = _settings(converter)
    path = root / LOG_FILE
    if path.is_file() and _empty_dataset(root):
        # A start that failed before its first episode leaves nothing that the corrected command could lose.
        shutil.rmtree(root / STAGING, ignore_errors=True)
        shutil.rmtree(root / "meta")
    if not path.is_file():
        if root.exists() and any(root.iterdir()) and not _empty_dataset(root):
            raise ConfigError(f"{root} is not empty and holds no conversion; choose another folder.")
        return {"settings": settings, "episodes": [], "skipped": {}, "unused": {}}
    log = read_log(root)
    # A setting that an older version did not have was its default.
    there = _defaults(converter) | log["settings"]
    different = [
        f"{key}: there {there.get(key)!r}, asked for {value!r}"
        for key, value in settings.items()
        if there.get(key) != value
    ]
    if different:
        raise ConfigError(
            f"{root} holds another conversion ({'; '.join(different)}). Choose another folder, or delete it."
        )
    return log


def _empty_dataset(root: Path) -> bool:
    """Interrupted before its first episode."""
    return (root / INFO_FILE).is_file() and not DatasetWriter.resume(root).num_episodes


def _check_prefix(root: Path, done: Sequence[str], episodes: Sequence[SourceEpisode]) -> None:
    for number, name in enumerate(done):
        there = episodes[number].name if number < len(episodes) else "none"
        if there != name:
            raise ConfigError(
                f"episode {number} of {root} was made from {name}, but the source's is now {there}. "
                "Episodes can only be added at the end; convert into another folder."
            )
