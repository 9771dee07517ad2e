"""The training loop: from nothing, or on from where it was stopped, to a folder that the server loads.

AdamW; the learning rate rises, stays, and falls to nothing over the last steps, so that a run may be ended early or
prolonged by asking for another number of steps.
"""

from __future__ import annotations

import json
import queue
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import batches
import folder as files
import numpy as np
import torch
from batches import IGNORED, LABELS, Batch
from looks import HEAVY, STEPS, TOLD, Look
from net import Seen, Thinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from sounds import Speech
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

# Dialogs of each kind in a step; "drawn" are pictures that only the vision tower sees.
SIZES = {"image": 26, "video": 4, "audio": 6, "text": 2, "tools": 12, "drawn": 28}
TOGETHER = {"tools": 6, "image": 9, "drawn": 28}  # dialogs in a batch at most


@dataclass(frozen=True, slots=True)
class Plan:
    steps: int
    decay: int = 0  # steps of the falling rate; 0: a quarter of all
    warmup: int = 80
    rate: float = 2e-3
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    dialogs_read: int = 7500  # by the tokenizer
    recordings: int = 260  # of every word
    seed: int = 1
    workers: int = 2
    save_every: int = 100
    label_weight: float = 0.5
    look_weight: float = 0.3
    faster: str = ""  # matrices whose names begin so have thrice the rate
    decoder_only: bool = False  # the towers stay as they are

    def jobs(self) -> list[tuple[str, int, int, int]]:
        """The parts of a step, the largest first: kind, dialogs, of how many parts which one."""
        out = []
        for kind, size in sorted(self.sizes.items(), key=lambda pair: -pair[1]):
            parts = -(-size // TOGETHER.get(kind, 4))
            out += [(kind, size, parts, part) for part in range(parts)]
        return out

    def rate_at(self, step: int) -> float:
        decay = self.decay or max(1, self.steps // 4)
        return self.rate * min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / decay))


