"""`spatial-forcing probe` on LeRobot policies: their tokens, from checkpoints that LeRobot wrote."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class
from lerobot.processor import (
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    ProcessorStepRegistry,
)
from lerobot.processor.converters import (
    batch_to_transition,
    policy_action_to_transition,
    transition_to_batch,
    transition_to_policy_action,
)
from lerobot_policy_spatial_forcing.probing import LeRobotStudent

from plugin.tests import builders
from plugin.tests.builders import FAMILIES, random_batch
from plugin.tests.stage import Stage
from spatial_forcing.analysis.features import Frames, randomised, student_features
from spatial_forcing.commands.probe import ProbeOptions, probe
from spatial_forcing.errors import CheckpointError, DataError
from spatial_forcing.evaluation import evaluate
from spatial_forcing.serving.policy import load_policy
from spatial_forcing.students import base, load_student
from tests.analysis.rooms import write_rooms

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
ENTRY = EntryPoint("type", "lerobot_policy_spatial_forcing.probing:load_policy", base.OTHERS)


@ProcessorStepRegistry.register(name="three_words_of_a_test")
@dataclass
class ThreeWords(ProcessorStep):
    """Stands for a tokenizer, which would have to be downloaded."""

    def __call__(self, transition):
        observation = dict(transition["observation"])
        B = len(observation["observation.state"])
        observation["observation.language.tokens"] = torch.tensor([[3, 4, 5]]).expand(B, 3)
        observation["observation.language.attention_mask"] = torch.ones(B, 3, dtype=torch.bool)
        return {**transition, "observation": observation}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def preprocessor(family):
    """What the family's own pipeline makes of a batch, without its tokenizer."""

    def run(batch):
        B = len(batch["observation.state"])
        made = {**random_batch(family.size, B), **batch}
        if family.name in ("xvla", "act"):
            for key in [key for key in batch if key.startswith("observation.images.")]:
                mean, std = (
                    torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
                )
                made[key] = (batch[key] - mean) / std
        return family.finish(made)

    return run


def frames(family, count=3, seed=0):
    generator = np.random.default_rng(seed)
    H, W = family.size
    return Frames(
        np.arange(count),
        ("front", "wrist"),
        {c: generator.integers(0, 256, (count, H, W, 3), dtype=np.uint8) for c in ("front", "wrist")},
        generator.normal(size=(count, 5)).astype(np.float32),
        ["touch the cube"] * count,
    )


def shown(student, seen):
    return replace(seen, cameras=student.aligned_cameras)


@families
def test_tokens_of_every_family_change_with_their_view_alone(family):
    few = {"max_decoding_steps": 4} if family.name == "pi0_fast" else {}  # by default 256
    student = LeRobotStudent(family.stock(**few), preprocessor(family), lambda actions: actions)
    seen = shown(student, frames(family))
    assert student.cameras == ("front", "wrist")
    assert student.aligned_cameras == ("front", "wrist")[: family.views]

    def tokens():
        with family.small(), mock.patch.object(student, "act", lambda o, g: acted(student, family, o)):
            return student_features(student, seen, [0, len(student.blocks)])

    before = tokens()
    h, w = before[0].shape[2:4]
    assert before[0].shape[:2] == (3, len(seen.cameras))
    assert h * w > 1
    seen.images["front"][1, : family.size[0] // 2] = 255
    after = tokens()
    moved = (after[0] != before[0]).any(-1)
    assert moved[1, 0].any()
    assert not moved[[0, 2]].any()
    assert not moved[1, 1:].any()


def acted(student, family, observations):
    """pi0-FAST decodes its actions with a tokenizer that is not here; the others just act."""
    if family.name != "pi0_fast":
        return LeRobotStudent.act(student, observations, torch.Generator().manual_seed(0))
    with mock.patch.object(type(student.policy), "detokenize_actions", return_value=torch.zeros(3, 6, 4)):
        return LeRobotStudent.act(student, observations)


def save(policy, folder):
    """As lerobot-train leaves it."""
    policy.save_pretrained(folder)
    PolicyProcessorPipeline(
        [ThreeWords(), DeviceProcessorStep(device="cpu")],
        name="policy_preprocessor",
        to_transition=batch_to_transition,
        to_output=transition_to_batch,
    ).save_pretrained(folder)
    PolicyProcessorPipeline(
        [],
        name="policy_postprocessor",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    ).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["pi0", "pi0_sf"])
