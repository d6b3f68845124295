"""Start, save, resume, adapt, export: what is on disk, and that it acts the same without the plugin."""

from __future__ import annotations

import json
import subprocess
import sys

import draccus
import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot_policy_spatial_forcing.families import FAMILIES as TABLE
from lerobot_policy_spatial_forcing.settings import ForcingSettings
from safetensors.torch import load_file

from plugin.tests.builders import FAMILIES, parameters_of
from spatial_forcing.commands.lerobot import FAMILIES as COMMAND_FAMILIES
from spatial_forcing.commands.lerobot import NOT_ALIGNED, ExportOptions, InitOptions, export, init
from spatial_forcing.errors import CheckpointError, ConfigError

PI0 = FAMILIES["pi0"]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def test_the_command_knows_the_same_families():
    assert set(COMMAND_FAMILIES) == set(TABLE) == set(FAMILIES)


def test_every_policy_of_lerobot_is_listed():
    policies = {name for name in PreTrainedConfig.get_known_choices() if not name.endswith("_sf")}
    assert policies == set(COMMAND_FAMILIES) | set(NOT_ALIGNED)


def step(policy, family, seed=0):
    policy.train()
    parameters = parameters_of(policy)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    torch.manual_seed(seed)
    loss, _ = policy(family.batch(seed=seed))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    policy.update()


def outputs(policy, family):
    """Actions where they can be decoded; pi0-FAST's tokens otherwise."""
    torch.manual_seed(11)
    batch = family.batch()
    policy.eval()
    if family.name == "pi0_fast":
        images, masks = policy._preprocess_images(batch)
        tokens = batch["observation.language.tokens"]
        with family.small():
            return policy.model.sample_actions_fast(
                images, masks, tokens, batch["observation.language.attention_mask"], max_decoding_steps=4
            )
    return policy.predict_action_chunk(batch)


def trained(family, tmp_path, **forcing):
    policy = family.forced(forcing)
    step(policy, family)
    policy.save_pretrained(tmp_path / "forced")
    return policy


@families
def test_export_loads_strictly_without_the_plugin_and_acts_bit_identically(family, tmp_path):
    policy = trained(family, tmp_path)
    stored = load_file(tmp_path / "forced" / "model.safetensors")
    assert [name for name in stored if "spatial_forcing." in name]
    export(ExportOptions(tmp_path / "forced", tmp_path / "stock"))
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["type"] == family.name
    assert "forcing" not in config
    stock = family.load(family.name, tmp_path / "stock")
    assert type(stock).__module__.startswith("lerobot.policies.")
    expected = {k: v for k, v in policy.state_dict().items() if "spatial_forcing" not in k}
    found = stock.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {k: v.dtype for k, v in found.items()} == {
        k: v.dtype for k, v in family.stock().state_dict().items()
    }
    assert torch.equal(outputs(stock, family), outputs(policy, family))


@families
def test_resume_restores_the_projector_and_the_steps(family, tmp_path):
    policy = trained(family, tmp_path, schedule="linear", schedule_steps=4)
    assert policy.forcing.alpha == pytest.approx(0.5 * 0.75)
    again = family.load(f"{family.name}_sf", tmp_path / "forced")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in policy.state_dict().items())
    assert int(again.forcing.steps.count) == 1
    assert again.forcing.alpha == policy.forcing.alpha
    # What comes after is the same, too.
    for one in (policy, again):
        step(one, family, seed=1)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in policy.state_dict().items())


@families
def test_a_converted_stock_checkpoint_starts_with_a_new_projector(family, tmp_path):
    stock = family.stock()
    stock.save_pretrained(tmp_path / "stock")
    init(InitOptions(str(tmp_path / "stock"), tmp_path / "sf", alpha=0.3, teacher="fake"))
    policy = family.load(f"{family.name}_sf", tmp_path / "sf")
    assert policy.config.forcing.alpha == 0.3
    own = policy.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in stock.state_dict().items())
    fresh = family.forced({"pairs": None}).forcing.projector.state_dict()
    assert policy.forcing.projector.state_dict().keys() == fresh.keys()
    # A stock checkpoint may also be named directly, beside the type.
    direct = family.load(f"{family.name}_sf", tmp_path / "stock", family.forced().config)
    assert torch.equal(outputs(direct, family), outputs(stock, family))


@families
def test_weight_zero_drops_the_projector_of_a_checkpoint(family, tmp_path):
    trained(family, tmp_path)
    control = family.load(f"{family.name}_sf", tmp_path / "forced", family.forced({"alpha": 0.0}).config)
    assert control.forcing is None


