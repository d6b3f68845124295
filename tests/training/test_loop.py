"""The loop: what it learns, how it resumes, how it stops."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from spatial_forcing import storage
from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.training import DivergedError, OptimConfig, lr_factor, train
from spatial_forcing.training import checkpoint as files
from spatial_forcing.training.optim import parameter_groups
from tests.fakes import FakeStudent, fake_batch
from tests.training.fake_run import FakeBatches, NoisyStudent, curve, make_config, make_parts, run, weights


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_what_is_needed_to_repeat_it(tmp_path):
    result = run(tmp_path, trackers=("tensorboard",))
    assert result.steps == 6
    assert result.policy == tmp_path / "policy"
    assert result.seconds > 0
    assert result.peak_memory > 2**20
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["forcing"]["alpha"] == 0.5
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert [row["step"] for row in curve(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "action_loss", "cosine", "grad_norm", "lr"} <= set(result.metrics)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_policy_is_the_bare_student(tmp_path):
    run(tmp_path)
    assert weights(tmp_path / "policy").keys() == FakeStudent().state_dict().keys()


def test_losses_fall(tmp_path):
    batches = FakeBatches()
    batches.batch = lambda step: fake_batch(seed=0)
    run(tmp_path, batches=batches, steps=40, optim=OptimConfig(lr=1e-2))
    rows = curve(tmp_path)
    assert rows[-1]["action_loss"] < 0.8 * rows[0]["action_loss"]
    assert rows[-1]["cosine"] > rows[0]["cosine"] + 0.2


def test_alpha_zero_is_bit_identical_to_a_plain_torch_loop(tmp_path):
    settings = OptimConfig(lr=1e-2, warmup_steps=2, clip_norm=0.5)
    run(tmp_path, alpha=0.0, student=NoisyStudent, optim=settings)

    torch.manual_seed(0)
    student = NoisyStudent()
    groups = parameter_groups(student, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    torch.manual_seed(0)
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(settings, step, 6)
        loss, _ = student(fake_batch(seed=step))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [row["loss"] for row in curve(tmp_path)] == losses
    trained = weights(tmp_path / "policy")
    assert all(torch.equal(trained[key], value) for key, value in student.state_dict().items())


def test_alpha_zero_calls_no_teacher_and_saves_no_projector(tmp_path):
    parts = make_parts()
    train(make_config(tmp_path, alpha=0.0), parts=parts)
    assert parts.teacher.calls == 0
    assert not list(tmp_path.rglob("projector*"))


def test_arms_see_the_same_noise_and_batches(tmp_path):
    """With the alignment's weight too small to matter in float32, both arms are the same run."""
    asked = []
    for name, alpha in [("control", 0.0), ("forced", 1e-30)]:
        batches = FakeBatches()
        run(
            tmp_path / name,
            alpha=alpha,
            student=NoisyStudent,
            batches=batches,
            optim=OptimConfig(clip_norm=None),
        )
        asked.append(batches.asked)
    assert asked[0] == asked[1]
    assert_same_weights(tmp_path / "control/policy", tmp_path / "forced/policy")


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    """Also where the micro-batches differ in the number of samples that can be aligned."""

    def absent(step, batch):
        # The last sample of the four has no view; it falls into the second micro-batch.
        for camera in ("front", "wrist"):
            batch[f"observation.images.{camera}_is_pad"] = torch.arange(len(batch["index"])) == 3

    whole = FakeBatches(edit=absent)

    class Halves(FakeBatches):
        def batch(self, step):
            batch = whole.batch(step // 2)
            part = slice(2 * (step % 2), 2 * (step % 2) + 2)
            return {key: value[part] for key, value in batch.items()}

    run(tmp_path / "whole", batches=whole)
    run(tmp_path / "halves", batches=Halves(), gradient_accumulation=2)
    for one, two in zip(curve(tmp_path / "whole"), curve(tmp_path / "halves"), strict=True):
        for name in ("loss", "grad_norm", "cosine", "align_loss"):
            assert one[name] == pytest.approx(two[name], abs=1e-5)


class Killed(BaseException):
    """Stands for the process being killed: nothing in the package catches it."""


def kill_at(step):
    def edit(number, batch):
        if number == step:
            raise Killed

    return edit


@pytest.mark.parametrize("killed", [0, 1, 3, 5])
def test_a_killed_run_resumes_exactly(tmp_path, killed):
    settings = {"student": NoisyStudent, "log_every": 3}
    run(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", batches=FakeBatches(edit=kill_at(killed)), **settings)
    resumed = FakeBatches()
    run(tmp_path / "killed", batches=resumed, **settings)
    assert resumed.asked == list(range(killed // 2 * 2, 6))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    last = "checkpoints/step-000000006"
    assert_same_weights(tmp_path / "killed" / last / "policy", tmp_path / "whole" / last / "policy")
    a, b = (tmp_path / name / last for name in ("killed", "whole"))
    assert (a / "projector.safetensors").read_bytes() == (b / "projector.safetensors").read_bytes()
    mine, theirs = (files.load_tensors(folder / "optimizer.pt") for folder in (a, b))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, capsys):
    run(tmp_path / "whole", student=NoisyStudent)
    with pytest.raises(Killed):
        run(tmp_path / "killed", student=NoisyStudent, batches=FakeBatches(edit=kill_at(5)))
    torn = tmp_path / "killed/checkpoints/step-000000004/policy/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    resumed = FakeBatches()
    run(tmp_path / "killed", student=NoisyStudent, batches=resumed)
    assert resumed.asked[0] == 2
    assert "policy/model.safetensors has" in capsys.readouterr().out
    assert (tmp_path / "killed/checkpoints/damaged-step-000000004").exists()
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_a_kill_while_saving_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    def interrupted(root, step):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "commit", interrupted)
        with pytest.raises(Killed):
            run(tmp_path)
    assert files.latest_checkpoint(tmp_path / "checkpoints") == (None, [])
    run(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000004", "step-000000006"]


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, monkeypatch):
    def full(root, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "commit", full)
    with pytest.raises(EnvironmentSetupError, match=r"step 2 could not be written.*No space left.*resume"):
        run(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    batches = FakeBatches()
    with pytest.raises(EnvironmentSetupError, match="Free some space"):
        run(tmp_path, batches=batches)
    assert batches.asked == []


def test_ctrl_c_saves_at_any_step_and_says_how_to_resume(tmp_path, capsys):
    run(tmp_path / "whole", student=NoisyStudent)

    def press(step, batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "pressed", student=NoisyStudent, batches=FakeBatches(edit=press))
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted after step 3 of 6" in capsys.readouterr().err
    resumed = FakeBatches()
    run(tmp_path / "pressed", student=NoisyStudent, batches=resumed)
    assert resumed.asked == [3, 4, 5]
    assert curve(tmp_path / "pressed") == curve(tmp_path / "whole")


def test_a_finished_run_is_extended(tmp_path, capsys):
    """With a schedule that does not depend on the number of steps, it is the longer run bit for bit."""
    constant = {"student": NoisyStudent, "optim": OptimConfig(decay="constant")}
    run(tmp_path / "whole", **constant)
    assert run(tmp_path / "grown", steps=4, **constant).steps == 4
    with pytest.raises(ConfigError, match=r"steps: 4 there, 6 asked for.*--extend"):
        run(tmp_path / "grown", **constant)
    before = (tmp_path / "grown/result.json").read_bytes()
    resumed = FakeBatches()
    assert run(tmp_path / "grown", extend=True, batches=resumed, **constant).steps == 6
    assert before != (tmp_path / "grown/result.json").read_bytes()
    assert resumed.asked == [4, 5]
    assert "4 to 6 steps" in capsys.readouterr().err
    assert curve(tmp_path / "grown") == curve(tmp_path / "whole")
    assert_same_weights(tmp_path / "grown/policy", tmp_path / "whole/policy")
    assert run(tmp_path / "grown", extend=True, **constant).steps == 6
    with pytest.raises(ConfigError, match="steps: 6 there, 5 asked for"):
        run(tmp_path / "grown", steps=5, extend=True, **constant)


def test_a_run_whose_warm_up_was_shortened_is_extended_by_the_same_command(tmp_path):
    optim = OptimConfig(decay="constant", warmup_steps=100)
    run(tmp_path / "grown", steps=4, optim=optim)
    with pytest.raises(ConfigError, match="--extend"):
        run(tmp_path / "grown", steps=8, optim=optim)
    assert run(tmp_path / "grown", steps=8, optim=optim, extend=True).steps == 8
    rates = [row["lr"] for row in curve(tmp_path / "grown")]
    assert rates == pytest.approx([1e-3 / 2, *[1e-3] * 7])


def test_an_extended_schedule_is_that_of_the_new_number_of_steps(tmp_path):
    optim = OptimConfig(decay="linear")
    run(tmp_path / "whole", steps=8, optim=optim)
    run(tmp_path / "grown", steps=4, optim=optim)
    run(tmp_path / "grown", steps=8, optim=optim, extend=True)
    rates = [row["lr"] for row in curve(tmp_path / "grown")]
    assert rates[:4] == pytest.approx([1e-3 * (4 - i) / 4 for i in range(4)])
    assert rates[4:] == [row["lr"] for row in curve(tmp_path / "whole")][4:]


def test_another_configuration_is_refused_naming_the_fields(tmp_path):
    run(tmp_path)
    with pytest.raises(
        ConfigError, match=r"forcing.alpha: 0.5 there, 0.2 asked for; seed: 0 there, 1 asked for"
    ):
        run(tmp_path, alpha=0.2, seed=1)
    assert run(tmp_path, keep=5, log_every=2).steps == 6


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path):
    """Its config.json lacks a setting; what it did is the setting's default."""
    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path, batches=FakeBatches(edit=lambda step, batch: stop_at(step, 3)))
    for path in (tmp_path / "config.json", *tmp_path.glob("checkpoints/*/state.json")):
        held = json.loads(path.read_text())
        del held.get("config", held)["forcing"]["projectors"]
        path.write_text(json.dumps(held))
    for folder in tmp_path.glob("checkpoints/step-*"):
        (folder / files.MANIFEST).unlink()
        folder.rename(folder.with_name(f".{folder.name}.partial"))
        files.commit(folder.parent, int(folder.name.removeprefix("step-")))
    other = replace(make_config(tmp_path), forcing=ForcingConfig(projectors="independent"))
    with pytest.raises(ConfigError, match=r"projectors: 'shared' there, 'independent' asked for"):
        train(other, parts=make_parts())
    assert run(tmp_path).steps == 6


def stop_at(step, last):
    if step == last:
        raise RuntimeError("stop here")


def test_independent_projectors_resume_exactly(tmp_path):
    def go(folder, **edit):
        forcing = ForcingConfig(pairs=((1, 0), (3, -1)), projectors="independent")
        config = replace(make_config(tmp_path / folder), forcing=forcing)
        return train(config, parts=make_parts(NoisyStudent, FakeBatches(**edit)))

    go("whole")
    with pytest.raises(RuntimeError, match="stop here"):
        go("cut", edit=lambda step, batch: stop_at(step, 3))
    go("cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert_same_weights(tmp_path / "cut/policy", tmp_path / "whole/policy")


def test_a_finished_run_is_not_repeated(tmp_path):
    first = run(tmp_path)
    batches = FakeBatches()
    assert run(tmp_path, batches=batches) == first
    assert batches.asked == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_with_the_batch_named_and_keeps_the_checkpoint(tmp_path, value):
    def poison(step, batch):
        if step == 3:
            batch["action"][1, 0, 0] = value

    with pytest.raises(
        DivergedError, match=r"step 3: loss (nan|inf).*dataset indices \[300, 301, 302, 303\]"
    ):
        run(tmp_path, batches=FakeBatches(edit=poison))
    found, faults = files.latest_checkpoint(tmp_path / "checkpoints")
    assert found.step == 2
    assert faults == []
    assert all(torch.isfinite(value).all() for value in weights(found.policy).values())


def test_a_process_that_does_not_hash_still_sees_missing_and_short_files(tmp_path):
    run(tmp_path, steps=2)
    folder = tmp_path / "checkpoints/step-000000002"
    state = folder / "state.json"
    whole = state.read_bytes()
    state.write_bytes(bytes(len(whole)))
    assert "content" in files.damage(folder)
    assert files.damage(folder, contents=False) is None
    state.write_bytes(whole[:-1])
    assert f"{len(whole) - 1} bytes" in files.damage(folder, contents=False)
    state.unlink()
    assert "state.json is missing" in files.damage(folder, contents=False)


def test_clipping_includes_the_projector(tmp_path):
    """With a limit far below the gradient, Adam's first moments show the norm of what it was given."""
    run(tmp_path, steps=2, optim=OptimConfig(clip_norm=1e-3))
    states = files.load_tensors(tmp_path / "checkpoints/step-000000002/optimizer.pt")["optimizer"]["state"]
    assert len(states) > len(list(FakeStudent().parameters()))
    # exp_avg after two steps: 0.1 x (0.9 x g1 + g2), each of norm 1e-3 over student and projector together.
    total = torch.stack([s["exp_avg"].norm() for s in states.values()]).norm()
    assert total <= 0.19e-3 * (1 + 1e-4)


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000006"]


def test_callbacks_get_complete_checkpoints_and_do_not_disturb_training(tmp_path):
    seen = []

    def evaluate(saved):
        seen.append(saved.step)
        assert weights(saved.policy)
        torch.rand(7)

    run(tmp_path / "with", student=NoisyStudent, on_checkpoint=evaluate, callback_every=4)
    run(tmp_path / "without", student=NoisyStudent)
    assert seen == [4, 6]
    assert curve(tmp_path / "with") == curve(tmp_path / "without")


def test_a_callback_that_was_broken_off_is_called_again(tmp_path):
    calls = []

    def evaluate(saved):
        calls.append(saved.step)
        if calls == [2, 4]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_checkpoint=evaluate)
    run(tmp_path, on_checkpoint=evaluate)
    assert calls == [2, 4, 4, 6]


def test_bf16_trains(tmp_path):
    result = run(tmp_path, mixed_precision="bf16", steps=2)
    assert result.metrics["loss"] > 0
    assert all(value.dtype == torch.float32 for value in weights(result.policy).values())


def test_the_teacher_is_in_no_checkpoint(tmp_path):
    run(tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints/step-000000006").rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors",
        "projector.safetensors",
        "optimizer.pt",
        "rng-0.pt",
        "state.json",
        "manifest.json",
    }


def test_refuses_fsdp_and_says_what_works(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match=r"FSDP is not supported; start with .*torchrun. `shard`"):
        run(tmp_path / "run")
