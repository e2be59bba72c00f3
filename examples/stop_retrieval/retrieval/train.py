# SPDX-License-Identifier: Apache-2.0
"""Training: AdamW with two learning rates, a cosine with warm-up, checkpoints that a killed run goes on from.

Nothing of a step depends on what was before it but weights, optimizer and scaler: samples and dropout are drawn by the
seed and the step's number. That is why a run that goes on ends bit for bit where it would have ended.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import checkpoint, features, interrupt, results, state
from .curves import Curves
from .errors import UsageError
from .loader import Batch, Broken, TrainSampler
from .model import Retrieval, parameter_groups
from .parallel import Processes, unwrapped

log = logging.getLogger("stop_retrieval")
Evaluate = Callable[[], dict]


def rate(step: int, steps: int, warmup: float) -> float:
    """Return what the learning rates are multiplied with in a step: up to 1 in the first ``warmup`` of all steps, then
    down to 0 by half a cosine (Loshchilov & Hutter, 2017)."""
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most ``limit``, and give what it was. Sharded and whole ones may
    stand side by side."""
    grads = [p.grad for p in parameters if p.grad is not None]
    kinds = ([g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)])
    norms = [nn.utils.get_total_norm(kind) for kind in kinds if kind]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).square().sum().sqrt()
    nn.utils.clip_grads_with_norm_(parameters, limit, total)
    return total


