"""The table: where each LeRobot policy keeps its decoder blocks, and where its image tokens are.

To add a policy, add one `Family`. Checked for each family that can be built by painting single patches
(tests/test_families.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lerobot_policy_spatial_forcing.tokens import (
    Framing,
    Layout,
    act_framing,
    act_layout,
    paligemma_layout,
    pi_framing,
    qwen_framing,
    qwen_layout,
    sequence_first,
    smolvla_framing,
    smolvla_layout,
    xvla_framing,
    xvla_layout,
)
from spatial_forcing.alignment import Sequencer


@dataclass(frozen=True)
class Family:
    """One of LeRobot's policies.

    Attributes:
        base: its type in LeRobot, also the name of its folder.
        config_class: name of its configuration class.
        language_model: path from the policy to the module with the blocks.
        framing: how a view of a given size lies in the image that is cut into tokens.
        layout: where the tokens are in the sequence of the blocks.
        holder: path of the sub-module that keeps the projector; one that the policy saves and restores.
        below: paths of what comes before the blocks (vision tower, its projector, embeddings).
        blocks, norm: names of the blocks and the final norm in `language_model`.
        share: blocks before the tap, as a fraction of all.
        bars: whether the framing may add padding, whose tokens then have no target.
        views: how many views are in this sequence, counted from the first; None: all.
        imagenet: whether the policy gets its images normalised with ImageNet's mean and deviation.
        by_dataset: whether that is because LeRobot puts them in place of the dataset's statistics, which a
            flag can switch off.
        sequence: makes the (B, L, D) sequence of what enters a block; None: that is one.
        frozen: whether a configuration freezes all that lies below the tap.
        unfreeze: flags that fix it, without PEFT.
        peft_targets: a value for --peft.target_modules that adapts the language model.
    """

    base: str
    config_class: str
    language_model: str
    framing: Framing
    layout: Layout
    holder: str = "model"
    below: tuple[str, ...] = ()
    blocks: str = "layers"
    norm: str | None = "norm"
    share: float = 0.75
    bars: bool = True
    views: int | None = None
    imagenet: bool = False
    by_dataset: bool = False
    sequence: Sequencer | None = None
    frozen: Callable[[Any], bool] = lambda config: False
    unfreeze: str = ""
    peft_targets: str = ""

    def module(self, kind: str) -> str:
        """Dotted name of LeRobot's `configuration`, `modeling` or `processor` module of this policy."""
        return f"lerobot.policies.{self.base}.{kind}_{self.base}"

    @property
    def policy_class(self) -> str:
        """Name of LeRobot's policy class."""
        return self.config_class.removesuffix("Config") + "Policy"


_PALIGEMMA = "model.paligemma_with_expert.paligemma.model"
_GEMMA_TARGETS = r".*\.paligemma\.model\.language_model\..*\.self_attn\.(q|k|v|o)_proj"


def _pi(base: str, config_class: str) -> Family:
    return Family(
        base,
        config_class,
        language_model=f"{_PALIGEMMA}.language_model",
        below=(
            f"{_PALIGEMMA}.vision_tower",
            f"{_PALIGEMMA}.multi_modal_projector",
            f"{_PALIGEMMA}.language_model.embed_tokens",
        ),
        framing=pi_framing,
        layout=paligemma_layout,
        share=12 / 18,  # the paper's layer for pi0
        frozen=lambda config: getattr(config, "train_expert_only", False),
        unfreeze="--policy.train_expert_only=false",
        peft_targets=_GEMMA_TARGETS,
    )


_SMOL = "model.vlm_with_expert.vlm.model"

FAMILIES: dict[str, Family] = {
    family.base: family
    for family in (
        _pi("pi0", "PI0Config"),
        _pi("pi05", "PI05Config"),
        _pi("pi0_fast", "PI0FastConfig"),
        Family(
            "smolvla",
            "SmolVLAConfig",
            language_model=f"{_SMOL}.text_model",
            below=(f"{_SMOL}.vision_model", f"{_SMOL}.connector", f"{_SMOL}.text_model.embed_tokens"),
            framing=smolvla_framing,
            layout=smolvla_layout,
            frozen=lambda config: config.train_expert_only,
            unfreeze="--policy.train_expert_only=false --policy.freeze_vision_encoder=false",
            peft_targets=r".*\.vlm\.model\.text_model\..*\.self_attn\.(q|k|v|o)_proj",
        ),
        Family(
            "xvla",
            "XVLAConfig",
            language_model="model.vlm.language_model.encoder",
            norm=None,  # BART's encoder has none
            below=(
                "model.vlm.vision_tower",
                "model.vlm.multi_modal_projector",
                "model.vlm.language_model.shared",
            ),
            framing=xvla_framing,
            layout=xvla_layout,
            bars=False,
            views=1,
            imagenet=True,
            frozen=lambda config: config.freeze_vision_encoder and config.freeze_language_encoder,
            unfreeze="--policy.freeze_vision_encoder=false --policy.freeze_language_encoder=false",
            peft_targets=r".*\.vlm\.language_model\.encoder\..*\.self_attn\.(q|k|v|out)_proj",
        ),
        Family(
            "act",
            "ACTConfig",
            language_model="model.encoder",  # it reads images, state and latent together
            norm=None,
            below=("model.backbone", "model.encoder_img_feat_input_proj"),
            framing=act_framing,
            layout=act_layout,
            bars=False,
            imagenet=True,
            by_dataset=True,
            sequence=sequence_first,
            unfreeze="trainable parameters",  # nothing in its configuration freezes them
            peft_targets=r".*model\.encoder\.layers\..*\.(linear1|linear2)",
        ),
        Family(
            "eo1",
            "EO1Config",
            language_model="model.vlm_backbone.model.language_model",
            below=(
                "model.vlm_backbone.model.visual",
                "model.vlm_backbone.model.language_model.embed_tokens",
            ),
            framing=qwen_framing,
            layout=qwen_layout,
            unfreeze="trainable parameters",  # nothing in its configuration freezes them
            peft_targets=r".*\.language_model\..*\.self_attn\.(q|k|v|o)_proj",
        ),
    )
}
