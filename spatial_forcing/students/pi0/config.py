"""Settings of the pi0 student, and how they become transformers' `PI0Config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from spatial_forcing.errors import ConfigError
from spatial_forcing.students.base import StudentConfig
from spatial_forcing.students.normalize import NormMode

PADDED = 32
"""States and actions are padded with zeros to this many dimensions, as in the published weights."""

HASHED = "hashed"
"""The tokenizer that needs no download; for models trained from nothing only."""


@dataclass(frozen=True)
class Pi0Size:
    """The architecture; the defaults are the published 3.5 B parameter model's (PaliGemma 3B, 300 M expert).

    Attributes:
        width, depth, mlp, heads, kv_heads, head_dim: of the language model; the expert shares all but the
            first and third.
        expert_width, expert_mlp: of the action expert.
        vision_width, vision_depth, vision_heads, vision_mlp: of the SigLIP tower.
        image_size, patch: pixels on a side of a view and of one visual token.
        vocab: rows of the token embedding.
    """

    width: int = 2048
    depth: int = 18
    mlp: int = 16384
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    expert_width: int = 1024
    expert_mlp: int = 4096
    vision_width: int = 1152
    vision_depth: int = 27
    vision_heads: int = 16
    vision_mlp: int = 4304
    image_size: int = 224
    patch: int = 14
    vocab: int = 257152

    @property
    def grid(self) -> int:
        """Visual tokens on a side of one view."""
        return self.image_size // self.patch


PI0_BASE = Pi0Size()


@dataclass(frozen=True)
class Pi0Config(StudentConfig):
    """Everything but the weights.

    Attributes:
        cameras: ordered camera names; the sequence and the teacher's views follow this order.
        state_dim, action_dim: sizes of the dataset's state and action, at most 32.
        chunk: actions a prediction.
        max_text: tokens of an instruction, with its start and end.
        state_norm, action_norm: normalisation by the dataset's statistics.
        flow_steps: Euler steps from noise to actions.
        tokenizer: hub id or folder of PaliGemma's tokenizer; "hashed" needs no files, but only a model that
            is trained from nothing can use it.
        pretrained: folder, file or hub id of pi0 weights to start from (openpi's PyTorch layout, LeRobot's
            or transformers'); None: random weights.
        size: the architecture.
        dtype: of the weights. Published weights are mostly bfloat16; train in float32, under autocast.
    """

    cameras: tuple[str, ...]
    state_dim: int = 14
    action_dim: int = 14
    chunk: int = 50
    max_text: int = 48
    state_norm: NormMode = "mean_std"
    action_norm: NormMode = "mean_std"
    flow_steps: int = 10
    tokenizer: str = "google/paligemma-3b-pt-224"
    pretrained: str | None = None
    size: Pi0Size = field(default_factory=Pi0Size)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras is {self.cameras}; expected one or more distinct names.")
        for name in ("state_dim", "action_dim"):
            if not 1 <= getattr(self, name) <= PADDED:
                raise ConfigError(f"{name} is {getattr(self, name)}; pi0 takes 1 to {PADDED} dimensions.")
        for name in ("chunk", "flow_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.max_text < 2:
            raise ConfigError(f"max_text is {self.max_text}; expected at least 2 (start and end).")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'.")
        if self.tokenizer == HASHED and self.pretrained is not None:
            raise ConfigError(
                "tokenizer is 'hashed' and pretrained is set; pretrained weights know PaliGemma's tokens "
                "only: name its tokenizer (google/paligemma-3b-pt-224, or a local copy)."
            )
        if self.size.image_size % self.size.patch:
            raise ConfigError(
                f"image_size {self.size.image_size} is not a multiple of patch {self.size.patch}."
            )

    @property
    def depth(self) -> int:
        """Decoder blocks of the language model, which a tap can follow."""
        return self.size.depth

    @property
    def image_size(self) -> int:
        """Pixels on a side of a view as the model sees it."""
        return self.size.image_size


def architecture(config: Pi0Config) -> dict[str, Any]:
    """The arguments of transformers' `PI0Config`."""
    size = config.size
    shared = {
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    text = {"model_type": "gemma", "hidden_size": size.width, "intermediate_size": size.mlp, **shared}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": size.vision_width,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_depth,
        "num_attention_heads": size.vision_heads,
        "image_size": size.image_size,
        "patch_size": size.patch,
        "projection_dim": size.width,
        "vision_use_head": False,
        "hidden_act": "gelu_pytorch_tanh",
    }
    return {
        "vlm_config": {
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": size.width,
            "image_token_id": size.vocab,  # outside the vocabulary: no word can be mistaken for an image
        },
        "dit_config": {
            "model_type": "gemma",
            "hidden_size": size.expert_width,
            "intermediate_size": size.expert_mlp,
            **shared,
        },
        "chunk_size": config.chunk,
        "max_state_dim": PADDED,
        "max_action_dim": PADDED,
        "num_inference_steps": config.flow_steps,
        "loss_reduction": "none",
    }