class Trained(nn.Module):
    """The network with the heads that only training needs: one for every set of labels on a tower's rows."""

    def __init__(self, config: dict[str, Any], *, decoder_only: bool = False) -> None:
        """`decoder_only`: the towers, and what only they need, are not trained."""
        super().__init__()
        self.decoder_only = decoder_only
        self.thinker = Thinker(config)
        size = config["text_config"]["hidden_size"]
        self.heads = nn.ModuleDict({name: nn.Linear(size, count) for name, count in LABELS.items()})
        self.found = nn.ModuleDict({name: nn.Linear(size, count) for name, count in FOUND.items()})
        if decoder_only:
            for part in (self.thinker.visual, self.thinker.audio_tower, self.heads):
                part.requires_grad_(False)

    def loss(self, batch: Batch, label_weight: float, look_weight: float) -> tuple[Tensor, dict[str, float]]:
        """(loss, what to report: cross-entropy of answers, share of right answer tokens and of right labels, weight
        of the rows that heads should look at)"""
        label_loss, report = torch.zeros(()), {}
        rows = self.rows(batch) if batch.groups else None
        if rows is not None and not self.decoder_only:
            for name, labels in batch.labels.items():
                wanted = torch.from_numpy(labels)
                guessed = self.heads[name](rows).float()
                there, nothing = wanted > 0, wanted == 0
                if nothing.any():  # most rows: they must not outweigh the others
                    label_loss = label_loss + 0.5 * functional.cross_entropy(guessed[nothing], wanted[nothing])
                if there.any():
                    label_loss = label_loss + functional.cross_entropy(guessed[there], wanted[there])
                    report[name] = float((guessed.argmax(-1) == wanted)[there].float().mean())
        if batch.kind == "drawn":
            return label_weight * label_loss, report
        targets = torch.from_numpy(batch.targets)
        by_layer = {
            layer: [(dialog, look) for dialog, look in batch.looks if look.layer == layer]
            for layer in sorted({look.layer for _, look in batch.looks})
        }
        watched = {
            layer: (torch.tensor([dialog for dialog, _ in looks]), torch.tensor([look.token for _, look in looks]))
            for layer, looks in by_layer.items()
        }
        positions, steps = torch.from_numpy(batch.positions), STEPS if batch.kind == "tools" else ()
        hidden, seen, near = self.thinker.model(self.embedded(batch, rows), positions, watched, steps)
        look_loss = torch.zeros(())
        for step, weights in zip(steps, near, strict=True):
            there = weights[positions[0, :, step.back :] >= step.back]  # not what fills a batch up
            look_loss = look_loss - there.mean()
            report[f"back{step.layer}{step.head}"] = float(there.detach().exp().mean())
        for looks, one in zip(by_layer.values(), seen, strict=True):
            look_loss = look_loss + self._look_loss(batch, looks, one, report)
        asked = targets != IGNORED
        logits = self.thinker.logits(hidden[asked])
        answer_loss = functional.cross_entropy(logits, targets[asked])
        report["loss"] = float(answer_loss.detach())
        right = logits.argmax(-1) == targets[asked]
        report["right"] = float(right.float().mean())
        return answer_loss + label_weight * label_loss + look_weight * look_loss, report

    def _look_loss(
        self, batch: Batch, looks: Sequence[tuple[int, Look]], seen: Seen, report: dict[str, float]
    ) -> Tensor:
        """Cross-entropy of where one layer's first head looks, and of what a token then knows of the one thing that it
        looked at: what it is, where, how often."""
        layer = looks[0][1].layer
        things = [
            (index, rows, 1 / len(look.rows), look.weight)
            for index, (_, look) in enumerate(looks)
            for rows in look.rows
        ]
        loss = torch.zeros(())
        if things:
            of, shares, weights = (torch.tensor([thing[part] for thing in things]) for part in (0, 2, 3))
            there = torch.zeros(len(things), seen.weights.shape[1], dtype=torch.bool)
            for number, (_, rows, _, _) in enumerate(things):
                there[number, torch.from_numpy(rows)] = True
            found = seen.weights[of].masked_fill(~there, -torch.inf).logsumexp(-1)
            evenly = found + shares.reciprocal().log()  # 0 when evenly on all
            loss = -(evenly * shares * weights).sum() / (shares * weights).sum()
            report[f"look{layer}"] = float(found.detach().exp().sum() / shares.sum())
        loss = HEAVY.get(layer, 1.0) * loss
        row_of = {int(place): row for row, place in enumerate(batch.places)} if batch.labels else {}
        length = batch.token_ids.shape[1]
        shown = [
            [row_of[place] for rows in look.rows for place in (dialog * length + rows).tolist() if place in row_of]
            for dialog, look in looks
        ]
        for name, head in self.found.items():
            if not (name in TOLD or name in batch.labels):
                continue
            values = [
                {look.told.get(name, 0)} if name in TOLD else {int(batch.labels[name][row]) for row in rows}
                for (_, look), rows in zip(looks, shown, strict=True)
            ]
            wanted = torch.tensor([value.pop() if len(value) == 1 else IGNORED for value in values])
            known = wanted > 0
            if known.any():
                guessed = head(seen.states[known]).float()
                weight = 2.0 if name == "fits" else 0.5 if name in TOLD else 0.125
                weights = torch.tensor([look.weight for _, look in looks])[known]
                apart = functional.cross_entropy(guessed, wanted[known], reduction="none")
                loss = loss + weight * (apart * weights).sum() / weights.sum()
                report[f"found{layer}_{name}"] = float((guessed.argmax(-1) == wanted[known]).float().mean())
        return loss

    def embedded(self, batch: Batch, rows: Tensor | None) -> Tensor:
        """Tokens as the decoder gets them, [dialogs, tokens, size], media in their places."""
        x = self.thinker.model.embed_tokens(torch.from_numpy(batch.token_ids))
        if rows is None:
            return x
        return x.flatten(0, 1).index_copy(0, torch.from_numpy(batch.places), rows).view(x.shape)

    def rows(self, batch: Batch) -> Tensor:
        """[rows, size] of all media, in the order of the batch's places"""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            return self._rows(batch)

    def _rows(self, batch: Batch) -> Tensor:
        out: list[Tensor] = []
        for group in batch.groups:
            if batch.kind == "audio":
                out += self.thinker.audio_tower.rows(
                    torch.from_numpy(group["windows"]), torch.from_numpy(group["lengths"]), group["clips"]
                )
            else:
                out.append(self.thinker.visual(torch.from_numpy(group["patches"]), group["grid"]).flatten(0, 1))
        return torch.cat(out)[torch.from_numpy(batch.rows)].float()


