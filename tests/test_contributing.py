"""CONTRIBUTING's table holds: each row's one file and one line add a part that the package then uses.

The parts are a package of their own in a temporary folder, run in a process of its own: nothing is left
registered here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]

FILES = {
    "student.py": """
        import json
        from dataclasses import asdict, dataclass
        from pathlib import Path

        import torch
        from safetensors.torch import load_model, save_model

        from spatial_forcing.students.base import STUDENTS, StudentConfig, StudentSpec
        from tests.fakes import FakeStudent

        @dataclass(frozen=True)
        class AcmeConfig(StudentConfig):
            cameras: tuple[str, ...] = ("front", "wrist")
            image_size: int = 12
            depth: int = 4
            state_dim: int = 4
            action_dim: int = 3
            chunk: int = 2

        class AcmeStudent(FakeStudent):
            config_class = AcmeConfig

            def __init__(self, config):
                super().__init__(cameras=config.cameras)
                self.config = config

            @property
            def spec(self):
                return StudentSpec(self.names, 12, 4, 3, self.config.chunk)

            @classmethod
            def create(cls, config, stats, *, seed=0):
                assert stats["action"]["mean"].shape == (config.action_dim,)
                torch.manual_seed(seed)
                return cls(config)

            def save_pretrained(self, folder):
                super().save_pretrained(folder)
                settings = {"model_type": "acme", **asdict(self.config)}
                (Path(folder) / "config.json").write_text(json.dumps(settings))

            @classmethod
            def from_pretrained(cls, folder):
                student = cls(AcmeConfig())
                load_model(student, str(Path(folder) / "model.safetensors"))
                return student

        STUDENTS.add("acme", AcmeStudent)
        """,
    "teacher.py": """
        from tests.fakes import FakeTeacher

        def load_acme(source, card, *, resolution, dtype, device, heads, random_weights, **options):
            return FakeTeacher()
        """,
    "converter.py": """
        from dataclasses import dataclass
        from pathlib import Path

        import numpy as np

        from spatial_forcing.data.convert import Schema, SourceEpisode

        @dataclass(frozen=True)
        class AcmeConverter:
            output: Path
            video: bool = False

            def schema(self):
                sizes = {"front": (24, 24), "wrist": (24, 24)}
                return Schema(10, sizes, ["a", "b", "c", "d"], ["x", "y", "z"], "acme")

            def episodes(self):
                return [SourceEpisode(f"take {i}", 6, lambda i=i: self.frames(i)) for i in range(3)]

            def frames(self, seed):
                rng = np.random.default_rng(seed)
                for _ in range(6):
                    images = {c: rng.integers(0, 255, (24, 24, 3), np.uint8) for c in ("front", "wrist")}
                    numbers = {"state": rng.normal(size=4), "action": rng.normal(size=3)}
                    yield {"images": images, **numbers}, "touch the cube"
        """,
    "preset.py": """
        from acme.student import AcmeConfig
        from spatial_forcing.forcing import ForcingConfig
        from spatial_forcing.training.config import TrainConfig
        from spatial_forcing.training.presets import PRESETS

        @PRESETS.register("acme-touch")
        def acme_touch(dataset, output):
            return TrainConfig(dataset=dataset, output=output, student=AcmeConfig(), teacher="acme-teacher",
                               forcing=ForcingConfig(alpha=0.5, pairs=((2, -1),)), steps=2, batch_size=4)
        """,
    "__init__.py": """
        import acme.preset
        import acme.student
        from acme.teacher import load_acme
        from spatial_forcing.data.convert import CONVERTERS
        from spatial_forcing.envs.base import SUITES, Suite
        from spatial_forcing.teachers.cards import TEACHERS, TeacherCard

        TEACHERS.add("acme-teacher", TeacherCard("acme-teacher", load_acme, "Apache-2.0", "a test's"))
        CONVERTERS.add("acme", "acme.converter:AcmeConverter")
        SUITES.add("acme", Suite(("acme-touch",), "tests.experiments.room_env:RoomEnv", ("front", "wrist")))
        """,
    "use.py": """
        import sys
        from pathlib import Path

        import acme
        from spatial_forcing.data.convert import load_converter
        from spatial_forcing.data.convert.run import convert
        from spatial_forcing.envs import make_env
        from spatial_forcing.students import load_student
        from spatial_forcing.training import preset, train

        if __name__ == "__main__":
            here = Path(sys.argv[1])
            dataset = convert(load_converter("acme")(here / "data"), progress=False)
            config = preset("acme-touch", dataset=dataset, output=here / "run", overrides={"cpu": True})
            result = train(config)
            assert 0 < result.metrics["align_loss"] < 4, result.metrics
            student = load_student(here / "run" / "policy")
            env = make_env("acme-touch")
            observation, _ = env.reset(seed=0)
            actions = student.act([observation])
            assert actions.shape == (1, 2, 3), actions.shape
            _, _, _, _, info = env.step(actions[0, 0].numpy())
            print("steps", result.steps, "success", info["success"])
        """,
}


def test_a_package_adds_one_of_each(tmp_path):
    (tmp_path / "acme").mkdir()
    for name, text in FILES.items():
        (tmp_path / "acme" / name).write_text(dedent(text))
    done = subprocess.run(
        [sys.executable, "-m", "acme.use", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "steps 2 success False" in done.stdout


def test_the_table_names_files_that_exist():
    table = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| a")]
    assert len(table) == 6
    places = re.findall(r"`(\w+(?:/\w+)*(?:\.py|/))`", "\n".join(table))
    assert len(places) > len(table)
    for place in places:
        assert (ROOT / "spatial_forcing" / place).exists(), place
