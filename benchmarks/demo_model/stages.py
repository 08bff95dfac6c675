"""The four stages: what each learns, from what, and the numbers and pictures it closes with.

    vae      pixels -> latents -> pixels
    vision   pixels -> one code a 32 x 32 cell, such that a small decoder can draw the poster's layout from the codes
    ar       prompt -> preview codes -> target codes; for edits source codes and prompt -> target codes
    dit      noise, codes and spelled words -> latents; for edits the source's keys and values too

A stage reads the earlier ones' weights from the folder and leaves its own there. The last posters of the data are never
trained on; the closing numbers are theirs. Nothing is quantised anywhere, and nothing is chosen by a quantised score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qruntime.prompt import BYT5_FIRST_BYTE

from .ar import Drafter
from .config import Parts, Sizes
from .data import HELD, Data
from .dit import Painter, normalised
from .draw import decode, denoise, draft, glyph_states, no_glyphs, psnr, sheet, upsampled
from .glyph import GlyphEncoder
from .layers import Linear, initialise
from .loop import Box, Recipe, train
from .sequences import Prompts
from .store import load_into, parts_of, save_state, write_facts
from .vae import Resnet, Vae
from .vision import Codebook, Eye, Sketcher
from .world import MAX_LETTERS

QUIET = 0.3  # scale of what a residual branch adds at first
STEPS = 30  # of denoising, in what a stage draws at its end
_CHUNK = 256  # pictures a batch where nothing is learned


@dataclass(frozen=True)
class Run:
    """What every stage is given. `compiled` asks for compiled blocks; `scale` divides batch sizes and `samples` is how
    many pictures are drawn at the end, both for tests."""

    folder: Path
    sizes: Sizes
    device: torch.device
    seed: int
    say: Callable[[str], None]
    compiled: bool = True
    scale: int = 1
    samples: int = 16

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def generator(self, stage: str) -> torch.Generator:
        """The stage's own stream of random numbers, on the device."""
        order = ("vae", "vision", "ar", "dit")
        return torch.Generator(self.device).manual_seed(1000 * self.seed + order.index(stage))

    def compile(self, blocks: nn.ModuleList) -> None:
        """Compile blocks one by one: they share a form, so the compiler works once and not once a block."""
        if self.compiled:
            torch._dynamo.config.suppress_errors = True  # a block that cannot be compiled runs as it is
            for block in blocks:
                block.compile(dynamic=False)

    def finish(self, stage: str, numbers: dict[str, float]) -> dict[str, float]:
        write_facts(self.folder, **{stage: {key: round(value, 5) for key, value in numbers.items()}})
        self.say(f"{stage} done: " + ", ".join(f"{key} {value:.5g}" for key, value in numbers.items()))
        return numbers