FOUND = {**{name: LABELS[name] for name in ("shape", "colour", "x", "y", "across", "down")}, **TOLD}
WEIGHTS = {"image": 1.0, "video": 0.4, "audio": 0.5, "text": 0.3, "tools": 1.0, "drawn": 0.7}


def train(plan: Plan, out: Path, work: Path, begin_with: Path | None = None) -> None:
    """Write a checkpoint to `out`; keep what a stopped run needs to go on in `work`. A new run starts from nothing, or
    from the weights and the tokenizer of `begin_with`."""
    console = Console()
    work.mkdir(parents=True, exist_ok=True)
    speech = Speech(work, plan.recordings, plan.seed)
    if not (work / "tokenizer.json").exists():
        files.write(work, _tokenizer(plan, speech, begin_with, console))
    torch.manual_seed(plan.seed)
    model = Trained(json.loads((work / "config.json").read_text()), decoder_only=plan.decoder_only)
    if begin_with and not (work / "state.pt").exists():
        load_weights(model.thinker, begin_with, work)
    if not (work / "model.safetensors").exists():
        save_weights(model.thinker, work)  # so that the folder opens like any other
    start = 0
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        start = state["step"]
    count = sum(p.numel() for p in model.thinker.parameters())
    console.print(f"{count / 1e6:.2f} M parameters, steps {start} to {plan.steps}, {plan.workers} processes")
    if start < plan.steps and not _run(plan, work, model, start, console):
        console.print("stopped; the same command goes on from here")
        return
    publish(work, out)
    console.print(f"written to {out}")


def _tokenizer(plan: Plan, speech: Speech, begin_with: Path | None, console: Console) -> Tokenizer:
    """That of `begin_with` if it knows the markers of calls, or a new one."""
    old = Tokenizer.from_file(str(begin_with / "tokenizer.json")) if begin_with else None
    if old is not None and all(old.token_to_id(marker) is not None for marker in files.MARKERS):
        return old
    console.print("tokenizer …")
    return files.make_tokenizer(list(files.sentences(speech, plan.dialogs_read)), old)


def _run(plan: Plan, work: Path, model: Trained, start: int, console: Console) -> bool:
    """Whether all steps were done."""
    context = torch.multiprocessing.get_context("spawn")
    gradients = torch.zeros(plan.workers, sum(p.numel() for p in model.parameters())).share_memory_()
    team = Team(
        context.Barrier(plan.workers), context.Event(), context.Value("b", 0), context.Queue(), context.Value("i", 0)
    )
    workers = [
        context.Process(target=_work, args=(rank, plan, work, model.share_memory(), gradients, start, team))
        for rank in range(plan.workers)
    ]
    for worker in workers:
        worker.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: team.stop.set())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    means, step = Means(), start
    with Progress(*columns, console=console, refresh_per_second=0.5) as progress, (work / "log.jsonl").open("a") as log:
        bar = progress.add_task("training", total=plan.steps, completed=start)
        while any(worker.is_alive() for worker in workers) or not team.reports.empty():
            try:
                step, seconds, reports = team.reports.get(timeout=2)
            except queue.Empty:
                if any(worker.exitcode for worker in workers):
                    team.barrier.abort()
                    raise SystemExit("a training process has failed") from None
                continue
            progress.update(bar, completed=step)
            for kind, report in reports:
                means.add(kind, report)
            if step % 25 == 0 or step == plan.steps:
                line = {"step": step, "seconds": round(seconds, 1), **means.take()}
                log.write(json.dumps(line) + "\n")
                log.flush()
                console.print(" ".join(f"{name} {value}" for name, value in line.items()))
    return step == plan.steps


