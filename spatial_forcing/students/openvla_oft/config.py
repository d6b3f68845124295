"""Configuration of an OpenVLA-OFT student, and what a published `config.json` says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from spatial_forcing.errors import CheckpointError, ConfigError
from spatial_forcing.students.base import StudentConfig

MODEL_TYPE = "openvla"
"""As published checkpoints call themselves, so that they load by name and the official code loads ours."""
SECTION = "spatial_forcing"
"""Key of our own settings in `config.json`; the official loader ignores it."""
ACTION_BINS = 256


@dataclass(frozen=True)
class OpenVLAOFTConfig(StudentConfig):
    """Everything but the weights. The defaults are the published 7 B models fine-tuned on LIBERO.

    Attributes:
        cameras: ordered camera names; each gives (image_size / 14)^2 visual tokens.
        state_dim: proprioception, one token after the images; 0: none.
        action_dim, chunk: actions a prediction.
        head: "l1" (regression, OpenVLA-OFT) or "tokens" (256 bins a number, in the vocabulary).
        decoding: "parallel" (all action tokens at once, attention in both directions) or
            "autoregressive" (the original OpenVLA: causal, token by token, `head="tokens"`, `chunk=1`).
        action_queries: what parallel decoding has at the action tokens: "zero" (as released; rotary
            positions alone tell them apart, which a model from scratch hardly learns to use) or "sinusoid"
            (fixed, of the token's number).
        film: the instruction modulates the vision blocks.
        norm: bounds of states and actions: "quantile" (q01, q99) or "min_max".
        gripper: "libero": the environment's last action is -1 open .. +1 close, the model's 0 close ..
            1 open (binarised when acting). "raw": as in the dataset.
        center_crop: crop 90 % of the area when acting, as training's random crops leave.
        jpeg: compress and restore images when acting, as the published training data were.
        dataset: name of the statistics in `dataset_statistics.json`; empty: the only ones there are.
        tokenizer: "file" (`tokenizer.json` of the checkpoint) or "words" (hashed; new tiny models only).
        dtype: of vision, projector and language model. Heads and adapters stay float32.
        head_dtype: the last hidden states are rounded to it and the head computes in it; the released
            code uses bfloat16.
        gradient_checkpointing: recompute the blocks in backward.
        image_size, vocab, width, depth, heads, mlp: of the language model and its images.
        dino, siglip: (width, depth, heads, hidden width of the MLP) of the vision towers.
    """

    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    state_dim: int = 8
    action_dim: int = 7
    chunk: int = 8
    head: Literal["l1", "tokens"] = "l1"
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    action_queries: Literal["zero", "sinusoid"] = "zero"
    film: bool = False
    norm: Literal["quantile", "min_max"] = "quantile"
    gripper: Literal["libero", "raw"] = "libero"
    center_crop: bool = True
    jpeg: bool = False
    dataset: str = ""
    tokenizer: Literal["file", "words"] = "file"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    head_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    image_size: int = 224
    vocab: int = 32064
    width: int = 4096
    depth: int = 32
    heads: int = 32
    mlp: int = 11008
    dino: tuple[int, int, int, int] = (1024, 24, 16, 4096)
    siglip: tuple[int, int, int, int] = (1152, 27, 16, 4304)

    def __post_init__(self) -> None:
        for name in ("cameras", "dino", "siglip"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras is {self.cameras}; expected one or more distinct names.")
        for name in ("action_dim", "chunk", "vocab", "width", "depth", "heads", "mlp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.state_dim < 0:
            raise ConfigError(f"state_dim is {self.state_dim}; expected 0 (none) or more.")
        if self.image_size < PATCH or self.image_size % PATCH:
            raise ConfigError(f"image_size is {self.image_size}; expected a multiple of {PATCH}.")
        if self.width % (2 * self.heads):
            raise ConfigError(f"width {self.width} is not a multiple of 2 x heads ({self.heads}).")
        for name in ("dino", "siglip"):
            width, depth, heads, _ = getattr(self, name)
            if depth < 2 or width % heads:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; expected depth >= 2, heads dividing width."
                )
        self._check_head()

    def _check_head(self) -> None:
        if self.decoding == "autoregressive" and (self.head, self.chunk, self.state_dim) != ("tokens", 1, 0):
            raise ConfigError(
                f"autoregressive decoding is the original OpenVLA: head 'tokens', chunk 1, state_dim 0, and "
                f"not head {self.head!r}, chunk {self.chunk}, state_dim {self.state_dim}."
            )
        if self.head == "tokens" and self.token_vocab < ACTION_BINS + 3:
            raise ConfigError(f"vocab {self.vocab} has no room for {ACTION_BINS} action tokens.")

    @property
    def grid(self) -> int:
        """Visual tokens on a side of one view."""
        return self.image_size // PATCH

    @property
    def token_vocab(self) -> int:
        """Vocabulary without its padding; action bin k is token `token_vocab - k`."""
        return self.vocab - VOCAB_PADDING

    @property
    def visual_tokens(self) -> int:
        """Tokens between BOS and the prompt: all views, and the proprioception token if there is one."""
        return len(self.cameras) * self.grid**2 + (self.state_dim > 0)


PATCH = 14
VOCAB_PADDING = 64


def published_config(config: OpenVLAOFTConfig, norm_stats: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` in the published layout, with our settings in a section of their own."""
    text = {
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "pad_token_id": 32000,
        "torch_dtype": config.dtype,
    }
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["OpenVLAForActionPrediction"],
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [config.image_size, config.image_size],
        "pad_token_id": 32000,
        "pad_to_multiple_of": VOCAB_PADDING,
        "n_action_bins": ACTION_BINS,
        "torch_dtype": config.dtype,
        "text_config": text,
        "norm_stats": dict(norm_stats),
        SECTION: asdict(config),
    }


def config_from_published(stored: Mapping[str, Any], found: Mapping[str, Any]) -> OpenVLAOFTConfig:
    """The configuration that a checkpoint's `config.json` and files describe.

    Args:
        stored: the parsed `config.json`.
        found: settings that the head files tell (see `checkpoint.inspect_heads`); our own section wins.

    Raises:
        CheckpointError: another vision backbone or language model, or settings that are no configuration.
    """
    known = {field.name for field in fields(OpenVLAOFTConfig)}
    own = dict(stored.get(SECTION) or {})
    if unexpected := sorted(own.keys() - known):
        raise CheckpointError(
            f"config.json: section {SECTION!r} has unknown settings {unexpected}; another version?"
        )
    text = stored.get("text_config") or {}
    backbone = stored.get("vision_backbone_id", "dinosiglip-vit-so-224px")
    if backbone != "dinosiglip-vit-so-224px" or text.get("model_type", "llama") != "llama":
        raise CheckpointError(
            f"config.json describes vision {backbone!r} and language model {text.get('model_type')!r}; "
            "this student reads 'dinosiglip-vit-so-224px' with 'llama' (openvla-7b and its descendants)."
        )
    sizes = {
        "vocab": "vocab_size", "width": "hidden_size", "mlp": "intermediate_size",
        "depth": "num_hidden_layers", "heads": "num_attention_heads",
    }  # fmt: skip
    settings: dict[str, Any] = {ours: text[theirs] for ours, theirs in sizes.items() if theirs in text}
    settings |= {"jpeg": True, **found, **own}
    try:
        return OpenVLAOFTConfig(**settings)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"config.json does not describe an OpenVLA-OFT student: {error}") from error
