"""The nano student: a small vision-language-action model that trains on one CPU core.

Sequence: [text | view 0 patches | view 1 patches | ... | proprio | action tokens], attended to in both
directions; text padding and absent views are masked. Patches are row-major, `(image_size / patch_size)^2`
a view. The action tokens begin as learned queries plus instruction plus proprio; an action head turns them
into a chunk of actions.

Shapes: B batch, V view, N tokens, D width, T chunk, A action_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, CameraImages, TokenLayout, camera_images
from spatial_forcing.errors import CheckpointError, ConfigError, DataError
from spatial_forcing.protocols import Batch, Metrics, Observation
from spatial_forcing.stem import PatchStem, fits_stem
from spatial_forcing.students.base import (
    STUDENTS,
    StudentConfig,
    StudentModule,
    StudentSpec,
    evaluating,
    load_weights,
    read_config,
    save_checkpoint,
)
from spatial_forcing.students.batches import ACTION, STATE, collate, vector
from spatial_forcing.students.blocks import Block, attention_mask
from spatial_forcing.students.heads import FlowHead, Generators, L1Head
from spatial_forcing.students.normalize import Normalizer, NormMode, Stats
from spatial_forcing.students.rtc import Overlap, freeze, guidance
from spatial_forcing.students.tokenizer import PAD, tokenize

MODEL_TYPE = "nano"


@dataclass(frozen=True)
class NanoConfig(StudentConfig):
    """Everything but the weights.

    Attributes:
        cameras: ordered camera names; the sequence and the teacher's views follow this order.
        image_size: pixels on a side; images of another size are resized (squashed if not square).
        patch_size: pixels on a side of one visual token, 4 times a power of two.
        width, depth, heads: of the decoder; `mlp_ratio` is its MLPs' hidden width over the width.
        state_dim, action_dim, chunk: sizes of the dataset's state and action, and actions a prediction.
        head: "l1" (regression) or "flow" (flow matching, `flow_steps` Euler steps).
        vocab, max_text: hashed word ids and words an instruction may have.
        dropout: on the residual branches, in training only.
        state_norm, action_norm: normalisation by the dataset's statistics.
        blank_images: the blind control: the student (not the teacher) sees mid-grey images.
    """

    cameras: tuple[str, ...]
    image_size: int = 96
    patch_size: int = 16
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 2
    state_dim: int = 4
    action_dim: int = 4
    chunk: int = 8
    head: Literal["l1", "flow"] = "l1"
    flow_steps: int = 10
    vocab: int = 4096
    max_text: int = 16
    dropout: float = 0.0
    state_norm: NormMode = "mean_std"
    action_norm: NormMode = "min_max"
    blank_images: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ConfigError(f"cameras is {self.cameras}; expected one or more distinct names.")
        sizes = ("patch_size", "width", "depth", "heads", "mlp_ratio", "state_dim", "action_dim", "chunk")
        for name in (*sizes, "max_text"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}."
            )
        if not fits_stem(self.patch_size):
            raise ConfigError(f"patch_size is {self.patch_size}; expected 4 times a power of two.")
        if self.width % (2 * self.heads):
            raise ConfigError(f"width {self.width} is not a multiple of 2 x heads ({self.heads}).")
        if self.head not in ("l1", "flow"):
            raise ConfigError(f"head is {self.head!r}; expected 'l1' or 'flow'.")
        if self.vocab < 2 or not 0 <= self.dropout < 1:
            raise ConfigError(f"vocab {self.vocab} (at least 2) or dropout {self.dropout} ([0, 1)) is wrong.")

    @property
    def grid(self) -> int:
        """Visual tokens on a side of one view."""
        return self.image_size // self.patch_size


class NanoVLA(StudentModule):
    """Views, instruction and proprioception in, a chunk of actions out. Implements `protocols.Student`."""

    config_class: ClassVar[type | None] = NanoConfig
    config: NanoConfig

    def __init__(self, config: NanoConfig, *, seed: int = 0) -> None:
        """Initial weights depend on `seed` alone; the global random stream is left as it was."""
        super().__init__()
        self.config = config
        width, tokens = config.width, config.grid**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch_embed = PatchStem(width, config.patch_size)
            self.text_embed = nn.Embedding(config.vocab, width)
            self.text_position = nn.Parameter(torch.empty(config.max_text, width))
            self.view_position = nn.Parameter(torch.empty(len(config.cameras), tokens, width))
            self.state_embed = nn.Sequential(
                nn.Linear(config.state_dim, width), nn.GELU(), nn.Linear(width, width)
            )
            self.action_query = nn.Parameter(torch.empty(config.chunk, width))
            self.layers = nn.ModuleList(
                Block(width, config.heads, config.mlp_ratio, config.dropout) for _ in range(config.depth)
            )
            self.norm = nn.LayerNorm(width)
            self.head: L1Head | FlowHead = (
                L1Head(width, config.action_dim)
                if config.head == "l1"
                else FlowHead(width, config.action_dim, config.heads, config.flow_steps)
            )
            self._initialise()
        self.state_norm = Normalizer(config.state_dim, config.state_norm)
        self.action_norm = Normalizer(config.action_dim, config.action_norm)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.2)
        for table in (self.text_position, self.view_position, self.action_query):
            nn.init.normal_(table, std=0.2)
        with torch.no_grad():  # keeps the residual stream's variance independent of the depth
            for name, value in self.layers.named_parameters():
                if name.endswith(("out.weight", "mlp.2.weight")):
                    value.div_(math.sqrt(2 * self.config.depth))

    @classmethod
    def create(cls, config: NanoConfig, stats: Stats, *, seed: int = 0) -> Self:
        """A new student that normalises with `stats`, the dataset's statistics (LeRobot `meta/stats.json`).

        Raises:
            DataError: `observation.state` or `action` statistics are missing or of another size.
        """
        student = cls(config, seed=seed)
        student.state_norm.fit(stats, STATE)
        student.action_norm.fit(stats, ACTION)
        return student

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The decoder blocks, in order."""
        return list(self.layers)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block; it sees the whole sequence."""
        return self.norm

    @property
    def spec(self) -> StudentSpec:
        """What it takes and gives; LoRA learns the head and what is not linear in full."""
        config = self.config
        return StudentSpec(
            cameras=config.cameras,
            image_size=config.image_size,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk=config.chunk,
            continues_chunks=isinstance(self.head, FlowHead),
            lora_full=("head", "state_embed", "action_query"),
        )

    def alignment(self, batch: Batch) -> Alignment:
        """Constant positions, (B, V, h, w), those of absent views invalid; views at their own resolution."""
        source = camera_images(batch, self.config.cameras)
        present = source.present.to(self._device)
        (B, V), side = present.shape, self.config.grid
        index = torch.arange(V * side * side, device=present.device) + self.config.max_text
        valid = present[:, :, None, None].expand(B, V, side, side)
        layout = TokenLayout(index.view(1, V, side, side).expand(B, V, side, side), valid)
        return Alignment(layout, source.views(), source)

    def forward(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """The head's loss on normalised actions, averaged over the steps that are not padding.

        Raises:
            DataError: a key is missing from the batch, or has another shape than the config says.
        """
        hidden = self._decode(batch, self._source(batch, alignment))
        shape = (len(hidden), self.config.chunk, self.config.action_dim)
        actions = vector(batch, ACTION, self._device, shape)
        is_pad = batch.get("action_is_pad")
        if is_pad is None:
            is_pad = torch.zeros(shape[:2], dtype=torch.bool)
        loss = self.head.loss(
            hidden, self.action_norm.normalize(actions), is_pad.to(actions.device, torch.bool)
        )
        return loss, {self.head.metric: loss.detach()}

    @torch.no_grad()
    def act(
        self,
        observations: Sequence[Observation],
        generator: Generators = None,
        overlaps: Sequence[Overlap] | None = None,
    ) -> Tensor:
        """Action chunks in environment units, (B, chunk, action_dim) float32 on the CPU.

        Always in eval mode, whatever `training` is. `generator` (flow head only) may also be a sequence
        of B generators, one a row; a single one gives row i its i-th draw. `overlaps` (flow head only), one
        an observation, makes each chunk continue the one that is being executed (real-time chunking).

        Raises:
            DataError: an observation lacks a camera or has a state of another size; an overlap does not fit.
            ConfigError: overlaps are given, but the head is not a flow.
        """
        seen = self._collate(observations)
        with evaluating(self):
            hidden = self._decode(seen, camera_images(seen, self.config.cameras), whole=self._watched)
            if overlaps is None:
                actions = self.head.sample(hidden, generator)
            else:
                actions = self._continue(hidden, generator, overlaps)
            return self.action_norm.denormalize(actions).float().cpu()

    @property
    def _watched(self) -> bool:
        """Whether a tap reads what comes out of the last block."""
        return any(part._forward_pre_hooks or part._forward_hooks for part in (self.norm, self.layers[-1]))

    def _continue(self, hidden: Tensor, generator: Generators, overlaps: Sequence[Overlap]) -> Tensor:
        if not isinstance(self.head, FlowHead):
            raise ConfigError(f"real-time chunking needs a flow head; this one is {self.config.head!r}.")
        for overlap in overlaps:
            overlap.check(self.config.chunk, self.config.action_dim)
        previous, weight = guidance(overlaps, self.action_norm.normalize, self.config.chunk, hidden)
        actions = self.head.sample_guided(hidden, generator, previous, weight)
        return freeze(actions, previous, [overlap.delay for overlap in overlaps])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; statistics are among the weights."""
        config = {"model_type": MODEL_TYPE, "architectures": [type(self).__name__], **asdict(self.config)}
        save_checkpoint(self, config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            CheckpointError: another architecture, unknown or invalid settings, or weights that do not fit.
        """
        stored = read_config(folder, MODEL_TYPE)
        known = {field.name for field in fields(NanoConfig)}
        settings = {key: value for key, value in stored.items() if key not in ("model_type", "architectures")}
        if unexpected := sorted(settings.keys() - known):
            raise CheckpointError(f"{folder}/config.json has unknown settings {unexpected}; another version?")
        try:
            student = cls(NanoConfig(**settings))
        except (TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{folder}/config.json does not describe a nano student: {error}"
            ) from error
        load_weights(student, folder)
        return student

    @property
    def _device(self) -> torch.device:
        return self.action_query.device

    def _source(self, batch: Batch, alignment: Alignment | None) -> CameraImages:
        return camera_images(batch, self.config.cameras) if alignment is None else alignment.source

    def _decode(self, batch: Batch, source: CameraImages, whole: bool = True) -> Tensor:
        """Hidden states of the action tokens after the final norm, (B, T, D).

        Unless `whole`, the last block leaves out all other tokens: nobody but a tap reads them.
        """
        tokens, keep = self._embed(batch, source)
        mask = attention_mask(keep, tokens)
        for number, block in enumerate(self.layers, 1):
            few = number == self.config.depth and not whole
            tokens = block(tokens, mask, self.config.chunk) if few else block(tokens, mask)
        return self.norm(tokens)[:, -self.config.chunk :]

    def _embed(self, batch: Batch, source: CameraImages) -> tuple[Tensor, Tensor]:
        """The sequence (B, N, D) and which of it may be attended to, (B, N) bool."""
        images, present = source.own(self._resize, self._device), source.present.to(self._device)
        B = len(images)
        patches = self.patch_embed(self._pixels(images).flatten(0, 1)).flatten(2).transpose(1, 2)
        patches = patches.unflatten(0, images.shape[:2]) + self.view_position
        words = self._words(batch, B)
        text, worded = self.text_embed(words), words != PAD
        state = self.state_norm.normalize(vector(batch, STATE, self._device, (B, self.config.state_dim)))
        proprio = self.state_embed(state)[:, None]
        # The queries begin with what needs no attention, so that attention is free to learn to look.
        asked = (text * worded[..., None]).sum(1, keepdim=True)
        asked = asked / worded.sum(1).clamp_min(1).sqrt()[:, None, None]
        tokens = [
            text + self.text_position,
            patches.flatten(1, 2),
            proprio,
            self.action_query + proprio + asked,
        ]
        seen = present.repeat_interleave(patches.shape[2], dim=1)
        always = seen.new_ones(B, 1 + self.config.chunk)
        return torch.cat(tokens, dim=1), torch.cat([worded, seen, always], dim=1)

    def _pixels(self, images: Tensor) -> Tensor:
        """[0, 1] to [-1, 1], in place; mid-grey for the blind control."""
        return torch.zeros_like(images) if self.config.blank_images else images.mul_(2).sub_(1)

    def _resize(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 or float -> (B, 3, image_size, image_size) of the same type.

        Bytes stay bytes up to the stack of all views: a fresh megabyte costs more than arithmetic on it.
        """
        size = (self.config.image_size, self.config.image_size)
        if image.shape[-2:] == size:
            return image
        if image.dtype == torch.uint8 and image.device.type != "cpu":  # only the CPU resizes bytes
            smooth = F.interpolate(image.float(), size, mode="bilinear", antialias=True)
            return smooth.round_().clamp_(0, 255).to(torch.uint8)
        return F.interpolate(image, size, mode="bilinear", antialias=True)

    def _words(self, batch: Batch, count: int) -> Tensor:
        texts = batch.get("task")
        if texts is None or len(texts) != count:
            raise DataError(f"the batch has {count} images a camera and task {texts!r}; expected as many.")
        return tokenize(texts, self.config.vocab, self.config.max_text).to(self._device)

    def _collate(self, observations: Sequence[Observation]) -> dict[str, Any]:
        return collate(observations, self.config.cameras, self._device, fit=self._resize)


STUDENTS.add(MODEL_TYPE, NanoVLA)
