"""The OpenVLA-OFT student on stock transformers (arXiv 2502.19645), and the original OpenVLA's token head.

The diffusion head of the original is left out: it raises in the released code, and no published LIBERO
checkpoint has one.

Shapes: B batch, V view, N patches of a view, W width, T chunk, A action_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_forcing.alignment import Alignment, CameraImages, TokenLayout, camera_images
from spatial_forcing.errors import DataError
from spatial_forcing.protocols import Batch, Metrics, Observation, VisionTower
from spatial_forcing.students.base import (
    STUDENTS,
    ManyStatistics,
    StudentModule,
    StudentSpec,
    evaluating,
    read_config,
)
from spatial_forcing.students.batches import ACTION, STATE, vector
from spatial_forcing.students.heads import Generators
from spatial_forcing.students.normalize import Stats
from spatial_forcing.students.openvla_oft import images as pictures
from spatial_forcing.students.openvla_oft.config import MODEL_TYPE, OpenVLAOFTConfig
from spatial_forcing.students.openvla_oft.decoder import Decoder
from spatial_forcing.students.openvla_oft.heads import (
    ActionTokens,
    L1ActionHead,
    ProprioProjector,
    VisionProjector,
    regression_loss,
)
from spatial_forcing.students.openvla_oft.memory import activation_bytes
from spatial_forcing.students.openvla_oft.sequence import Prompts, TextTokens, assemble, gather, sinusoids
from spatial_forcing.students.openvla_oft.statistics import Bounds, read_statistics, set_from_dataset
from spatial_forcing.students.openvla_oft.vision import FiLMBlock, FusedVision


class OpenVLAOFT(StudentModule, ManyStatistics):
    """Views, instruction and proprioception in, a chunk of actions out. Implements `protocols.Student`.

    Args:
        config: sizes and conventions.
        tokenizer_json: content of `tokenizer.json`, where the configuration asks for one.
        seed: of the initial weights; the global random stream is left as it was.
    """

    config_class = OpenVLAOFTConfig
    config: OpenVLAOFTConfig

    def __init__(
        self, config: OpenVLAOFTConfig, tokenizer_json: bytes | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.prompts = Prompts(config, tokenizer_json)
        self.tokens = ActionTokens(config.token_vocab)
        self.assets: dict[str, bytes] = {} if tokenizer_json is None else {"tokenizer.json": tokenizer_json}
        dtype = getattr(torch, config.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vision = FusedVision(config).to(dtype)
            self.projector = VisionProjector(config.dino[0] + config.siglip[0], config.width).to(dtype)
            self.llm = Decoder(config).to(dtype)
            self.lm_head = nn.Linear(config.width, config.vocab, bias=False, dtype=dtype)
            nn.init.normal_(self.lm_head.weight, std=0.02)
        self.proprio_projector, self.action_head = self.heads(config, seed)
        # Checkpoints hold the vision towers' last blocks, which never run; kept to be handed on unchanged.
        self.unused: dict[str, Tensor] = {}
        self.dataset_name = config.dataset or "dataset"
        self.lm_head.requires_grad_(config.head == "tokens")
        self.state_bounds = Bounds(config.state_dim) if config.state_dim else None
        self.action_bounds = Bounds(config.action_dim)
        self.recompute(config.gradient_checkpointing)

    @classmethod
    def create(cls, config: OpenVLAOFTConfig, stats: Stats, *, seed: int = 0) -> Self:
        """A new student that normalises with `stats`; see `fine_tune` for one on published weights.

        Raises:
            DataError: statistics are missing or of another size.
        """
        student = cls(config, seed=seed)
        student.fit(stats)
        return student

    @staticmethod
    def heads(config: OpenVLAOFTConfig, seed: int = 0) -> tuple[ProprioProjector | None, L1ActionHead | None]:
        """New heads; they depend on `seed` alone, not on how the rest was made."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            proprio = ProprioProjector(config.state_dim, config.width) if config.state_dim else None
            return proprio, L1ActionHead(config.width, config.action_dim) if config.head == "l1" else None

    @property
    def spec(self) -> StudentSpec:
        """What it takes and gives; LoRA learns heads and FiLM in full."""
        config = self.config
        film = [name for name, module in self.vision.named_modules() if isinstance(module, FiLMBlock)]
        scales = [f"vision.{name}.{part}" for name in film for part in ("scale", "shift")]
        heads = {"proprio_projector": self.proprio_projector, "action_head": self.action_head}
        return StudentSpec(
            cameras=config.cameras,
            image_size=config.image_size,
            state_dim=config.state_dim,
            action_dim=config.action_dim,
            chunk=config.chunk,
            lora_full=(*(name for name, head in heads.items() if head is not None), *scales),
            lora_exclude=("lm_head",),
        )

    def fit(self, stats: Stats) -> None:
        """Take a LeRobot dataset's statistics (raw units)."""
        config = self.config
        if self.state_bounds is not None:
            set_from_dataset(self.state_bounds, stats, STATE, config.norm)
        unscaled = (config.action_dim - 1,) if config.gripper == "libero" else ()
        set_from_dataset(self.action_bounds, stats, ACTION, config.norm, unscaled)

    def recompute(self, enabled: bool) -> None:
        """Switch activation checkpointing of all blocks."""
        self.llm.recompute = self.vision.dino.recompute = self.vision.siglip.recompute = enabled

    def activation_bytes(self, samples: int) -> int:
        """What a training forward of `samples` samples keeps for backward, estimated."""
        return activation_bytes(self.config, samples)

    # ---- the contract

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The language model's blocks, in order."""
        return list(self.llm.layers)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last block; it sees the whole sequence."""
        return self.llm.norm

    def alignment(self, batch: Batch) -> Alignment:
        """Patches follow BOS view by view, (B, V, h, w), those of absent views are invalid."""
        source = camera_images(batch, self.config.cameras)
        present = source.present.to(self._device)
        grid = (self.config.grid, self.config.grid)
        B, V = present.shape
        from spatial_forcing.forcing.layout import layout_from_offset  # training only: nothing of it serves

        layout = layout_from_offset(B, V, grid, start=1, device=present.device)
        layout = TokenLayout(layout.index, layout.valid & present[:, :, None, None])
        return Alignment(layout, source.views(), source)

    def forward(self, batch: Batch, alignment: Alignment | None = None) -> tuple[Tensor, Metrics]:
        """L1 loss of the normalised chunk, or cross-entropy of the action tokens and </s>.

        Raises:
            DataError: a key is missing from the batch, or has another shape than the config says.
        """
        shape = (len(batch.get(ACTION, ())), self.config.chunk, self.config.action_dim)
        actions = self.to_model(vector(batch, ACTION, self._device, shape))
        is_pad = batch.get("action_is_pad")
        is_pad = torch.zeros(shape[:2], dtype=torch.bool) if is_pad is None else is_pad
        is_pad = is_pad.to(actions.device, torch.bool)
        targets = self.tokens.encode(actions).flatten(1)
        text = self._text(batch, targets)
        source = camera_images(batch, self.config.cameras) if alignment is None else alignment.source
        hidden = self._hidden(batch, text, source)
        if self.action_head is None:
            loss = self._token_loss(hidden, text, is_pad)
            return loss, {"action_ce": loss.detach()}
        read = gather(hidden, self._before(text))
        with self._head_precision():
            loss = regression_loss(self.action_head, read, actions, is_pad, self._head_dtype)
        return loss, {"action_l1": loss.detach()}

    def act(self, observations: Sequence[Observation], generator: Generators = None) -> Tensor:
        """Action chunks in environment units, (B, chunk, action_dim) float32 on the CPU; deterministic.

        Raises:
            DataError: an observation lacks a camera or has a state of another size.
        """
        return self.to_environment(self.act_normalised(observations)).float().cpu()

    @torch.no_grad()
    def act_normalised(self, observations: Sequence[Observation]) -> Tensor:
        """The actions of `act` before they get units and the gripper is binarised."""
        with evaluating(self):
            batch = pictures.collate(observations, self.config)
            return self._autoregress(batch) if self._causal else self._act_parallel(batch)

    @property
    def vision_tower(self) -> VisionTower:
        """DINOv2 beside SigLIP, before the projector."""
        return VisionTower(self.vision, self.config.dino[0] + self.config.siglip[0])

    # ---- units

    def to_model(self, actions: Tensor) -> Tensor:
        """Raw actions (..., A) -> normalised float32; the gripper to 0 close, 1 open."""
        actions = actions.double()
        if self.config.gripper == "libero":
            actions = torch.cat([actions[..., :-1], 1 - actions[..., -1:].clamp(0, 1)], dim=-1)
        return self.action_bounds.normalize(actions).float()

    def to_environment(self, values: Tensor) -> Tensor:
        """Normalised actions (..., A) -> raw float64; the gripper to -1 open or +1 close."""
        raw = self.unnormalize(values)
        if self.config.gripper == "libero":
            raw = torch.cat([raw[..., :-1], -torch.sign(2 * raw[..., -1:] - 1)], dim=-1)
        return raw

    def unnormalize(self, values: Tensor) -> Tensor:
        """Normalised actions (..., A) -> raw float64, the gripper as the model has it."""
        return self.action_bounds.denormalize(values.to(self.action_bounds.low.device))

    # ---- from embeddings to actions

    def visual(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """(B, V, 6, H, W) normalised pixels -> projected patches (B, V x N, W)."""
        rows = None if language is None else language.repeat_interleave(pixels.shape[1], dim=0)
        with self._precision():
            features = self.vision(pixels.flatten(0, 1).to(self._dtype), rows)
            return self.projector(features).unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def embed(self, pixels: Tensor, text: TextTokens, state: Tensor | None) -> Tensor:
        """The whole sequence, (B, L, W).

        Args:
            pixels: (B, V, 6, H, W).
            text: prompt, action tokens (their embeddings are zeroed in parallel decoding), padding.
            state: (B, D) normalised, or None.
        """
        words = self.llm.embed_tokens(text.ids)
        language = None
        if self.config.film:
            spoken = (text.keep & ~text.actions)[..., None]
            language = (words * spoken).sum(1) / spoken.sum(1)
        if not self._causal:
            words = words * ~text.actions[..., None]
            if self.config.action_queries == "sinusoid":
                queries = sinusoids(text.positions.shape[1], self.config.width).to(words)
                where = text.positions[..., None].expand(-1, -1, self.config.width)
                words = words.scatter_add(1, where, queries.expand(len(words), -1, -1))
        parts = [words[:, :1], self.visual(pixels, language)]
        if self.proprio_projector is not None:
            assert state is not None
            with self._head_precision():
                parts.append(self.proprio_projector(state.float())[:, None].to(words))
        return torch.cat([*parts, words[:, 1:]], dim=1)

    def decode(self, embedded: Tensor, text: TextTokens, present: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (B, L, W); views not `present` (B, V) are not attended to."""
        seen = text.keep.new_ones(len(text.ids), self.config.visual_tokens)
        if present is not None:
            seen[:, : present.shape[1] * self.config.grid**2] = present.repeat_interleave(
                self.config.grid**2, dim=1
            )
        keep = torch.cat([text.keep[:, :1], seen, text.keep[:, 1:]], dim=1)
        with self._precision():
            return self.llm(embedded, keep, causal=self._causal)

    def predict(self, hidden: Tensor) -> Tensor:
        """Hidden states at the action positions (B, T x A, W) -> normalised actions (B, T, A) float32."""
        assert self.action_head is not None
        with self._head_precision():
            return self.action_head(hidden.to(self._head_dtype).float()).float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits, (..., vocab) float32."""
        return self.lm_head(hidden).float()

    # ---- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the published layout; see `checkpoint`."""
        from spatial_forcing.students.openvla_oft.checkpoint import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, statistics: str | None = None) -> Self:
        """Read a published checkpoint (folder or hub id) or what `save_pretrained` wrote.

        Args:
            folder: the folder, or a hub id like "moojink/openvla-7b-oft-finetuned-libero-spatial".
            statistics: name of the dataset whose statistics are used; default: the only one there is.

        Raises:
            CheckpointError: files, keys or shapes that do not fit, or statistics that are not there.
        """
        from spatial_forcing.students.openvla_oft.checkpoint import load

        return load(cls, folder, statistics=statistics)

    @classmethod
    def statistics_names(cls, folder: str | Path) -> tuple[str, ...]:
        """The datasets in `dataset_statistics.json` (or `norm_stats` of `config.json`)."""
        return tuple(read_statistics(Path(folder), read_config(folder, MODEL_TYPE)))

    @classmethod
    def with_statistics(cls, folder: str | Path, statistics: str) -> Self:
        """See `from_pretrained`."""
        return cls.from_pretrained(folder, statistics=statistics)

    @classmethod
    def from_base(cls, place: str | Path, settings: Mapping[str, Any]) -> Self:
        """The student of `settings` on the weights in `place`, which may lack heads and statistics."""
        from spatial_forcing.students.openvla_oft.checkpoint import load

        return load(cls, place, config=OpenVLAOFTConfig(**settings))

    @classmethod
    def fine_tune(cls, place: str | Path, config: OpenVLAOFTConfig, stats: Stats, *, seed: int = 0) -> Self:
        """`config` on the weights in `place`, with a dataset's statistics; missing heads are new."""
        from spatial_forcing.students.openvla_oft.checkpoint import load

        student = load(cls, place, config=config, seed=seed)
        student.fit(stats)
        return student

    # ---- inside

    @property
    def _causal(self) -> bool:
        return self.config.decoding == "autoregressive"

    @property
    def _dtype(self) -> torch.dtype:
        return self.llm.embed_tokens.weight.dtype

    @property
    def _device(self) -> torch.device:
        return self.llm.embed_tokens.weight.device

    @property
    def _head_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.config.head_dtype)
        return dtype

    def _precision(self) -> Any:
        """Adapters are float32; on half-precision weights they compute in the weights' type."""
        half = self._dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self._device.type, dtype=self._dtype if half else None, enabled=half)

    def _head_precision(self) -> Any:
        half = self.config.head_dtype == "bfloat16"
        return torch.autocast(self._device.type, dtype=torch.bfloat16 if half else None, enabled=half)

    def _before(self, text: TextTokens) -> Tensor:
        """(B, T x A) positions in the sequence whose hidden states predict the action tokens."""
        return text.positions + self.config.visual_tokens - 1

    def _token_loss(self, hidden: Tensor, text: TextTokens, is_pad: Tensor) -> Tensor:
        before = self._before(text)
        before = torch.cat([before, before[:, -1:] + 1], dim=1)
        positions = torch.cat([text.positions, text.positions[:, -1:] + 1], dim=1)
        labels = text.ids.gather(1, positions)
        ignored = F.pad(is_pad.repeat_interleave(self.config.action_dim, dim=1), (0, 1))
        return F.cross_entropy(
            self.logits(gather(hidden, before)).flatten(0, 1), labels.masked_fill(ignored, -100).flatten()
        )

    def _act_parallel(self, batch: Batch) -> Tensor:
        count = self.config.chunk * self.config.action_dim
        text = self._text(batch, torch.zeros(len(batch["task"]), count, dtype=torch.long))
        source = camera_images(batch, self.config.cameras)
        hidden = gather(self._hidden(batch, text, source), self._before(text))
        if self.action_head is not None:
            return self.predict(hidden)
        return self.tokens.decode(self.logits(hidden).argmax(-1)).unflatten(1, (-1, self.config.action_dim))

    def _autoregress(self, batch: Batch) -> Tensor:
        """Greedy, one token a pass; each pass runs the whole sequence again."""
        tokens = torch.zeros(len(batch["task"]), 0, dtype=torch.long, device=self._device)
        source = camera_images(batch, self.config.cameras)
        for count in range(self.config.action_dim):
            text = self._text(batch, torch.cat([tokens, tokens.new_zeros(len(tokens), 1)], dim=1), stop=False)
            hidden = self._hidden(batch, text, source)
            last = gather(hidden, self._before(text)[:, count : count + 1])
            tokens = torch.cat([tokens, self.logits(last).argmax(-1)], dim=1)
        return self.tokens.decode(tokens)[:, None]

    def _text(self, batch: Batch, actions: Tensor, *, stop: bool = True) -> TextTokens:
        texts = batch.get("task")
        if texts is None or isinstance(texts, str) or len(texts) != len(actions):
            raise DataError(f"the batch has {len(actions)} samples and task {texts!r}; expected as many.")
        return assemble([self.prompts.encode(task) for task in texts], actions.to(self._device), stop=stop)

    def _hidden(self, batch: Batch, text: TextTokens, source: CameraImages) -> Tensor:
        images = source.own(partial(pictures.resize, size=self.config.image_size), self._device)
        present = source.present.to(self._device)
        state = None
        if self.state_bounds is not None:
            raw = vector(batch, STATE, self._device, (len(text.ids), self.config.state_dim))
            state = self.state_bounds.normalize(raw)
        return self.decode(self.embed(self.vision.pixels(images), text, state), text, present)


STUDENTS.add(MODEL_TYPE, OpenVLAOFT)