class Training:
    """One training run.

    Args:
        args: complete settings.
        model: as ``Processes.wrap`` gives it.
        loader, sampler: of ``loader.train_loader``.
        folder: for checkpoints and TensorBoard.
        evaluate: called after each epoch in all processes; gives the results, see ``evaluate.Evaluation``.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        loader: DataLoader,
        sampler: TrainSampler,
        folder: state.Folder,
        processes: Processes,
        evaluate: Evaluate,
    ):
        self.args, self.model, self.loader, self.sampler = args, model, loader, sampler
        self.folder, self.processes, self.evaluate = folder, processes, evaluate
        groups = parameter_groups(model, args.lr, args.coef_lr, args.wd)
        self.optimizer = torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), eps=args.eps)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        device = processes.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=args.precision == "amp" and device == "cuda")
        self.progress = checkpoint.Progress()
        self.asked = interrupt.Request()
        self.broken = Broken()

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.sampler.steps * self.args.epochs

    def run(self, resume: checkpoint.Checkpoint | None = None) -> None:
        """Train, from the beginning or from a checkpoint.

        Raises:
            UsageError: videos can't be read, the loss is no number any more, or the checkpoint is of another training.
            Stopped: Ctrl-C, with everything saved.
        """
        if resume is not None:
            self._must_be_ours(resume)
            self.progress = checkpoint.restore(resume, self.model, self.optimizer, self.scaler)
            if resume.hparams.get("epochs") != self.args.epochs:
                self._save()  # whoever goes on from here by --resume auto has the new number
        self.processes.first_does(lambda: self.folder.write_json(state.SETTINGS, self.args.hparams))
        done = self.progress
        writer: Curves | None = None
        if self.processes.first:
            writer = Curves(self.folder.path / "tensorboard", done.global_step + 1 if resume else None)
        # of several processes each would stop at a step of its own
        deferred = interrupt.deferred() if self.processes.world == 1 else nullcontext(self.asked)
        try:
            with deferred as self.asked:
                self._epochs(writer)
        finally:
            if writer is not None:
                writer.close()
        self.broken.say(self.processes)

    def _epochs(self, writer: Curves | None) -> None:
        done = self.progress
        while done.epoch < self.args.epochs:
            if self.asked.made:
                raise interrupt.Stopped(f"stopped after epoch {done.epoch}, which is saved; {self._way_on}")
            self._epoch(writer)
            number = done.epoch + 1
            found = None
            if number % self.args.eval_epochs == 0 or number == self.args.epochs:
                found = self._evaluate()
            done.epoch, done.step = number, 0
            self._keep(found, writer)
        if self.asked.made:
            raise interrupt.Stopped("stopped after the last epoch; all is saved")

    def _must_be_ours(self, found: checkpoint.Checkpoint) -> None:
        done, steps = found.progress, self.sampler.steps
        if done.global_step != done.epoch * steps + done.step or done.step > steps or done.epoch > self.args.epochs:
            raise UsageError(
                f"{found.path} is at step {done.step} after epoch {done.epoch}, {done.global_step} steps in all; "
                f"epochs of these data have {steps}: go on with those it was trained on, or begin anew by --init_model"
            )

    def _epoch(self, writer: Curves | None) -> None:
        args, done = self.args, self.progress
        self.sampler.start(done.epoch, done.step)
        self.model.train()
        batches = iter(self.loader)
        each = self.sampler.batch * self.sampler.parts * self.processes.world  # videos of a step
        bar = tqdm(
            total=self.sampler.steps * each, initial=done.step * each, unit="video",
            desc=f"epoch {done.epoch + 1} of {args.epochs}", disable=self.processes.silent, leave=False,
        )  # fmt: skip
        begun, since = time.perf_counter(), 0
        with bar:
            while done.step < self.sampler.steps:
                loss, norm = self._step(batches)
                since += each
                bar.update(each)
                done.step, done.global_step = done.step + 1, done.global_step + 1
                if done.global_step % args.n_display == 0 or done.step == self.sampler.steps:
                    value = self._finite(loss)
                    seconds = time.perf_counter() - begun
                    self._tell(writer, bar, value, float(norm), since / seconds)
                    begun, since = time.perf_counter(), 0
                if self.asked.made:
                    self._finite(loss)
                    self._stop(f"in epoch {done.epoch + 1} after step {done.step} of {self.sampler.steps}")
                if args.save_steps and done.global_step % args.save_steps == 0 and done.step < self.sampler.steps:
                    self._finite(loss)
                    self._save()

    def _step(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One step of the optimizer; gives loss and norm of the gradient."""
        args, done, parts = self.args, self.progress, self.sampler.parts
        drawn = np.random.SeedSequence((args.seed, done.global_step, self.processes.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        factor = rate(done.global_step, self.steps, args.warmup_proportion)
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.processes.device)
        for part in range(parts):
            batch = next(batches)
            self.broken.note(batch)
            if not batch.readable.all():
                path, reason = batch.broken[-1]
                raise UsageError(f"too many of the videos can't be read, {path} for one: {reason}")
            with self._syncing(last=part == parts - 1):
                loss = self.model(*batch.to(self.processes.device)) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(list(self.model.parameters()), args.clip_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._clip().clamp()
        return total, norm

    def _clip(self) -> Retrieval:
        return unwrapped(self.model)  # type: ignore[return-value]

    def _syncing(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged with the last part of a batch only."""
        if isinstance(self.model, DistributedDataParallel):
            return nullcontext() if last else self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def _finite(self, loss: Tensor) -> float:
        value = float(loss)
        if not math.isfinite(value):
            raise UsageError(
                f"the loss is {value} at step {self.progress.global_step}: try a smaller --lr, or --precision fp32; "
                "the last checkpoint is from before"
            )
        return value

    def _tell(self, writer: Curves | None, bar: tqdm, loss: float, norm: float, speed: float) -> None:
        if writer is None:
            return
        done, lr = self.progress, max(group["lr"] for group in self.optimizer.param_groups)
        videos = self.sampler.batch * self.sampler.parts * self.processes.world  # of a step
        left = round((self.steps - done.global_step) * videos / speed)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        log.info(
            "epoch %d, step %d of %d: loss %.4f, gradient %.2f, lr %.1e, %.3g videos/s, %s to go",
            done.epoch + 1, done.step, self.sampler.steps, loss, norm, lr, speed, timedelta(seconds=left),
        )  # fmt: skip
        told = {"loss": loss, "gradient_norm": norm, "lr": lr, "videos_per_second": speed}
        told["logit_scale"] = float(self._clip().clip.logit_scale.detach())
        for name, value in told.items():
            writer.add(f"train/{name}", value, done.global_step)

    def _save(self, best: bool = False) -> None:
        hparams = self.args.hparams
        found = checkpoint.capture(self.model, self.optimizer, self.scaler, self.progress, hparams)
        self.processes.first_does(lambda: self.folder.save(found, best))

    def _evaluate(self) -> dict[str, Any]:
        try:
            with self.asked.raised():
                return self.evaluate()
        except KeyboardInterrupt:
            if self.processes.world > 1:
                raise
            self._stop(f"in the evaluation after epoch {self.progress.epoch + 1}")

    def _stop(self, where: str) -> NoReturn:
        """Save, and end a training that somebody stopped."""
        self._save()
        raise interrupt.Stopped(f"stopped {where}, and saved; {self._way_on}")

    @property
    def _way_on(self) -> str:
        return f"go on with --output_dir {self.args.output_dir} --resume auto"

    def _keep(self, found: dict[str, Any] | None, writer: Curves | None) -> None:
        """Save what an epoch made, and the results if it was evaluated."""
        done = self.progress
        if found is None:
            self._save()
            return
        r1 = found["text_to_video"]["r1"]
        best = r1 > done.best
        done.best = max(r1, done.best)

        def write() -> None:
            of = {"checkpoint": str(self.folder.path / state.LAST), "epoch": done.epoch, "step": done.global_step}
            if not self.args.fsdp:  # whose weights are in pieces
                of["fingerprint"] = features.weights_of(self._clip())
            told = results.describe(self.args, self.args.tome, "training", **of)
            results.append(self.folder.path, [told | found], resumed=bool(self.args.resume))

        # before the checkpoint: a run that is killed between them writes the same again
        self.processes.first_does(write)
        self._save(best)
        if writer is None:
            return
        for way in ("text_to_video", "video_to_text"):
            for name in ("r1", "r5", "r10", "median_rank", "mean_rank"):
                writer.add(f"{way}/{name}", found[way][name], done.global_step)
