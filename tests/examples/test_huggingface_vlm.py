"""The ten-line integration runs as it is printed in the README."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spatial_forcing.forcing import layout_from_input_ids
from spatial_forcing.forcing.layout import gather_tokens
from spatial_forcing.forcing.tap import Tap

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_vlm.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("huggingface_vlm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_integration_takes_at_most_ten_lines():
    regions = re.findall(r"# \[integration\]\n(.*?)\s*# \[end\]", EXAMPLE.read_text(), re.DOTALL)
    lines = [line for region in regions for line in region.splitlines() if line.strip()]
    assert "SpatialForcing(student" in "\n".join(lines)
    assert len(lines) <= 10


def test_runs_as_a_script_without_torchvision(tiny_teacher):
    code = (
        "import runpy, sys; "
        f"sys.argv = ['example', '--teacher', {str(tiny_teacher)!r}, '--steps', '3']; "
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__'); "
        "assert not {'torchvision', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLE.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cosine to the teacher") == 3
    assert "keys unchanged: True" in done.stdout


def test_training_aligns_and_exports_a_stock_model(example, tiny_teacher, capsys):
    torch.manual_seed(0)
    model = example.train(str(tiny_teacher), steps=12)
    cosines = [float(x) for x in re.findall(r"teacher (-?[\d.]+)", capsys.readouterr().out)]
    assert cosines[-1] > cosines[0]
    assert type(model) is type(example.small_model())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_layout_points_at_each_images_own_tokens(example):
    """Painting one patch changes most the embedding at the position that the layout names."""
    torch.manual_seed(0)
    model = example.small_model().eval()
    (batch,) = example.batches(1)
    layout = layout_from_input_ids(batch["input_ids"], example.IMAGE, example.GRID)
    tap = Tap(model.model.text_model.layers, [0], None)

    def tokens(pixels):
        with tap.armed() as states, torch.no_grad():
            model(**{**batch, "pixel_values": pixels})
        return gather_tokens(states[0][0], layout).view(*layout.index.shape, -1)

    side = example.SIZE // example.GRID[0]
    before = tokens(batch["pixel_values"])
    for view, row, column in [(0, 0, 0), (0, 1, 2), (1, 3, 0), (1, 2, 3)]:
        pixels = batch["pixel_values"].clone()
        pixels[:, view, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
        change = (tokens(pixels) - before).norm(dim=-1)[0]
        assert change.argmax() == (view * example.GRID[0] + row) * example.GRID[1] + column