def as_pixels(pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in -1..1."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(dtype).contiguous()


def as_tones(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in 0..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255.0


def _save_sheet(run: Run, name: str, pictures: Tensor, columns: int) -> None:
    sheet(pictures.float().cpu(), columns).save(run.folder / f"{name}.png")


# VAE

CROPS_UNTIL = 0.6  # share of the time that sees quarters of pictures, four times as many
KL_WEIGHT = 1e-3
FIRST_LOG_VARIANCE = -4.0  # of the latents: a posterior as wide as the prior would hide everything at first
EDGE_WEIGHT, EDGES_FROM = 1.0, 0.25  # letters must be sharp, but colours come first


def train_vae(run: Run, pictures: Tensor, box: Box) -> dict[str, float]:
    sizes, generator = run.sizes, run.generator("vae")
    vae = Vae(Parts.of(sizes).vae).to(run.device)  # the statistics of its latents come last
    initialise(vae, generator)
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 0.1
        for module in vae.modules():
            if isinstance(module, Resnet):
                module.conv2.weight *= 0.2
        vae.encoder.conv_out.weight[sizes.latent_channels :] *= 0.1
        vae.encoder.conv_out.bias[sizes.latent_channels :] = FIRST_LOG_VARIANCE
    side = sizes.side
    recipe = Recipe(lr=5e-4, batch=max(128 // run.scale, 4), weight_decay=0.0, average=200.0)

    def step(share: float) -> dict[str, Tensor]:
        size, batch = (side // 2, recipe.batch) if share < CROPS_UNTIL else (side, recipe.batch // 4)
        index = torch.randint(len(pictures) - HELD, (batch,), generator=generator, device=run.device)
        top, left = (int(i) for i in torch.randint((side - size) // 8 + 1, (2,)) * 8)
        wanted = as_pixels(pictures[index, top : top + size, left : left + size], run.dtype)
        mean, log_variance = vae.moments(wanted)
        noise = torch.randn(mean.shape, generator=generator, device=run.device, dtype=mean.dtype)
        latents = mean + noise * (0.5 * log_variance).exp()
        found, wanted = vae.decoder(latents).float(), wanted.float()
        mean, log_variance = mean.float(), log_variance.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        error = found - wanted
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        edges = EDGE_WEIGHT * (0.2 if share < EDGES_FROM else 1.0) * edges
        loss = error.abs().mean() + error.square().mean() + edges + KL_WEIGHT * kl
        return {"loss": loss, "mse": error.square().mean(), "kl": kl}

    numbers = train("vae", {"vae": vae}, step, box, recipe, run.say)
    save_state(run.folder, "vae", vae.state_dict())
    load_into(vae, run.folder, "vae")  # as it will be exported
    mean, std = _latent_statistics(run, vae, pictures)
    write_facts(run.folder, latents_mean=mean, latents_std=std)
    vae = open_vae(run)
    held = pictures[-HELD:]
    drawn = decode(vae, encode(run, vae, held), run.dtype)
    numbers["psnr"] = psnr(drawn, as_tones(held))
    _save_sheet(run, "vae", torch.cat((as_tones(held[:8]), drawn[:8])), 8)
    return run.finish("vae", numbers)


def open_vae(run: Run) -> Vae:
    return load_into(Vae(parts_of(run.folder, run.sizes).vae), run.folder, "vae").to(run.device)  # type: ignore[return-value]


@torch.no_grad()
def encode(run: Run, vae: Vae, pictures: Tensor) -> Tensor:
    """Normalised latents of uint8 pictures."""
    return torch.cat([vae.encode(as_pixels(part, run.dtype)) for part in pictures.split(_CHUNK)])


@torch.no_grad()
def _latent_statistics(run: Run, vae: Vae, pictures: Tensor) -> tuple[list[float], list[float]]:
    latents = encode(run, vae, pictures[:2048]).float()  # the module's own statistics are still 0 and 1
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return [round(float(m), 6) for m in mean], [round(max(float(s), 1e-3), 6) for s in std]


# Vision and codebook

SKETCH_SIDE = 8  # pixels a code in what the decoder draws: the picture at a quarter
COMMITMENT = 0.25
LABEL_WEIGHT = 0.05
CODE_MEMORY = 0.99  # of the codebook's running averages
FREE_UNTIL = 0.3  # share of the time without a codebook, in which the tower learns what there is to say
FREE_NOISE = 0.03  # what stands in for the codebook's coarseness there
REVIVE_EVERY, REVIVE_UNTIL, REVIVE_BELOW = 25, 0.7, 0.01
FIT_ROUNDS, FIT_STEPS, FIT_POINTS = 16, 12, 100_000
MOSAICS = 0.5  # share of batches in which a part of each picture comes from another one


def train_vision(run: Run, data: Data, box: Box) -> dict[str, float]:
    sizes, generator = run.sizes, run.generator("vision")
    config = parts_of(run.folder, sizes).ar
    eye = Eye(config).to(run.device)
    sketcher = Sketcher(config.vision, depth=3, side=SKETCH_SIDE, labels=data.label_count).to(run.device)
    for module in (eye, sketcher):
        initialise(module, generator)
    with torch.no_grad():
        for table in (eye.tower.embeddings["position_embedding"], sketcher.positions):
            table.weight *= 0.5
        for block in (*eye.tower.blocks, *sketcher.blocks):
            block.attn.proj.weight *= QUIET
            block.mlp["fc2"].weight *= QUIET
        sketcher.pixels.weight *= 0.1
    codebook = eye.codebook
    codebook.table.requires_grad_(False)
    averages = _Averages(torch.ones(sizes.codes, device=run.device), F.normalize(codebook.table, dim=-1))
    recipe = Recipe(lr=1.4e-3, batch=max(256 // run.scale, 4), weight_decay=0.02)
    scales = ((data.eyes, data.eye_labels, sizes.grid), (data.previews, data.preview_labels, sizes.preview_grid))
    done, fitted = 0, False

    def step(share: float) -> dict[str, Tensor]:
        nonlocal done, fitted
        if not fitted and share >= FREE_UNTIL:
            _fit(codebook, averages, _points(run, eye, scales), generator)
            fitted = True
        index = torch.randint(len(data.eyes) - HELD, (recipe.batch,), generator=generator, device=run.device)
        total: dict[str, Tensor] = {}
        seen = []
        for pictures, labels, grid in scales:
            views, marks = as_pixels(pictures[index], run.dtype), labels[index].long()
            if torch.rand(()) < MOSAICS:
                views, marks = _mosaic(views, marks, grid)
            points = eye.points(views)
            if fitted:
                with torch.no_grad():
                    codes = codebook.nearest(points)
                    nearest = codebook.table[codes]
                seen.append((points.detach().flatten(0, 1), codes.flatten()))
                passed = points + (nearest - points).detach()
            else:
                nearest = points.detach()
                noise = torch.randn(points.shape, generator=generator, device=run.device)
                passed = F.normalize(points + FREE_NOISE * noise, dim=-1)
            drawn, logits = sketcher(codebook.features(passed, run.dtype), grid, grid)
            numbers = _sketch_errors(drawn, logits, views, marks)
            numbers["commit"] = (points - nearest).square().sum(-1).mean()
            loss = (
                numbers["l1"] + 4 * numbers["mse"] + LABEL_WEIGHT * numbers["labels"] + COMMITMENT * numbers["commit"]
            )
            for key, value in {"loss": loss, **numbers}.items():
                total[key] = total.get(key, 0) + value / len(scales)
        done += 1
        if fitted:
            points, codes = (torch.cat(parts) for parts in zip(*seen, strict=True))
            averages.follow(codebook, points, codes)
            if done % REVIVE_EVERY == 0 and share < REVIVE_UNTIL:
                averages.revive(codebook, points, generator)
        return total

    numbers = train("vision", {"eye": eye, "sketcher": sketcher}, step, box, recipe, run.say)
    save_state(run.folder, "vision", eye.state_dict())
    eye = open_eye(run)
    tones = []
    with torch.no_grad():
        for name, (pictures, labels, grid) in zip(("target", "preview"), scales, strict=True):
            views, marks = as_pixels(pictures[-HELD:], run.dtype), labels[-HELD:].long()
            codes = eye.codes(views)
            states = codebook.features(eye.codebook.table[codes], run.dtype)
            drawn, logits = sketcher(states, grid, grid)
            found = _sketch_errors(drawn, logits, views, marks)
            numbers |= {f"{name}_{key}": float(value) for key, value in found.items()}
            marked = marks > 0
            right = (logits.argmax(-1) == marks)[marked].float().mean() if marked.any() else torch.zeros(())
            numbers[f"{name}_labels_right"] = float(right)
            wanted = F.avg_pool2d(views.float(), views.shape[2] // drawn.shape[2])
            pair = torch.cat((wanted[:8], drawn[:8].float())) / 2 + 0.5
            tones.append(F.interpolate(pair.clamp(0, 1), size=(sizes.side, sizes.side)))
    _save_sheet(run, "vision", torch.cat(tones), 8)
    used = torch.bincount(encode_codes(run, eye, data.eyes[:4096]).flatten(), minlength=sizes.codes).float()
    chance = used / used.sum()
    numbers["codes_used"] = float((used > 0).sum())
    numbers["perplexity"] = float((-(chance * chance.clamp_min(1e-12).log()).sum()).exp())
    return run.finish("vision", numbers)


def open_eye(run: Run) -> Eye:
    return load_into(Eye(parts_of(run.folder, run.sizes).ar), run.folder, "vision").to(run.device)  # type: ignore[return-value]


@torch.no_grad()
def encode_codes(run: Run, eye: Eye, views: Tensor) -> Tensor:
    """Codes [N, cells] of halved uint8 pictures."""
    return torch.cat([eye.codes(as_pixels(part, run.dtype)) for part in views.split(_CHUNK)])


def _sketch_errors(drawn: Tensor, logits: Tensor, views: Tensor, marks: Tensor) -> dict[str, Tensor]:
    wanted = F.avg_pool2d(views.float(), views.shape[2] // drawn.shape[2])
    error = drawn.float() - wanted
    labels = F.cross_entropy(logits.float().flatten(0, 1), marks.flatten())
    return {"l1": error.abs().mean(), "mse": error.square().mean(), "labels": labels}


def _mosaic(views: Tensor, marks: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Put a rectangle of whole cells of the next picture of the batch into each picture.

    A code that describes what is far from its cell would be wrong then: codes stay local, so that an edit changes few.
    """
    height, width = (int(i) for i in torch.randint(max(grid // 4, 1), grid, (2,)))
    top, left = int(torch.randint(grid - height + 1, ())), int(torch.randint(grid - width + 1, ()))
    cell = views.shape[2] // grid
    views, marks = views.clone(), marks.view(-1, grid, grid).clone()
    rows, columns = slice(top * cell, (top + height) * cell), slice(left * cell, (left + width) * cell)
    views[..., rows, columns] = views.roll(1, 0)[..., rows, columns]
    rows, columns = slice(top, top + height), slice(left, left + width)
    marks[:, rows, columns] = marks.roll(1, 0)[:, rows, columns]
    return views, marks.flatten(1)


@dataclass
class _Averages:
    """Running counts [K] and sums [K, d] of the points nearest to each code, which move the codebook (van den Oord et
    al., 2017, appendix A)."""

    counts: Tensor
    sums: Tensor

    @torch.no_grad()
    def follow(self, codebook: Codebook, points: Tensor, codes: Tensor) -> None:
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, points)
        self.counts.lerp_(counts, 1 - CODE_MEMORY)
        self.sums.lerp_(sums, 1 - CODE_MEMORY)
        codebook.table.copy_(F.normalize(self.sums, dim=-1))

    @torch.no_grad()
    def revive(self, codebook: Codebook, points: Tensor, generator: torch.Generator) -> None:
        """Put codes that are hardly used where points are that are far from their code."""
        mean = self.counts.mean()
        dead = self.counts < REVIVE_BELOW * mean
        distance = (points - codebook.table[codebook.nearest(points)]).square().sum(-1) + 1e-9
        fresh = points[_drawn(distance, len(self.counts), generator)]
        self.sums.copy_(torch.where(dead[:, None], fresh * mean, self.sums))
        self.counts.copy_(torch.where(dead, mean, self.counts))
        codebook.table.copy_(F.normalize(self.sums, dim=-1))


def _drawn(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices, by inverse CDF: torch's own draw takes 2^24 weights at most, and is slow."""
    edges = weights.double().cumsum(0)
    draws = torch.rand(count, generator=generator, device=weights.device, dtype=torch.float64) * edges[-1]
    return torch.searchsorted(edges, draws).clamp_max(len(weights) - 1)


@torch.no_grad()
def _points(run: Run, eye: Eye, scales: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
    """What the tower makes of the first posters at every size, [N, d]."""
    found = []
    for pictures, _, grid in scales:
        count = min(FIT_POINTS // (len(scales) * grid * grid) + 1, len(pictures))
        found += [eye.points(as_pixels(part, run.dtype)).flatten(0, 1) for part in pictures[:count].split(_CHUNK)]
    return torch.cat(found)


@torch.no_grad()
def _fit(codebook: Codebook, averages: _Averages, points: Tensor, generator: torch.Generator) -> None:
    """A first codebook: points far from those chosen before (k-means++ in rounds), then Lloyd's steps."""
    size = len(codebook.table)
    chosen = points[_drawn(torch.ones_like(points[:, 0]), 1, generator)]
    distance = (points - chosen).square().sum(-1)
    for done in range(FIT_ROUNDS):
        wanted = (size - 1) * (done + 1) // FIT_ROUNDS + 1 - len(chosen)
        fresh = points[_drawn(distance + 1e-9, wanted, generator)]
        chosen = torch.cat((chosen, fresh))
        distance = torch.minimum(distance, (2 - 2 * points @ fresh.T).clamp_min(0).amin(1))
    codebook.table.copy_(chosen)
    for _ in range(FIT_STEPS):
        codes = codebook.nearest(points)
        counts = torch.zeros_like(averages.counts).index_add_(0, codes, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(averages.sums).index_add_(0, codes, points)
        moved = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), codebook.table)
        codebook.table.copy_(moved)
    # As if each code had been seen a little: the averages then follow at their own pace.
    averages.counts.copy_(counts.clamp_min(1.0))
    averages.sums.copy_(codebook.table * averages.counts[:, None])


# AR

EDIT_EVERY_AR = 4  # one batch in so many is of edits
FRESH_EVERY = 16  # steps between looks at what is rendered


@dataclass(frozen=True)
class _Drafts:
    """What the drafting model learns from: prompts, the codes [N, drafted] behind them, a source picture's codes."""

    prompts: Prompts
    codes: Tensor
    sources: Tensor | None

    @staticmethod
    def of_texts(run: Run, eye: Eye, data: Data) -> _Drafts:
        codes = [encode_codes(run, eye, views) for views in (data.previews, data.eyes)]
        return _Drafts(data.prompts, torch.cat(codes, dim=1), None)

    @staticmethod
    def of_edits(run: Run, eye: Eye, data: Data) -> _Drafts:
        sources, codes = (encode_codes(run, eye, views) for views in (data.edit_source_eyes, data.edit_target_eyes))
        return _Drafts(data.edit_prompts, codes, sources)

    def take(self, index: Tensor) -> _Drafts:
        return _Drafts(
            self.prompts.take(index), self.codes[index], None if self.sources is None else self.sources[index]
        )

    def split(self, held: int) -> tuple[_Drafts, _Drafts]:
        """All but the last `held`, and those."""
        index = torch.arange(len(self.codes), device=self.codes.device)
        return self.take(index[:-held]), self.take(index[-held:])

    def extended(self, others: _Drafts) -> _Drafts:
        """With others whose prompts are no longer than the longest here, so that shapes stay the same."""
        kept = (others.prompts.lengths <= self.prompts.ids.shape[1]).nonzero()[:, 0]
        sources = None
        if self.sources is not None and others.sources is not None:
            sources = torch.cat((self.sources, others.sources[kept]))
        codes = torch.cat((self.codes, others.codes[kept]))
        return _Drafts(self.prompts.extended(others.prompts, kept), codes, sources)


def train_ar(run: Run, data: Data, box: Box, fresh: Callable[[], Data | None]) -> dict[str, float]:
    """`fresh()` gives further posters and edits when some are rendered; they join those of `data`."""
    sizes, generator = run.sizes, run.generator("ar")
    eye = open_eye(run)
    texts, held_texts = _Drafts.of_texts(run, eye, data).split(HELD)
    edits, held_edits = _Drafts.of_edits(run, eye, data).split(HELD)
    drafter = Drafter(parts_of(run.folder, sizes).ar).to(run.device)
    initialise(drafter, generator)
    with torch.no_grad():
        drafter.lm_head.weight *= 0.1
        for layer in drafter.layers:
            for norm in (layer.post_self_attn_layernorm, layer.post_mlp_layernorm):
                norm.weight.fill_(QUIET)
    run.compile(drafter.layers)
    recipe = Recipe(lr=2e-3, batch=max(512 // run.scale, 4), weight_decay=0.05)
    done = 0

    def loss_of(drafts: _Drafts) -> tuple[Tensor, Tensor]:
        """Losses and hits [B, drafted + 1]: of every code, and of the end."""
        ids, positions, heads = drafts.prompts.sequences(drafts.codes, drafts.sources)
        states = drafter.states(ids, positions, run.dtype)
        states = states.gather(1, heads[..., None].expand(-1, -1, states.shape[-1]))
        logits = drafter.logits(states)
        wanted = F.pad(drafts.codes, (0, 1), value=sizes.codes + 1)
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return losses, logits.argmax(-1) == wanted

    def step(share: float) -> dict[str, Tensor]:
        nonlocal done, texts, edits
        if done % FRESH_EVERY == 0 and (more := fresh()) is not None:
            texts = texts.extended(_Drafts.of_texts(run, eye, more))
            edits = edits.extended(_Drafts.of_edits(run, eye, more))
        done += 1
        pool = edits if done % EDIT_EVERY_AR == 0 else texts
        index = torch.randint(len(pool.codes), (recipe.batch,), generator=generator, device=run.device)
        return {"loss": loss_of(pool.take(index))[0].mean()}

    numbers = train("ar", {"ar": drafter}, step, box, recipe, run.say)
    numbers |= {"texts": float(len(texts.codes)), "edits": float(len(edits.codes))}
    save_state(run.folder, "ar", drafter.state_dict())
    load_into(drafter, run.folder, "ar")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, drafts in (("text", held_texts), ("edit", held_edits)):
            losses, hits = loss_of(drafts)
            cells = slice(-1 - sizes.grid**2, -1)
            numbers[f"{name}_target_loss"] = float(losses[:, cells].mean())
            numbers[f"{name}_target_right"] = float(hits[:, cells].float().mean())
            if drafts.sources is None:
                previews = slice(sizes.preview_grid**2)
                numbers["text_preview_loss"] = float(losses[:, previews].mean())
                numbers["text_preview_right"] = float(hits[:, previews].float().mean())
    return run.finish("ar", numbers)


def open_drafter(run: Run) -> Drafter:
    return load_into(Drafter(parts_of(run.folder, run.sizes).ar), run.folder, "ar").to(run.device)  # type: ignore[return-value]


# DiT and ByT5

EDIT_EVERY_DIT = 6
DROP = 0.1  # share of samples that lose glyphs and codes, which is what guidance compares with
WRONG_CODES = 0.08  # share of codes that are another poster's in some samples: drafts are not perfect either, and the
WRONG_SAMPLES = 0.3  # spelling is to come from the glyphs
DETAIL_WEIGHT = 3.0  # how much more a latent counts where the picture is not flat
DETAIL_STEP = 24  # levels of 255 between neighbouring pixels that are detail
PROBED_BLOCK = 5  # of eight: how many blocks must be enough to know which letter a token shows
HINT_WEIGHT = 0.15
SPELLING_STEPS, SPELLING_RATE = 1500, 2e-3  # in which the glyph encoder learns alone


class _Hints(nn.Module):
    """What the transformer and the glyph encoder are also asked while they learn, and what answers; thrown away.

    Velocity alone teaches spelling slowly: that a stroke is wrong says little about which letter was to be read where.
    """

    def __init__(self, parts: Parts, labels: int) -> None:
        super().__init__()
        self.labels = Linear(parts.dit.width, labels)
        self.letters = Linear(parts.glyph.d_model, parts.glyph.vocab_size)
        self.places = Linear(parts.glyph.d_model, MAX_LETTERS**2)

    def shown(self, tokens: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        """The loss of naming the letter that each image token [B, N, width] shows, where `asked` [B]."""
        losses = F.cross_entropy(self.labels(normalised(tokens)).float().mT, labels, reduction="none")
        return (losses.mean(1) * asked).mean()

    def spelled(self, states: Tensor, ids: Tensor) -> Tensor:
        """The loss of naming letter, place and length of word from each glyph state [B, N, d_model].

        ids [B, texts, T] with texts * T = N.
        """
        states = states.view(*ids.shape, -1)
        letters = ids >= BYT5_FIRST_BYTE
        places = MAX_LETTERS * (letters.sum(-1, keepdim=True) - 1) + letters.cumsum(-1) - 1
        total = torch.zeros((), device=states.device)
        for head, wanted in ((self.letters, ids), (self.places, places)):
            marks = torch.where(letters, wanted, -100).flatten()
            total = total + F.cross_entropy(head(states).float().flatten(0, -2), marks, reduction="sum")
        return total / letters.sum().clamp_min(1)


def train_dit(run: Run, data: Data, box: Box) -> dict[str, float]:
    sizes, generator = run.sizes, run.generator("dit")
    vae, eye = open_vae(run), open_eye(run)
    texts = _Paintings.of(run, vae, eye, data.pictures, data.eyes, data.glyphs, data.patch_labels)
    targets = data.edit_targets, data.edit_target_eyes, data.edit_glyphs, data.edit_patch_labels
    edits = _Paintings.of(run, vae, eye, *targets)
    source_latents, source_codes = encode(run, vae, data.edit_sources), encode_codes(run, eye, data.edit_source_eyes)
    parts = parts_of(run.folder, sizes)
    painter, encoder = Painter(parts.dit).to(run.device), GlyphEncoder(parts.glyph).to(run.device)
    hints = _Hints(parts, data.label_count).to(run.device)
    for module in (painter, encoder, hints):
        initialise(module, generator)
    _quiet_start(painter, encoder)
    spelled = _learn_to_spell(run, encoder, hints, texts.glyphs)
    run.say(f"dit: letters and places from glyph states, loss {spelled:.4f}")
    run.compile(painter.transformer_blocks)
    recipe = Recipe(lr=1.4e-3, batch=max(256 // run.scale, 4), weight_decay=0.02, average=800.0)
    probed = min(PROBED_BLOCK, len(painter.transformer_blocks))
    done = 0

    def losses(index: Tensor, levels: Tensor, from_source: bool, *, learning: bool) -> dict[str, Tensor]:
        """The weighted squared error of the velocity at noise levels [B], and those of the hints."""
        batch = len(index)
        chosen = edits if from_source else texts
        wanted = chosen.latents[index].float()
        noise = torch.randn(wanted.shape, generator=generator, device=run.device)
        level = levels.view(-1, 1, 1, 1)
        noisy = ((1 - level) * wanted + level * noise).to(run.dtype)
        codes, glyphs = chosen.codes[index], chosen.glyphs[index]
        kept = torch.ones(batch, dtype=torch.bool, device=run.device)
        condition = None
        if from_source:
            seen = upsampled(source_codes[index], sizes.grid)
            condition = painter.condition(source_latents[index], seen, padding=glyphs.flatten(1).shape[1])
        elif learning:
            kept = torch.rand(batch, generator=generator, device=run.device) >= DROP
            glyphs = torch.where(kept[:, None, None], glyphs, no_glyphs(glyphs))
        if learning:
            codes = _with_wrong_codes(codes, generator)
        states, used = glyph_states(encoder, glyphs, run.dtype)
        codes, timesteps, seen_tokens = upsampled(codes, sizes.grid), 1000 * levels - 1, []
        found = painter(noisy, states, used, codes, kept, timesteps, condition, seen_tokens).float()
        weight = 1 + DETAIL_WEIGHT * chosen.detail[index][:, None].float()
        error = ((found - (noise - wanted)).square() * weight).flatten(1).mean(1) / weight.flatten(1).mean(1)
        return {
            "velocity": error.mean(),
            "shown": hints.shown(seen_tokens[probed - 1], chosen.labels[index].long(), kept),
            "spelled": hints.spelled(states, glyphs),
        }

    def step(share: float) -> dict[str, Tensor]:
        nonlocal done
        done += 1
        from_source = done % EDIT_EVERY_DIT == 0
        pool = len((edits if from_source else texts).latents) - HELD
        batch = recipe.batch // 2 if from_source else recipe.batch  # an edit costs twice as much
        index = torch.randint(pool, (batch,), generator=generator, device=run.device)
        found = losses(index, _levels(batch, generator), from_source, learning=True)
        return {"loss": found["velocity"] + HINT_WEIGHT * (found["shown"] + found["spelled"]), **found}

    numbers = train("dit", {"dit": painter, "glyph": encoder, "hints": hints}, step, box, recipe, run.say)
    for name, module in (("dit", painter), ("glyph", encoder)):
        save_state(run.folder, name, module.state_dict())
        load_into(module, run.folder, name)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, pool, from_source in (("text", texts, False), ("edit", edits, True)):
            index = torch.arange(len(pool.latents) - HELD, len(pool.latents), device=run.device)
            for level in (0.9, 0.5, 0.1):
                levels = torch.full((HELD,), level, device=run.device)
                found = losses(index, levels, from_source, learning=False)
                numbers[f"{name}_loss_at_{level}"] = float(found["velocity"])
                numbers[f"{name}_shown_at_{level}"] = float(found["shown"])
    return run.finish("dit", numbers)


def _learn_to_spell(run: Run, encoder: GlyphEncoder, hints: _Hints, glyphs: Tensor) -> float:
    """Let each glyph state name its letter and the letter's place, before anything is painted; the last loss.

    Without it the transformer finds out neither which state to read nor why it should.
    """
    parameters = [*encoder.parameters(), *hints.letters.parameters(), *hints.places.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=SPELLING_RATE, betas=(0.9, 0.98))
    steps, loss = max(SPELLING_STEPS // run.scale, 4), torch.zeros(())
    generator = torch.Generator(run.device).manual_seed(run.seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = SPELLING_RATE * min(1.0, (step + 1) / 50) * (1.0 - 0.9 * step / steps)
        index = torch.randint(len(glyphs) - HELD, (max(512 // run.scale, 4),), generator=generator, device=run.device)
        loss = hints.spelled(glyph_states(encoder, glyphs[index], run.dtype)[0], glyphs[index])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return float(loss.detach())


def _quiet_start(painter: Painter, encoder: GlyphEncoder) -> None:
    """Blocks that start as the identity, a velocity that starts at zero, and T5's unscaled scores of size one."""
    with torch.no_grad():
        for block in painter.transformer_blocks:
            block.norm1["linear"].weight.zero_()
        painter.norm_out["linear"].weight.zero_()
        painter.proj_out.weight.zero_()
        for block in encoder.encoder["block"]:
            block["layer"][0].SelfAttention.q.weight *= encoder.config.d_kv**-0.5


def _levels(batch: int, generator: torch.Generator) -> Tensor:
    """Noise levels in 0..1: half uniform, half logit-normal about 0.6, where letters take shape."""
    device = generator.device
    flat = torch.rand(batch, generator=generator, device=device)
    bell = torch.sigmoid(0.4 + torch.randn(batch, generator=generator, device=device))
    return torch.where(torch.arange(batch, device=device) % 2 == 0, flat, bell).clamp(0.001, 1.0)


def _with_wrong_codes(codes: Tensor, generator: torch.Generator) -> Tensor:
    draw = torch.rand(codes.shape, generator=generator, device=codes.device)
    sample = torch.rand(len(codes), 1, generator=generator, device=codes.device)
    return torch.where((draw < WRONG_CODES) & (sample < WRONG_SAMPLES), codes.roll(1, 0), codes)


@dataclass(frozen=True)
class _Paintings:
    """What the transformer learns from: latents [N, C, h, w], codes [N, cells], glyph ids [N, texts, T], where the
    picture is not flat [N, h, w], and which letter each token shows [N, tokens]."""

    latents: Tensor
    codes: Tensor
    glyphs: Tensor
    detail: Tensor
    labels: Tensor

    @staticmethod
    def of(run: Run, vae: Vae, eye: Eye, pictures: Tensor, views: Tensor, glyphs: Tensor, labels: Tensor) -> _Paintings:
        detail = torch.cat([_detail(part) for part in pictures.split(_CHUNK)])
        return _Paintings(encode(run, vae, pictures), encode_codes(run, eye, views), glyphs, detail, labels)


def _detail(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> bool [B, H/8, W/8]: the latent or one beside it covers an edge."""
    tones = pictures.permute(0, 3, 1, 2).float()
    across = F.pad(tones.diff(dim=3).abs(), (0, 1)).amax(1, keepdim=True)
    down = F.pad(tones.diff(dim=2).abs(), (0, 0, 0, 1)).amax(1, keepdim=True)
    edges = F.max_pool2d(torch.maximum(across, down), 8)
    return F.max_pool2d(edges, 3, stride=1, padding=1)[:, 0] > DETAIL_STEP


def draw_samples(run: Run, data: Data) -> dict[str, float]:
    """Draw held-out posters and edits with everything trained, and save them as `texts.png` and `edits.png`.

    Rows of `texts.png`: ground truth, from its own codes, from drafted codes; of `edits.png`: source, truth, drawn.
    """
    sizes, dtype, count = run.sizes, run.dtype, run.samples
    vae, eye, drafter = open_vae(run), open_eye(run), open_drafter(run)
    parts = parts_of(run.folder, sizes)
    painter = load_into(Painter(parts.dit), run.folder, "dit").to(run.device)
    encoder = load_into(GlyphEncoder(parts.glyph), run.folder, "glyph").to(run.device)
    index = torch.arange(len(data.pictures) - count, len(data.pictures), device=run.device)
    wanted, glyphs = as_tones(data.pictures[index]), data.glyphs[index]
    codes = encode_codes(run, eye, data.eyes[index])
    drafted = draft(drafter, data.prompts.take(index), None, sizes.codes, run.seed, dtype)[:, -codes.shape[1] :]
    drawn = []
    for each in (codes, drafted):
        latents = denoise(painter, encoder, upsampled(each, sizes.grid), glyphs, STEPS, run.seed, dtype)
        drawn.append(decode(vae, latents, dtype))
    _save_sheet(run, "texts", torch.cat((wanted, *drawn)), 8)
    numbers = {"psnr_own_codes": psnr(drawn[0], wanted), "psnr_drafted": psnr(drawn[1], wanted)}

    index = torch.arange(len(data.edit_targets) - count // 2, len(data.edit_targets), device=run.device)
    source = encode_codes(run, eye, data.edit_source_eyes[index])
    drafted = draft(drafter, data.edit_prompts.take(index), source, sizes.codes, run.seed, dtype)
    condition = encode(run, vae, data.edit_sources[index]), upsampled(source, sizes.grid)
    glyphs = data.edit_glyphs[index]
    latents = denoise(painter, encoder, upsampled(drafted, sizes.grid), glyphs, STEPS, run.seed, dtype, condition)
    found, wanted = decode(vae, latents, dtype), as_tones(data.edit_targets[index])
    _save_sheet(run, "edits", torch.cat((as_tones(data.edit_sources[index]), wanted, found)), count // 2)
    return run.finish("samples", {**numbers, "psnr_edits": psnr(found, wanted)})
