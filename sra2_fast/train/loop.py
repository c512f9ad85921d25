"""The training loop: what happens in a step, and what happens between steps.

The step itself is step.py's and never waits for the device. Everything random is a function of (seed, step, index in
the batch), so that a run cut in two is bitwise the run in one piece. One process, one device: many GPUs are not here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from tqdm import tqdm

from .. import backends
from ..checkpoints import newest_whole, prune_checkpoints, save_checkpoint, split_optimizer
from ..data import Batch, LatentSource, make_loader, open_data
from ..errors import InputError, is_out_of_memory
from ..models import SiT, compile_blocks
from ..pictures import can_write_png, write_png
from ..progress import progress_bar
from ..vae.decode import make_decoder
from . import build
from .allocator import keep_freed_memory
from .diagnosis import Fetch, NonFiniteLoss, StepHistory, describe, first_non_finite, largest_activations
from .grid import SampleGrid
from .initial import load_initial
from .interrupt import Interrupt, Interrupted
from .opening import say_what_runs
from .options import TrainOptions
from .resume import check_same_run, describe_run, find_checkpoint, restore
from .run_directory import RunDirectory
from .step import TrainStep


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Where a run stands when it leaves. exit_code: 0, or 130 / 143 when a signal ended it early."""

    step: int
    checkpoint: Path | None
    exit_code: int
    last_record: dict[str, float] | None


def train(options: TrainOptions) -> TrainResult:
    """Train (or go on training) one run until `options.steps`.

    Raises InputError for bad input or too little memory, NonFiniteLoss when a loss or the gradient is not finite.
    """
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise InputError("train: runs on one process and one device as yet, not under torchrun; start it by itself")
    options = build.resolve(options)
    if options.device == "cpu":
        keep_freed_memory()
    source = open_data(
        options.data,
        options.num_classes,
        latent_scale=options.latent_scale,
        latent_shift=options.latent_shift,
        ignore_labels=options.ignore_labels,
        features=options.target == "features" and options.align != "none",
    )
    directory = RunDirectory(options.out)
    try:
        return Trainer(options, source, directory).train()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = options.microbatch or options.batch_size
        raise InputError(
            f"train: out of memory on {options.device}; lower what is held at once with --microbatch (now {size}), "
            "or use --checkpoint-blocks; a smaller --batch-size changes the training"
        ) from error
    finally:
        directory.close()


class LogPoint(NamedTuple):
    """A step after which metrics are written, and its figures, which may be on their way yet."""

    step: int
    figures: Fetch


