"""The pi0 student: transformers' `PI0ForConditionalGeneration` with images, text and units around it.

Sequence of the tapped language model: [view 0 patches | view 1 patches | ... | text], attended to in both
directions; absent views and text padding are masked, so they influence nothing. A second expert reads its
keys and values: one state token and the noisy actions, which it moves towards actions (flow matching: time 1
is noise, time 0 actions).

Shapes: B batch, V view, T chunk, P 32 padded dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, CameraImages, camera_images
from spatial_forcing.protocols import Batch, Metrics, Observation, VisionTower
from spatial_forcing.students.base import STUDENTS, StudentModule, StudentSpec, evaluating
from spatial_forcing.students.batches import ACTION, STATE, collate, vector
from spatial_forcing.students.heads import Generators, masked_mean, row_noise
from spatial_forcing.students.normalize import Normalizer, Stats
from spatial_forcing.students.pi0 import checkpoint
from spatial_forcing.students.pi0.config import HASHED, PADDED, Pi0Config
from spatial_forcing.students.pi0.continuing import sample_guided
from spatial_forcing.students.pi0.frames import letterboxed_pixels, picture_mask, views_of
from spatial_forcing.students.pi0.text import Prompt
from spatial_forcing.students.rtc import Overlap, freeze, guidance

MODEL_TYPE = "pi0"
UNREAD = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
"""Parts of the language model's last block behind its keys and values, which alone the expert reads."""