def test_a_checkpoint_is_probed_by_the_command(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "entry_points", lambda group: [ENTRY] if group == base.OTHERS else [])
    family = FAMILIES["pi0"]
    monkeypatch.setattr(builders, "STATE", 4)
    size = builders.features((24, 24))  # as the rooms are
    made = family.stock(**size) if kind == "pi0" else family.forced({}, **size)
    save(made, tmp_path / "policy")
    data = write_rooms(tmp_path / "data", 4, 2)
    with family.small():
        student = load_student(tmp_path / "policy")
        assert isinstance(student, LeRobotStudent)
        assert type(student.policy) is get_policy_class(kind)
        options = ProbeOptions(
            policies=(tmp_path / "policy",),
            dataset=data.root,
            layers=(1, 2),
            teacher="none",
            output=tmp_path / "out",
        )
        probe(options)
    written = json.loads((tmp_path / "out/probe.json").read_text())
    found = written["metrics"]
    assert written["suggestions"][str(tmp_path / "policy")]["layer"] in (1, 2)
    names = {row["name"] for row in found if row["kind"] == "student"}
    assert names == {str(tmp_path / "policy")}
    assert {row["layer"] for row in found if row["kind"] == "student"} == {1, 2}
    assert any(row["name"].startswith("random weights") for row in found)


def test_acting_repeats_by_its_generator_and_saves_and_loads(tmp_path):
    family = FAMILIES["pi0"]
    save(family.stock(), tmp_path / "policy")
    with family.small():
        student = LeRobotStudent.from_pretrained(tmp_path / "policy")
        student.save_pretrained(tmp_path / "again")
        again = LeRobotStudent.from_pretrained(tmp_path / "again")
        seen = frames(family).observations(slice(0, 3))
        stream = torch.get_rng_state()
        first = student.act(seen, torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), stream)
        assert first.shape == (3, 6, 4)
        assert first.dtype == torch.float32
        assert torch.equal(again.act(seen, torch.Generator().manual_seed(1)), first)
        assert not torch.equal(again.act(seen, torch.Generator().manual_seed(2)), first)
        assert not torch.equal(randomised(student).act(seen, torch.Generator().manual_seed(1)), first)
        rows = student.act(seen, [torch.Generator().manual_seed(seed) for seed in (1, 2, 1)])
        for row, seed in enumerate((1, 2, 1)):
            alone = student.act([seen[row]], torch.Generator().manual_seed(seed))[0]
            assert torch.equal(rows[row], alone)
        with pytest.raises(DataError, match=r"\['left'\].*'front', 'wrist'"):
            student.act([{**seen[0], "images": {"left": seen[0]["images"]["front"]}}])


@pytest.mark.parametrize("name", ["pi0", "smolvla", "xvla"])
def test_a_lerobot_policy_is_served_and_evaluated(name, tmp_path, monkeypatch):
    """openpi's client and closed-loop evaluation, from a checkpoint that LeRobot wrote."""
    monkeypatch.setattr(base, "entry_points", lambda group: [ENTRY] if group == base.OTHERS else [])
    family = FAMILIES[name]
    save(family.stock(), tmp_path / "policy")
    with family.small():
        served = load_policy(tmp_path / "policy")
        about = served.signature.metadata()
        assert about["model_type"] == f"lerobot:{name}"
        assert (about["state_dim"], about["action_dim"]) == (5, 4)
        assert list(about["cameras"]) == ["front", "wrist"]
        served.warm_up()
        (seen,) = frames(family, 1).observations(slice(0, 1))
        message = {
            "observation/front": seen["images"]["front"], "observation/wrist": seen["images"]["wrist"],
            "observation/state": seen["state"], "prompt": seen["task"], "seed": 3,
        }  # fmt: skip
        answer = served.infer(message)["actions"]
        expected = served.student.act([seen], torch.Generator().manual_seed(3))[0].numpy()
        np.testing.assert_array_equal(answer, expected)
        assert answer.shape == (about["chunk"], 4)
        changed = {**message, "observation/wrist": 255 - seen["images"]["wrist"]}
        assert not np.array_equal(served.infer(changed)["actions"], answer)  # X-VLA's second view, too
        found = evaluate(
            served.student, ("any",), episodes=2, seed=100000, workers=1, execute=2, env_kwargs={},
            make=Stage, out=tmp_path / "episodes.jsonl", progress=False,
        )  # fmt: skip
    assert len(found.episodes) == 2
    assert not found.errors


def test_what_cannot_be_probed_is_refused(tmp_path, monkeypatch):
    family = FAMILIES["pi0"]
    family.stock().save_pretrained(tmp_path / "bare")
    with family.small(), pytest.raises(CheckpointError, match=r"no policy_preprocessor\.json"):
        LeRobotStudent.from_pretrained(tmp_path / "bare")
    (tmp_path / "bare/adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapters alone"):
        LeRobotStudent.from_pretrained(tmp_path / "bare")
    monkeypatch.setattr(base, "entry_points", lambda group: [])
    with pytest.raises(CheckpointError, match="'pi0'; install the plugin"):
        load_student(tmp_path / "bare")


def test_the_distribution_announces_the_loader():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][ENTRY.group] == {ENTRY.name: ENTRY.value}