class Trainer:
    """The pieces of one run: resolved options, where the data and the folder are, and the step that is repeated."""

    def __init__(self, options: TrainOptions, source: LatentSource, directory: RunDirectory) -> None:
        self.options, self.source, self.directory = options, source, directory
        self.device = torch.device(options.device)
        self.description = describe_run(options, source)
        self.record: dict[str, float] | None = None
        checkpoint = find_checkpoint(options, directory)
        changes = check_same_run(checkpoint, self.description, options.resume) if checkpoint else []
        self.checkpoint = checkpoint.path if checkpoint else None
        self.model = build.build_model(options, source)
        notes = (
            load_initial(self.model, options, self._latents_info())
            if options.init is not None and checkpoint is None
            else []
        )
        self.model.to(self.device)
        self.loss_fn = build.build_loss(options)
        self.optimizer = build.build_optimizer(options, self.model)
        pending = restore(checkpoint, self.model, self.optimizer, options) if checkpoint else []
        self.teacher = build.build_teacher(self.model, self.optimizer) if self.loss_fn.has_teacher else None
        self.schedule = build.build_schedule(options)
        self.take_step = TrainStep(
            self._compiled(self.model),
            self.loss_fn,
            self.optimizer,
            StepHistory(options.log_every, self.device, pending),
            device=self.device,
            schedule=self.schedule,
            autocast_dtype=torch.bfloat16 if options.precision == "bf16" else None,
            label_dropout=options.label_dropout,
            teacher=None if self.teacher is None else self._compiled(self.teacher),
            attention=options.attention,
            choices=checkpoint.state.get("choices") if checkpoint else None,
            graph=options.graph,
            step=checkpoint.step if checkpoint else 0,
        )
        self.chosen = self.take_step.choose(min(options.batch_size, options.microbatch or options.batch_size))
        self._log_point: LogPoint | None = None
        self._saved_step = self.step
        self._is_between_steps = True
        self.grid = self._make_grid()
        say_what_runs(self, changes, notes)

    @property
    def step(self) -> int:
        """The steps done so far."""
        return self.take_step.step

    def _compiled(self, model: SiT) -> SiT:
        return compile_blocks(model) if self.options.compile else model

    def train(self) -> TrainResult:
        """Steps until the end, an interrupt or a loss that is not finite.

        What is beside the training (data that cannot be read, a full disk for metrics.jsonl) ends it after a save.
        """
        options = self.options
        is_done = self.step >= options.steps
        if is_done:
            tqdm.write(f"{self.checkpoint} has all {options.steps} steps already; raise --steps to go on")
        else:
            self.directory.open_metrics(self.step, options.log, dataclasses.asdict(options))
            self._write_config()
        self.model.train()
        under_way = self.step  # until it is logged, saved and its samples are drawn
        with Interrupt(lambda: under_way) as interrupt:
            self._clock_start, self._clock_step = time.perf_counter(), self.step
            if self._lacks_samples():
                self._draw_samples(interrupt)
            if is_done or interrupt.signal:
                return TrainResult(self.step, self.checkpoint, interrupt.exit_code, None)
            bar = progress_bar(desc="train", unit="step", total=options.steps, initial=self.step)
            with self._saving_on_failure(), bar as self.bar:
                if len(self.take_step.history) == options.log_every:  # a record that could not be written
                    self._begin_log()
                    self._log()
                under_way = self.step + 1
                with contextlib.closing(self._batches(self.step, options.steps - self.step)) as batches:
                    for batch in batches:
                        self._is_between_steps = False
                        self.take_step(batch.split(options.microbatch))
                        self._is_between_steps = True
                        self.bar.update()
                        self._after_step(interrupt)
                        if interrupt.signal:
                            break
                        under_way = self.step + 1
        if interrupt.signal and self.step < options.steps:
            name = interrupt.signal.name
            tqdm.write(
                f"{name} after step {self.step}: saved {self.checkpoint}; go on with the same command (--resume auto)"
            )
            return TrainResult(self.step, self.checkpoint, interrupt.exit_code, self.record)
        return TrainResult(self.step, self.checkpoint, 0, self.record)

    def _after_step(self, interrupt: Interrupt) -> None:
        """Log, save and draw where it is time to."""
        is_last = self.step == self.options.steps
        if is_last or self.step % self.options.log_every == 0:
            self._begin_log()
        if is_last or (self._log_point is not None and self._log_point.figures.has_arrived()):
            self._log()
        if is_last or interrupt.signal or self.step % self.options.checkpoint_every == 0:
            self._log()
            self._save()
        if not interrupt.signal and self._is_time_for_samples():
            self._draw_samples(interrupt)
        if interrupt.signal:
            self._save()  # where the signal came while the samples were drawn

    @contextlib.contextmanager
    def _saving_on_failure(self) -> Iterator[None]:
        """An error between two steps does not cost the steps since the last checkpoint."""
        try:
            yield
        except NonFiniteLoss:
            raise
        except Exception:
            if self._is_between_steps and self._saved_step != self.step:
                try:
                    self._save()
                    tqdm.write(f"saved {self.checkpoint} before leaving")
                except InputError as error:
                    tqdm.write(f"step {self.step} is not saved: {error}")
            raise

    def _batches(self, start: int, count: int) -> Generator[Batch, None, None]:
        on_gpu = self.device.type == "cuda"
        loader = make_loader(
            self.source,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            start_step=start,
            num_steps=count,
            num_workers=self.options.workers or 0,
            pin_memory=on_gpu,
        )
        with contextlib.closing(iter(loader)) as batches:
            for batch in batches:
                yield batch.map(lambda tensor: tensor.to(self.device, non_blocking=True)) if on_gpu else batch

    def _finite(self, rows: list[list[float]], last_step: int) -> list[list[float]]:
        """The losses of the steps up to `last_step`. Raises NonFiniteLoss, with the weights as before the bad step."""
        bad = first_non_finite(rows)
        if bad is not None:
            step = last_step - len(rows) + bad
            with contextlib.closing(self._batches(step, 1)) as batches:
                batch = next(batches)
            with torch.compiler.set_stance("force_eager"):
                activations = largest_activations(self.model, lambda: self.take_step.losses(self.model, batch, step))
            whole = newest_whole(self.directory.checkpoints)
            raise NonFiniteLoss(describe(step + 1, rows[bad], activations, whole, self.options.precision))
        return rows

    def _begin_log(self) -> None:
        """Send the figures since the last log point on their way; `_log` writes them down when they are here."""
        self._log()  # the one before: in order
        history = self.take_step.history
        self._log_point = LogPoint(self.step, history.fetch())
        history.clear()

    def _log(self) -> None:
        """Write the log point that is under way, if one is; waits for its figures."""
        if self._log_point is None:
            return
        step, figures = self._log_point
        rows = self._finite(figures.rows(), step)
        now = time.perf_counter()
        images_per_s = (step - self._clock_step) * self.options.batch_size / max(now - self._clock_start, 1e-9)
        velocity, align, grad_norm = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        weight = self.loss_fn.weight_at(step - 1)
        self.record = {
            "step": step,
            "loss": velocity + weight * align,
            "velocity": velocity,
            "align": align,
            "align_weight": weight,
            "grad_norm": grad_norm,
            **self.schedule.at(step),
            "images": step * self.options.batch_size,
            "images_per_s": images_per_s,
        }
        self.directory.log(self.record)
        self._log_point = None
        self.bar.set_postfix_str(f"loss {self.record['loss']:.4f}, align {align:.4f}, {images_per_s:.0f} images/s")
        # images/s leaves out saving and sampling, and starts anew when the figures of a log point are here.
        self._clock_start, self._clock_step = now, step

    def _save(self) -> None:
        """Save this step, unless it is saved."""
        if self._saved_step == self.step:
            return
        pending = self._finite(self.take_step.history.read(), self.step)
        if self._log_point is not None:  # one that could not be written
            pending = self._finite(self._log_point.figures.rows(), self._log_point.step) + pending
        paused = time.perf_counter()
        self.directory.flush()
        named = cast(dict[str, Any], get_optimizer_state_dict(self.model, self.optimizer))
        averages = {name: entry.pop("ema") for name, entry in named["state"].items()}
        weights = self.model.state_dict()
        tensors, rest = split_optimizer(named)
        self.checkpoint = save_checkpoint(
            self.directory.checkpoints,
            self.step,
            model=weights,
            ema={name: averages.get(name, value) for name, value in weights.items()},
            optimizer=tensors,
            state={
                "model": self.model.config(),
                "run": self.description,
                "latents": self._latents_info(),
                "optimizer": rest,
                "pending": pending,
                "choices": self.take_step.choices,
                "versions": backends.versions(),
            },
        )
        self._saved_step = self.step
        prune_checkpoints(self.directory.checkpoints, self.options.keep_checkpoints)
        self._clock_start += time.perf_counter() - paused

    def _latents_info(self) -> dict[str, Any]:
        """How z becomes an image again: the normalisation travels with the weights."""
        info = self.source.decode_info()
        return {**dataclasses.asdict(info), "shift": info.shift.tolist(), "scale": info.scale.tolist()}

    def _make_grid(self) -> SampleGrid | None:
        options = self.options
        if not options.sample_every or not can_write_png():
            return None
        decode = make_decoder(self.source.decode_info(), options.vae, self.device)
        if decode.note:
            tqdm.write(decode.note)
        return SampleGrid(
            shape=self.source.shape,
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            seed=options.seed,
            decode=decode,
            steps=options.sample_steps,
            cfg_scale=options.sample_cfg,
        )

    def _is_time_for_samples(self) -> bool:
        every = self.options.sample_every
        return bool(every) and (self.step == self.options.steps or self.step % every == 0)

    def _samples_path(self) -> Path:
        return self.directory.samples / f"step-{self.step:08d}.png"

    def _lacks_samples(self) -> bool:
        """Whether the checkpoint that the run goes on from was saved, and its grid not drawn any more."""
        is_own = self.checkpoint is not None and self.directory.holds(self.checkpoint)
        return is_own and self._is_time_for_samples() and not self._samples_path().exists()

    def _draw_samples(self, interrupt: Interrupt) -> None:
        """Draw and write the grid; a signal stops it, and a picture that cannot be made costs a line, not the run."""
        if self.grid is None:
            return
        paused = time.perf_counter()
        watch = self.model.register_forward_pre_hook(lambda module, inputs: interrupt.check())
        try:
            # Other batch sizes and no gradients: compiled, the few calls of a grid would wait for their own code.
            eagerly = torch.compiler.set_stance("force_eager")
            with eagerly, self.optimizer.swap_ema(self.model), self.take_step.autocast():
                latents = self.grid.sample(self.model, self.device)
            write_png(self.grid.picture(latents, interrupt.check), self._samples_path())
        except Interrupted:
            tqdm.write(f"left out the samples of step {self.step}")
        except Exception as error:  # of an autoencoder, a font, the memory: the run is worth more than its picture
            reason = " ".join(str(error).split()) or type(error).__name__
            tqdm.write(f"no samples of step {self.step}: {reason}")
        finally:
            watch.remove()
        self._clock_start += time.perf_counter() - paused

    def _write_config(self) -> None:
        self.directory.write_config(
            {
                "options": dataclasses.asdict(self.options),
                "model": self.model.config(),
                "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                "data": f"{self.source.name}: {self.description['data']}",
                "started_at_step": self.step,
                "choices": self.take_step.choices,
                "device": backends.device_name(self.device),
                "versions": backends.versions(),
            }
        )