@dataclass(frozen=True, slots=True)
class Team:
    """What the processes of a run share beside weights and gradients."""

    barrier: Any
    stop: Any  # an event: somebody wants the run to stop
    stopping: Any  # a value: all stop after this step
    reports: Any  # queue of (step, seconds, [(kind, report)]) of the first process
    jobs: Any  # a value: how many jobs of the step are taken

    def next_job(self) -> int:
        """Whoever has time takes the next: on a busy machine nobody knows who that will be."""
        with self.jobs.get_lock():
            self.jobs.value += 1
            return int(self.jobs.value) - 1


def _work(rank: int, plan: Plan, work: Path, model: Trained, gradients: Tensor, start: int, team: Team) -> None:
    """Compute on this process's part of every step's dialogs, then change this process's part of the weights.

    One thread each: processes that meet twice a step lose less than threads that meet in every operation.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    reader, speech = batches.Reader(work), Speech(work, plan.recordings, plan.seed)
    mean = torch.zeros_like(gradients[0])
    views = list(zip(model.parameters(), _views(model, gradients[rank]), _views(model, mean), strict=True))
    optimizers = make_optimizers(model, rank, plan.workers, plan.faster)
    state = work / f"state-{rank}-of-{plan.workers}.pt"
    if start and state.exists():
        for optimizer, kept in zip(optimizers, torch.load(state, weights_only=True), strict=True):
            optimizer.load_state_dict(kept)
    jobs = plan.jobs()
    began = time.monotonic()
    for step in range(start, plan.steps):
        gradients[rank].zero_()
        for p, own, _ in views:
            p.grad = own if p.requires_grad else None
        reports = []
        while (number := team.next_job()) < len(jobs):
            kind, size, parts, part = jobs[number]
            given = batches.make_batches(reader, speech, kind, size, f"{plan.seed}-{step}-{kind}", parts, part)
            for batch in given:
                with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                    loss, report = model.loss(batch, plan.label_weight, plan.look_weight)
                if loss.requires_grad:
                    (loss * (WEIGHTS[kind] / parts / len(given))).backward()
                reports.append((kind, report))
        if rank == 0:
            team.stopping.value = team.stop.is_set()
        team.barrier.wait()
        torch.sum(gradients, 0, out=mean)
        mean.mul_(min(1.0, 1.0 / (float(mean.norm()) + 1e-6)))
        for p, _, together in views:
            p.grad = together if p.requires_grad else None
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            optimizer.step()
        stopping = bool(team.stopping.value)
        if rank == 0:
            team.jobs.value = 0
        team.barrier.wait()
        if (step + 1) % plan.save_every == 0 or stopping or step + 1 == plan.steps:
            save(state, [optimizer.state_dict() for optimizer in optimizers])
            if rank == 0:
                save(work / "state.pt", {"step": step + 1, "model": model.state_dict()})
                save_weights(model.thinker, work)
            team.barrier.wait()
        if rank == 0:
            team.reports.put((step + 1, time.monotonic() - began, reports))
        if stopping:
            return


def fast_bfloat16() -> bool:
    """Whether the processor multiplies in it: several times as fast as in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _views(model: nn.Module, flat: Tensor) -> list[Tensor]:
    """`flat` cut into the parameters' shapes."""
    params = list(model.parameters())
    parts = torch.split(flat, [p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def save(file: Path, state: Any) -> None:
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


class Means:
    """Running means of reports by kind, since the last `take`."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, kind: str, report: dict[str, float]) -> None:
        for name, value in report.items():
            self.values.setdefault(f"{kind}.{name}", []).append(value)

    def take(self) -> dict[str, float]:
        out = {name: round(float(np.mean(values)), 4) for name, values in self.values.items()}
        self.values.clear()
        return out


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024), those of one shape
    together; scaled to the size of AdamW's steps (Liu et al. 2025)."""

    def __init__(
        self,
        params: list[nn.Parameter],
        rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
        factors: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        """`factors` are those of the rates of some parameters."""
        super().__init__(params, {"lr": rate, "momentum": momentum, "weight_decay": weight_decay})
        self.factors = dict(factors or {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    kept.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(kept, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    factor = self.factors.get(p, 1.0)
                    p.mul_(1 - factor * group["lr"] * group["weight_decay"]).add_(update, alpha=-factor * scale)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices to [n, rows, columns], about, by five quintic Newton-Schulz steps."""
    turned = x.shape[1] > x.shape[2]
    x = x.mT if turned else x
    if fast_bfloat16():
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return (x.mT if turned else x).float()


def make_optimizers(model: Trained, rank: int, workers: int, faster: str = "") -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else: for this process's part of both. Matrices whose names begin
    with `faster` have thrice the rate."""
    named = [(name, p) for name, p in model.thinker.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    matrices.sort(key=lambda p: tuple(p.shape))  # so that every process has some of each shape
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        Muon(
            matrices[rank::workers], 1e-3, factors={p: 3.0 for name, p in named if faster and name.startswith(faster)}
        ),
        torch.optim.AdamW(others[rank::workers], lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


UNUSED = "audio_tower.audio_bos_eos_token.weight"  # published files have it; nothing that writes text uses it


def load_weights(thinker: Thinker, folder: Path, own: Path | None = None) -> None:
    """From another folder than one's `own`, also with another vocabulary and fewer layers: tokens that it lacks begin
    as what they are made of there, or as the same with or without a space; layers that it lacks add nothing."""
    stored = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("thinker."): tensor.float() for name, tensor in stored.items() if UNUSED not in name}
    if own is not None:
        names = [str(place / "tokenizer.json") for place in (folder, own)]
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = _carried_over(table, *(Tokenizer.from_file(name) for name in names))
        for name, p in thinker.named_parameters():
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensors.setdefault(name, torch.zeros_like(p) if ends else p.detach().clone())
    thinker.load_state_dict(tensors)


def _carried_over(table: Tensor, old: Tokenizer, new: Tokenizer) -> Tensor:
    """[new tokens, size]"""
    rows = []
    known = old.get_vocab()
    for index in range(files.VOCAB_SIZE):
        token = new.id_to_token(index) or ""
        bare = token.removeprefix(files.SPACE)
        like = (token, files.SPACE + token, bare, files.SPACE + bare.lower(), bare.lower())
        same = next((known[one] for one in like if one in known), None)
        text = new.decode([index], skip_special_tokens=False) if token else ""
        pieces = [same] if same is not None else old.encode(text, add_special_tokens=False).ids
        rows.append(table[pieces].mean(0) if pieces else table.mean(0))
    return torch.stack(rows)


def save_weights(thinker: Thinker, to: Path) -> None:
    tensors = {name: p.detach() for name, p in thinker.named_parameters()}
    tensors[UNUSED] = torch.zeros(2, thinker.audio_tower.proj.out_features)
    save_file(
        {f"thinker.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()},
        to / "model.tmp",
        metadata={"format": "pt"},
    )
    (to / "model.tmp").replace(to / "model.safetensors")


PUBLISHED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors",
)


def publish(work: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        (out / name).write_bytes((work / name).read_bytes())