@families
def test_acting_needs_no_teacher(family, tmp_path):
    trained(family, tmp_path)
    config = json.loads((tmp_path / "forced" / "config.json").read_text())
    assert (config["forcing"]["teacher_dim"], config["forcing"]["teacher_depth"]) == (8, 3)
    config["forcing"]["teacher"] = "gone"
    (tmp_path / "forced" / "config.json").write_text(json.dumps(config))
    policy = family.load(f"{family.name}_sf", tmp_path / "forced")
    assert torch.isfinite(outputs(policy, family).float()).all()
    with pytest.raises(ConfigError, match="unknown teacher 'gone'"):
        policy.train()(family.batch())


@families
def test_peft_keeps_the_projector_trainable_and_saves_it(family, tmp_path):
    from peft import PeftModel

    family.stock().save_pretrained(tmp_path / "stock")
    init(InitOptions(str(tmp_path / "stock"), tmp_path / "sf", teacher="fake"))
    policy = family.load(f"{family.name}_sf", tmp_path / "sf")
    policy.config.pretrained_path = str(tmp_path / "sf")
    adapted = policy.wrap_with_peft(peft_cli_overrides={"target_modules": policy.family.peft_targets, "r": 2})
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in parameters)
    projector = [name for name in parameters if "spatial_forcing.projector.modules_to_save" in name]
    assert projector
    before = {name: parameters[name].clone() for name in projector}
    step(adapted, family)
    assert all(not torch.equal(before[name], parameters[name]) for name in projector if "weight" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.config.save_pretrained(tmp_path / "adapter")
    base = family.load(f"{family.name}_sf", tmp_path / "sf", policy.config)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    ours, theirs = adapted.state_dict(), again.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if "modules_to_save" in name)
    assert int(again.forcing.steps.count) == 1
    # The exported adapters go on the stock policy, without the plugin.
    export(ExportOptions(tmp_path / "adapter", tmp_path / "plain"))
    stock = PeftModel.from_pretrained(family.load(family.name, tmp_path / "stock"), str(tmp_path / "plain"))
    assert torch.equal(outputs(stock.base_model.model, family), outputs(adapted.base_model.model, family))


@families
def test_another_familys_checkpoint_is_refused(family, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"type": "tdmpc"}))
    with pytest.raises(CheckpointError, match=f"checkpoint of 'tdmpc', not of '{family.name}'"):
        family.load(f"{family.name}_sf", tmp_path / "other", family.forced().config)


def test_weights_that_do_not_fit_are_refused_although_lerobot_goes_on(tmp_path):
    family = FAMILIES["pi0"]
    family.stock(max_action_dim=12).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="were not loaded"):
        family.load("pi0_sf", tmp_path / "other", family.forced().config)


def test_the_plugin_is_found_by_lerobots_own_discovery():
    """In a fresh process, as lerobot-train does it."""
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as r; r();"
        "from lerobot.configs import PreTrainedConfig as C; print(sorted(C.get_known_choices()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {f"{name}_sf" for name in FAMILIES} <= set(json.loads(found.stdout.strip().replace("'", '"')))


def test_settings_of_earlier_checkpoints_are_read():
    """`weight`, `layers` and `teacher_layers` became `alpha` and `pairs`."""
    old = {"weight": 0.2, "teacher": "fake", "layers": [1, 3], "teacher_layers": [0], "standardise": True}
    config = PI0.config("pi0_sf", forcing=old)
    assert (config.forcing.alpha, config.forcing.pairs) == (0.2, ((1, 0), (3, 0)))
    written = draccus.encode(config.forcing)
    assert written["alpha"] == 0.2
    assert (written["weight"], written["layers"]) == (None, None)
    assert draccus.decode(ForcingSettings, {**old, "cameras": ["wrist"]}).cameras == ("wrist",)


@pytest.mark.parametrize("changes", [{"gate": True}, {"widths": (0.5, 1.0)}, {"subtract_cell_mean": True}])
def test_every_setting_of_the_method_reaches_the_policy(changes, tmp_path):
    settings = {"pairs": ((1, -1), (3, -1)), **changes}
    policy = PI0.forced(settings).train()
    loss, metrics = policy(PI0.batch())
    loss.backward()
    assert metrics["align_loss"] > 0
    policy.save_pretrained(tmp_path)
    again = PI0.load("pi0_sf", tmp_path)
    assert {name: getattr(again.forcing.config, name) for name in settings} == settings
