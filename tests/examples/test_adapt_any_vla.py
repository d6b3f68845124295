"""Two models that the package does not know: the doctor's printed adapter is the example's, and it trains."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from spatial_forcing import cli, load_teacher
from spatial_forcing.doctor import examine

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "adapt_any_vla.py"
GUIDE = (ROOT / "docs" / "adapt.md").read_text().partition("## Qwen-VL")[0]
MODELS = ("mistral3", "git")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("adapt_any_vla", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reports(example):
    found = {}
    for name in MODELS:
        torch.manual_seed(0)
        found[name] = examine(example.FACTORIES[name](), target=f"examples/adapt_any_vla.py:{name}")
    return found


def region(name):
    found = re.search(rf"# \[{name}\]\n(.*?)\n\s*# \[end\]", FILE.read_text(), re.DOTALL)
    return textwrap.dedent(found[1])


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)\n```", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", MODELS)
def test_the_example_holds_what_the_doctor_prints(reports, name):
    assert reports[name].ok, reports[name].text()
    assert reports[name].verified
    printed = reports[name].adapter.partition("\n\n")[2]  # behind the imports
    assert ast.dump(ast.parse(printed)) == ast.dump(ast.parse(region(name)))  # ruff breaks long lines


@pytest.mark.parametrize("name", MODELS)
def test_the_printed_adapter_trains_and_exports(example, reports, name):
    torch.manual_seed(0)
    subject = example.FACTORIES[name]()
    namespace = {"model": subject.model, "teacher": load_teacher("vggt-nano")}
    exec(reports[name].adapter, namespace)
    forcing = namespace["forcing"]
    optimizer = torch.optim.AdamW(forcing.parameters(), lr=1e-3)
    seen = []
    for _ in range(8):
        loss, metrics = forcing(subject.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((float(metrics["action_loss"]), float(metrics["align_loss"])))
    assert seen[-1][0] < 0.8 * seen[0][0]
    assert seen[-1][1] < 0.8 * seen[0][1]
    below = forcing.student.blocks[0]
    assert any(p.grad is not None and p.grad.any() for p in below.parameters())
    assert forcing.export() is subject.model
    assert not any(m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_positions_are_those_of_the_stock_models(reports, name):
    """Mistral: BOS, rows of four with a break. GIT: a class token, then sixteen."""
    first, second = reports[name].facts["positions"]
    start, down, view = (1, 5, 20) if name == "mistral3" else (1, 4, 17)
    assert first == [[start + down * r + c for c in range(4)] for r in range(4)]
    assert second == [[p + view for p in row] for row in first]


@pytest.mark.parametrize("name", MODELS)
def test_training_runs_as_a_script(example, name, capsys):
    example.train(name, "vggt-nano", steps=3)
    cosines = [float(x) for x in re.findall(r"teacher (-?[\d.]+)", capsys.readouterr().out)]
    assert len(cosines) == 3
    assert cosines[-1] > cosines[0]


# ---- the guide


def test_the_guides_code_is_the_examples(example):
    shown = blocks("python")
    source = FILE.read_text()
    expected = [inspect.getsource(example.git).rstrip(), region("git"), region("mistral3"), region("loop")]
    assert shown == expected
    assert all(code.splitlines()[0] in source for code in shown)
    assert len((region("git") + "\n" + region("loop")).splitlines()) <= 30


def test_the_guides_output_is_the_doctors(reports):
    """Word for word; numbers of the losses may differ in the last digits between machines."""
    shown = "\n".join(blocks("text"))
    for check in reports["git"].checks:
        for line in [f"{check.name:<14} {check.state}", *check.lines]:
            wanted = re.escape(re.sub(r"\d+\.\d+", "NUMBER", line)).replace("NUMBER", r"[\d.]+")
            assert re.search(wanted, shown), line
    for line in reports["mistral3"].checks[2].lines:
        assert line in shown


@pytest.mark.parametrize("line", re.findall(r"^spatial-forcing ([^#\n]+)", GUIDE, re.MULTILINE))
def test_every_command_of_the_guide_parses(line):
    path, _, rest = cli.resolve(line.split())
    assert path == ["doctor"]
    assert rest


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", GUIDE))))
def test_every_link_leads_somewhere(target):
    assert (ROOT / "docs" / target).exists()
