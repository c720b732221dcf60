"""One optimisation step and one validation: what Lightning calls."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from ddetr.checkpoint.published import COLORS, colors_in
from ddetr.datasets import sample_seed
from ddetr.engine.blackbox.guard import StepGuard
from ddetr.engine.compile import CompiledForward
from ddetr.engine.config import OptimConfig
from ddetr.engine.memory import explained_out_of_memory
from ddetr.engine.optimizer import build_optimizer, lr_factor, parameter_groups
from ddetr.engine.saving import Requests
from ddetr.engine.step import MicroBatch, Model, Region, Step, count_objects, model_outputs, no_region, step_losses
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.evaluation.metrics import Metrics
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.postprocess import PostProcess
from ddetr.runtime.distributed import gathered, summed


class DetectionModule(pl.LightningModule):
    """Trains a detector on steps of several micro-batches, and measures its AP.

    The step is Lightning's manual optimisation: losses are divided by the number of objects of the whole step, over all
    micro-batches and processes, so that the gradient does not depend on how the batch is cut up.
    """

    def __init__(
        self,
        model: DeformableDETR,
        criterion: SetCriterion,
        optim: OptimConfig,
        evaluator: CocoEvaluator,
        *,
        backbone_pretrained: bool,
        steps_per_epoch: int,
        total_steps: int,
        seed: int,
        compiled: CompiledForward | None = None,
        guard: StepGuard | None = None,
        requests: Requests | None = None,
        region: Region = no_region,
    ):
        """
        Args:
            compiled: the model's forward pass in training, where it is a compiled one.
            guard: what is done about steps that are not finite, by default ten are skipped and none is recorded.
            requests: what others wish to happen after a step; each step exchanges them between the processes.
            region: is entered around each part of a step, with a name of `REGIONS`.
        """
        super().__init__()
        self.automatic_optimization = False
        self.compiled = compiled
        self.model, self.criterion, self.optim, self.evaluator = model, criterion, optim, evaluator
        # Convolutions run channels-last: faster wherever there are matrix units, and on CPUs. Here, since
        # DistributedDataParallel mixes up the first gradients where it is done after the model was wrapped.
        self.model.backbone.to(memory_format=torch.channels_last)
        self.postprocess = PostProcess(evaluator.max_detections)
        self.backbone_pretrained = backbone_pretrained
        self.steps_per_epoch, self.total_steps, self.seed = steps_per_epoch, total_steps, seed
        self.metrics: Metrics | None = None  # of the last validation
        self.guard, self.requests, self.region = guard or StepGuard(), requests or Requests(), region
        self._loss = self._grad_norm = torch.tensor(0.0)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self.model, self.optim, backbone_pretrained=self.backbone_pretrained)
        optimizer = build_optimizer(groups, self.optim, fused=self._scaler is None)
        factor = lr_factor(self.optim, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[COLORS] = [list(self.model.image_mean), list(self.model.image_std)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model.image_mean, self.model.image_std = colors_in(checkpoint)

    def on_train_start(self) -> None:
        """The rates of the next step by the run's own schedule: a resumed run has those of its state, which are others
        only where it was extended."""
        scheduler = self.lr_schedulers()
        for group, base, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
            group["lr"] = base * factor(scheduler.last_epoch)

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> dict[str, Tensor | float]:
        """Returns the losses of the step, summed over its micro-batches, as detached scalars; "loss" is the total,
        "grad_norm" the L2 norm of the gradient before it is clipped, "lr_NAME" the rate of a parameter group."""
        optimizer = self.optimizers()
        # Dropout of each step from the step's own seed: a resumed run draws what the uninterrupted one would have
        # drawn.
        seed = sample_seed(self.seed, self.global_step, self.global_rank)
        torch.manual_seed(seed)
        (num_objects, *wishes), world_size = summed([count_objects(batch), *self.requests.own()], self.device)
        self.requests.agree(*wishes)
        step = Step(
            model=self.model,
            criterion=self.criterion,
            optimizer=optimizer.optimizer,
            optim=self.optim,
            batch=batch,
            num_boxes=max(num_objects / world_size, 1.0),
            number=self.global_step + 1,
            epoch=self.current_epoch,
            seed=seed,
            run_seed=self.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )
        logged: dict[str, Tensor] = {}

        def forward_backward() -> None:
            with self.region("the rest"):
                optimizer.zero_grad()
                logged.update(self._accumulate(step))
                self._loss = logged["loss"]

        with self.guard.step(step):
            with self.region("optimiser"):
                optimizer.step(closure=forward_backward)
            self._share_norm_statistics()
        rates = {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
        self.lr_schedulers().step()
        return logged | {"grad_norm": self._grad_norm} | rates

    def _accumulate(self, step: Step) -> dict[str, Tensor]:
        """Forward and backward pass of each micro-batch; gradients add up in the model, losses in what is returned."""
        logged: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(step.batch):
            is_last = index == len(step.batch) - 1
            exchange = nullcontext() if is_last else self._without_gradient_exchange()
            with exchange, explained_out_of_memory(micro_batch[0], micro_batch[2]):
                losses = step_losses(
                    self.model, self.criterion, micro_batch, step.num_boxes, self.region, self.compiled
                )
                total = self.criterion.total(losses)
                with self.region("backward"):
                    self.manual_backward(total)
            for name, value in {"loss": total, **losses}.items():
                share = 1.0 if name == "loss" or name in self.criterion.weight_dict else 1 / len(step.batch)
                logged[name] = logged.get(name, 0.0) + value.detach() * share
        return logged

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips the gradient of the whole model, after any scaler has restored its size."""
        self._grad_norm = clip_grad_norm_(self.model.parameters(), self.optim.clip_max_norm or math.inf)
        self.guard.check(self._loss, self._grad_norm, optimizer, self._scaler)

    def on_validation_epoch_start(self) -> None:
        self.evaluator.reset()

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self.evaluate(batch, self.model, self.evaluator)

    def evaluate(self, batch: MicroBatch, model: Model, evaluator: CocoEvaluator) -> None:
        """Gives the evaluator what any model (normalised images and their mask -> outputs) finds in a validation
        batch."""
        images, _, targets = batch
        with explained_out_of_memory(images, targets):
            outputs = model_outputs(self.model, batch, forward=model)
        sizes_hw = torch.stack([target["orig_size"] for target in targets])
        evaluator.update([int(target["image_id"]) for target in targets], self.postprocess(outputs, sizes_hw))

    def on_validation_epoch_end(self) -> None:
        self.evaluator.merge(gathered(self.evaluator.state()))
        self.metrics = self.evaluator.compute()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _share_norm_statistics(self) -> None:
        """Each process has seen its own images: the mean of their running statistics is everybody's, after each step,
        so that the state which the first process saves is that of all."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        norms = [
            norm for norm in self.model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None
        ]
        statistics = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
        if not statistics:
            return
        flat = torch.cat([statistic.flatten() for statistic in statistics]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for statistic, mean in zip(statistics, flat.split([statistic.numel() for statistic in statistics])):
            statistic.copy_(mean.view_as(statistic))

    def _without_gradient_exchange(self) -> AbstractContextManager:
        """Processes exchange gradients once per step, with the last micro-batch."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