class Pi0(StudentModule):
    """pi0 as a student. Implements `protocols.Student`; `network` is the stock transformers model.

    Weights that no loss reaches (the expert's token embedding, the queries and MLP of the language model's
    last block, whose output nobody reads) do not require gradients, so that distributed training finds no
    unused parameter and the optimizer keeps no state for them.
    """

    config_class = Pi0Config
    config: Pi0Config

    def __init__(self, config: Pi0Config, *, seed: int = 0, saved: str | Path | None = None) -> None:
        """Weights are those of `config.pretrained`, or drawn from `seed` (the global stream is not shifted).

        `saved` is the folder of a saved student, whose weights and tokenizer are taken instead.

        Raises:
            ConfigError: the tokenizer cannot be loaded.
            CheckpointError: `config.pretrained` is not there, or does not fit.
        """
        super().__init__()
        self.config = config
        words = config.tokenizer if saved is None or config.tokenizer == HASHED else saved
        self.prompt = Prompt(words, config.size.vocab, config.max_text)
        weights = config.pretrained if saved is None else str(saved)
        self.network: Any = checkpoint.build_network(config, seed, weights)
        self.state_norm = Normalizer(config.state_dim, config.state_norm)
        self.action_norm = Normalizer(config.action_dim, config.action_norm)
        for name, parameter in self.network.named_parameters():
            if self._unused(name):
                parameter.requires_grad_(False)

    @classmethod
    def create(cls, config: Pi0Config, stats: Stats, *, seed: int = 0) -> Self:
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
        """The language model's blocks, in order."""
        return list(self._language_model.layers)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the language model's last block."""
        norm: nn.Module = self._language_model.norm
        return norm

    @property
    def vision_tower(self) -> VisionTower:
        """SigLIP, after its last norm."""
        tower = self.network.model.vlm.vision_tower
        tower = getattr(tower, "vision_model", tower)  # one level deeper in earlier versions of transformers
        return VisionTower(tower.post_layernorm, self.config.size.vision_width)

    @property
    def spec(self) -> StudentSpec:
        """What it takes and gives; LoRA learns in full what openpi's own does."""
        config = self.config
        last = f"network.model.vlm.language_model.layers.{config.size.depth - 1}."
        return StudentSpec(
            cameras=config.cameras,
            image_size=config.image_size,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk=config.chunk,
            letterboxes=True,
            continues_chunks=True,
            lora_full=("network.embed_action_time", "network.action_out_proj"),
            lora_exclude=tuple(f"{last}{part}*" for part in UNREAD),
        )

    def alignment(self, batch: Batch) -> Alignment:
        """Constant positions, (B, V, h, w), those of absent views and of padding invalid; see `views_of`."""
        grid = (self.config.size.grid, self.config.size.grid)
        # Training only: nothing of it is in a process that serves.
        from spatial_forcing.forcing.layout import layout_from_offset, tokens_valid

        source = camera_images(batch, self.config.cameras)
        valid = tokens_valid(picture_mask(source, self.config.image_size), grid)
        B, V = valid.shape[:2]
        layout = layout_from_offset(B, V, grid, start=0, valid=valid, device=valid.device)
        return Alignment(layout, views_of(source, self.config.image_size), source)

    def forward(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """Flow-matching loss at one random time a sample, over all 32 dimensions and unpadded steps.

        Raises:
            DataError: a key is missing from the batch, or has another shape than the config says.
        """
        shape = (len(batch[ACTION]) if ACTION in batch else 0, self.config.chunk, self.config.action_dim)
        actions = self._padded(self.action_norm.normalize(vector(batch, ACTION, self._device, shape)))
        noise = torch.randn_like(actions)
        own = self.network.config
        beta = torch.distributions.Beta(
            actions.new_tensor(own.time_sampling_beta_alpha), actions.new_tensor(own.time_sampling_beta_beta)
        )
        time = beta.sample((len(actions),)) * own.time_sampling_scale + own.time_sampling_offset
        source = None if alignment is None else alignment.source
        error = self.flow_error(batch, actions, noise, time, source)
        is_pad = batch.get("action_is_pad")
        if is_pad is None:
            is_pad = torch.zeros(shape[:2], dtype=torch.bool)
        loss = masked_mean(error, is_pad.to(error.device, torch.bool))
        return loss, {"action_flow": loss.detach()}

    def flow_error(
        self,
        batch: Batch,
        actions: Tensor,
        noise: Tensor,
        time: Tensor,
        source: CameraImages | None = None,
    ) -> Tensor:
        """Squared error of the velocity, (B, T, P).

        Args:
            batch: images, state, task.
            actions, noise: (B, T, P), actions normalised and padded.
            time: (B,) in [0, 1]; 1 is noise.
            source: the images of the batch, where they were read before.
        """
        dtype = self.network.dtype
        output = self.network(
            **self._inputs(batch, source),
            noise=noise.to(dtype),
            actions=actions.to(dtype),
            timestep=time.float(),
        )
        return F.mse_loss(output.logits.float(), noise - actions, reduction="none")

    def act(
        self,
        observations: Sequence[Observation],
        generator: Generators = None,
        *,
        overlaps: Sequence[Overlap] | None = None,
    ) -> Tensor:
        """Action chunks in environment units, (B, chunk, action_dim) float32 on the CPU.

        Always in eval mode, whatever `training` is. `generator` may also be a sequence of B generators, one a
        row; a single one gives row i its i-th draw. `overlaps`, one an observation, makes each chunk continue
        the one that is being executed (real-time chunking).

        Raises:
            DataError: an observation lacks a camera or has a state of another size; an overlap does not fit.
        """
        for overlap in overlaps or ():
            overlap.check(self.config.chunk, self.config.action_dim)
        # A server runs in inference mode, but guidance needs gradients.
        with torch.inference_mode(torch.is_inference_mode_enabled() and overlaps is None), torch.no_grad():
            batch = self._collate(observations)
            noise = row_noise(len(observations), (self.config.chunk, PADDED), generator)
            if overlaps is None:
                actions = self.sample(batch, noise)
            else:
                actions = self._continue(batch, noise, overlaps)
            return self.action_norm.denormalize(actions[..., : self.config.action_dim].float()).cpu()

    def _continue(self, batch: Batch, noise: Tensor, overlaps: Sequence[Overlap]) -> Tensor:
        """Normalised, padded actions (B, T, P) that begin with what is still to be executed."""
        previous, weight = guidance(
            overlaps, self.action_norm.normalize, self.config.chunk, noise.to(self._device)
        )
        previous = self._padded(previous)
        with evaluating(self):
            actions = sample_guided(
                self.network, self._inputs(batch), noise, previous, weight, steps=self.config.flow_steps
            )
        return freeze(actions, previous, [overlap.delay for overlap in overlaps])

    @torch.no_grad()
    def sample(self, batch: Batch, noise: Tensor, steps: int | None = None) -> Tensor:
        """Normalised, padded actions (B, T, P) by Euler steps from `noise` (B, T, P); in eval mode."""
        with evaluating(self):
            sampled: Tensor = self.network.sample_actions(
                **self._inputs(batch),
                noise=noise.to(self._device, self.network.dtype),
                num_steps=steps or self.config.flow_steps,
            )
        return sampled

    @property
    def _norms(self) -> dict[str, Normalizer]:
        return {"state_norm": self.state_norm, "action_norm": self.action_norm}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` for stock transformers, and this student's own files.

        Weights keep openpi's names, as published ones do, so transformers, openpi and LeRobot load them too.
        """
        checkpoint.save(folder, self.network, self.prompt, self.config, self._norms)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            CheckpointError: another architecture, unknown or invalid settings, or weights that do not fit.
        """
        config, statistics = checkpoint.read_settings(folder)
        student = cls(config, saved=folder)
        checkpoint.load_statistics(student._norms, statistics, folder)
        return student

    @classmethod
    def from_base(cls, place: str | Path, settings: Mapping[str, Any]) -> Self:
        """The student that adapters were trained on: published weights, or a saved student.

        Statistics of the former are those that lie beside the adapters.

        Raises:
            CheckpointError: `place` is neither, or its weights do not fit `settings`.
        """
        if (Path(place) / checkpoint.STUDENT_FILE).exists():
            return cls.from_pretrained(place)
        return cls(replace(checkpoint.config_from_plain(settings), pretrained=str(place)))

    # ---- inside

    @property
    def _language_model(self) -> Any:
        return self.network.model.vlm.language_model

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.network.device
        return device

    def _unused(self, name: str) -> bool:
        """Whether no loss reaches the network's weight `name`: see the class."""
        last = f"model.vlm.language_model.layers.{self.config.size.depth - 1}."
        parts = [last + part for part in UNREAD] + ["model.vlm.language_model.norm", "model.dit.embed_tokens"]
        return name.startswith(tuple(parts))

    def _inputs(self, batch: Batch, source: CameraImages | None = None) -> dict[str, Tensor]:
        """The arguments that training and sampling share."""
        source = camera_images(batch, self.config.cameras) if source is None else source
        pixels = letterboxed_pixels(source, self.config.image_size)
        (B, V), tokens = source.present.shape, self.config.size.grid**2
        words, real = (part.to(self._device) for part in self.prompt(batch.get("task"), B))
        images = words.new_full((B, V * tokens), self.network.config.vlm_config.image_token_id)
        seen = source.present.to(self._device)
        state = self.state_norm.normalize(vector(batch, STATE, self._device, (B, self.config.state_dim)))
        dtype = self.network.dtype
        return {
            "state": self._padded(state).to(dtype),
            "pixel_values": pixels.to(self._device, dtype),
            # Every view keeps its place; what is absent is masked below.
            "pixel_attention_mask": torch.ones_like(seen),
            "input_ids": torch.cat([images, words], dim=1),
            "attention_mask": torch.cat([seen.repeat_interleave(tokens, dim=1), real], dim=1).long(),
        }

    def _padded(self, value: Tensor) -> Tensor:
        return F.pad(value, (0, PADDED - value.shape[-1]))

    def _collate(self, observations: Sequence[Observation]) -> dict[str, Any]:
        return collate(observations, self.config.cameras, self._device)


STUDENTS.add(MODEL_TYPE, Pi0)
