"""One rank of a recipe's world, alone: the product's own run is built and goes through one step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from prune_opd import platform
from prune_opd.config import Fp8Config, TeacherCacheConfig, TeacherEmaConfig, TrainConfig
from prune_opd.config import memory_phases as phases
from prune_opd.data import tokenizer as tokenizers
from prune_opd.plan.counts import parameters
from prune_opd.plan.hardware import ENGINE_WORKSPACE
from prune_opd.plan.setting import Setting, setting_of
from prune_opd.rehearse import kernels, machine, peers, stand_ins
from prune_opd.rehearse.saving import Saving, saving_of
from prune_opd.rehearse.watch import Watch

ANY_LAYOUT = "for any layout"
SAVED = {"as held": False, ANY_LAYOUT: True}  # kinds of checkpoints: whether any layout can load it
LOSS = "loss"  # the part of the training phase in which a chunk's logits are there


@dataclass(frozen=True)
class Cut:
    """How much of a recipe is rehearsed. layers: of both models, at most; None: all. microbatches: of a rank."""

    layers: int | None = None
    microbatches: int = 2


def gpu_of(config: TrainConfig) -> str:
    """The GPU that a recipe is planned for; an H100 for those of the CPU."""
    return "h100" if config.planning.gpu == "cpu" else config.planning.gpu


def reduced(config: TrainConfig, nodes: int, cut: Cut, folder: Path) -> TrainConfig:
    """The recipe as it is rehearsed: model directories that are only a config.json, and as many rows as asked for.

    Responses run to the longest horizon that the recipe has, which needs the most memory (`full_rows`).
    """
    student = machine.write_model(folder / "student", config.student, "student", cut.layers)
    written = {
        name: str(machine.write_model(folder / f"teacher {name}", own.model_dirs["teacher"], "teacher", cut.layers))
        for name, own in config.by_teacher.items()
    }
    config = replace(
        config,
        student=str(student),
        teacher="" if config.teachers else written[""],
        teachers={name: replace(own, path=written[name], horizon=None) for name, own in config.teachers.items()},
        teacher_ema=TeacherEmaConfig(),  # an average lies in host memory
    )
    setting = setting_of(config, gpu_of(config), nodes)
    layout, rollout = setting.student_layout, config.rollout
    rows = max(cut.microbatches, under_way(config)) * len(full_rows(config))
    updates = config.optimizer.updates_per_batch
    replicas = [one.teacher_layout.replicas for one in setting.of.values() or (setting,)]
    responses = max(rows * layout.replicas * updates * len(replicas), *replicas)
    prompts = min(rollout.prompts, -(-responses // rollout.responses))
    return replace(
        config,
        rollout=replace(rollout, prompts=prompts, oversample=1.0, partial=False, refresh_every=1),
        horizon=replace(config.horizon, strategy="full"),
        teacher_cache=TeacherCacheConfig(),  # no disk is rehearsed
        precision=replace(config.precision, student_fp8=Fp8Config(), teacher_fp8=Fp8Config()),
        evaluation=replace(config.evaluation, problems=0),
        survival=replace(config.survival, watchdog_minutes=0.0),
        checkpoint=replace(config.checkpoint, asynchronous=False),
    )


def under_way(config: TrainConfig) -> int:
    """Micro-batches that keep a pipeline full; its first stage then holds as many as it ever will."""
    parallel = config.parallel
    return parallel.pipeline * (2 if parallel.virtual_pipeline > 1 else 1)


def full_rows(config: TrainConfig) -> list[int]:
    """Lengths of responses that fill a micro-batch: the longest that there can be, and what is left beside it."""
    prompt, longest = config.rollout.max_prompt_len, config.horizon.max_len
    left = config.parallel.microbatch_tokens * config.parallel.context - (prompt + longest) - prompt
    return [longest, min(left, longest)] if left > 0 else [longest]


class Rehearsal:
    """One rank's. `watch` has what was seen."""

    def __init__(self, config: TrainConfig, nodes: int, rank: int) -> None:
        self.config, self.rank, self.world = config, rank, nodes * config.parallel.nproc
        self.watch = Watch()
        self.setting: Setting = setting_of(config, gpu_of(config), nodes)
        self.run: Any = None
        self.lost: list[str] = []  # gradients
        self.saved: dict[str, Saving] = {}  # by kind of checkpoint
        self.tokens = 0  # of the largest micro-batch of this rank
        self.predicting = 0  # of them, the ones that predict a response token
        self.microbatches = 0  # of this rank
        self.response_tokens = 0  # of all ranks
        self.teacher_tokens = 0  # of its largest micro-batch
        # Bytes of the teacher's hidden states: held when the last micro-batch is computed, and trained on.
        self.hidden_held = self.hidden_used = 0
        for spec in (self.setting.student, *(one.teacher for one in self.setting.of.values() or (self.setting,))):
            if spec.moe is not None:
                self.watch.routing[spec.moe.experts] = spec.moe.per_token

    @property
    def dtype(self) -> str:
        return self.config.precision.params

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Everything in here happens to one rank of a job that is not there."""
        import prune_opd.run as product
        from prune_opd.loss import distill_loss, training_loss
        from prune_opd.megatron import layout as layouts
        from prune_opd.rollout import engine
        from prune_opd.track.tracker import NullTracker

        stand_ins.Llm.ledger = self.watch.ledger
        stand_ins.Llm.memory, stand_ins.Llm.workspace = self.setting.gpu.memory, ENGINE_WORKSPACE
        stand_ins.Engine.lengths = full_rows(self.config)
        hint = self.config.teacher_prompt_limit if self.config.data.teacher_prompt else None
        prompts = stand_ins.Prompts(self.config.rollout.max_prompt_len, hint, tuple(self.config.teachers))
        stand_ins.put_in_place_of_vllm()
        resize, no_text = torch.UntypedStorage.resize_, SimpleNamespace(eos_token_id=machine.ENDS["student"])

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self.watch.ledger.resized(storage)
            return result

        def same_bytes(tensor: torch.Tensor) -> torch.Tensor:
            """In place of dlpack: the same bytes under a storage of their own, which is never counted."""
            with self.watch.ledger.not_counting():
                return torch.empty_like(tensor)

        def loss(*args: Any, **kwargs: Any) -> Any:
            before = self.watch.phase
            self.watch.enter(LOSS if before == "train" else before)
            try:
                return distill_loss(*args, **kwargs)
            finally:
                self.watch.enter(before)

        with (
            machine.job(self.rank, self.world),
            machine.numbers_from_the_host(),
            machine.marks_of_parameters(),
            kernels.of_a_gpu(),
            peers.answering(self.watch, self.setting.student, self.config, self.world),
            mock.patch.object(layouts, "initialize", lambda parallel, platform, seed: layouts.arrange(parallel, seed)),
            mock.patch.object(product, "make_sampler", lambda *_, **__: prompts.sampler()),
            mock.patch.object(product, "RolloutEngine", stand_ins.Engine),
            mock.patch.object(product, "Tracker", lambda *_: NullTracker()),
            mock.patch.object(product, "save_config", lambda *_: None),
            mock.patch.object(engine, "_answer_within", lambda seconds: None),
            mock.patch.object(platform.Platform, "taken", lambda machine: None),  # the books have it
            mock.patch.object(tokenizers, "load_tokenizer", lambda directory: no_text),  # none is read or written
            mock.patch.object(torch.UntypedStorage, "resize_", resize_),
            mock.patch.object(torch, "from_dlpack", same_bytes),
            mock.patch.object(training_loss, "distill_loss", loss),
            self.watch,
        ):
            yield

    def build(self, run_dir: Path) -> None:
        from prune_opd.run import prepare

        self.run = prepare(self.config, run_dir, "never")
        for one in getattr(self.run.teacher, "of", {"": self.run.teacher}).values():
            self.watch.traffic.names |= group_names(one.layout)
        self.label()
        (llm,) = stand_ins.Llm.made[-1:]
        weights = parameters(self.setting.student) * (
            1 if self.config.rollout.quantization else self.setting.weight_bytes
        )
        llm.take(weights / self.config.rollout.tensor_parallel)

    def label(self) -> None:
        """Say which part the run's tensors belong to, those of the optimizer that are made in the first step too."""
        from prune_opd.megatron.offload import optimizer_tensors

        run, ledger = self.run, self.watch.ledger
        trainer, teacher = run.trainer, run.teacher
        ledger.label(phases.STUDENT, [p for chunk in trainer.chunks for p in chunk.parameters()])
        ledger.label(phases.GRADIENTS, [b.grad_data for b in self._buffers()])
        ledger.label(phases.OPTIMIZER, optimizer_tensors(trainer.optimizer))
        for name, one in getattr(teacher, "of", {"": teacher}).items():
            ledger.label(phases.part_of(name), [p for chunk in one.chunks for p in chunk.parameters()])
            if run.layout.student.is_last_stage:
                ledger.label(phases.TEACHER_HEAD, [one.head_weight])

    def step(self) -> None:
        """The product's step, then a checkpoint's plan, then what comes before the next step."""
        from prune_opd.loop import step
        from prune_opd.megatron import optimizer_state

        run, watch = self.run, self.watch
        optimizer_state.prepare_to_load(run.trainer.optimizer)  # Adam's moments, as after the first step
        self.label()
        watch.written = {b.grad_data.untyped_storage()._cdata: set() for b in self._buffers()}
        enter = run.phases.enter

        def watched(phase: str) -> None:
            watch.enter(f"before {phase}")  # what leaves the device, and what comes back to it
            enter(phase)
            watch.enter(phase)

        deal = run.train_batch

        def dealt(*args: Any) -> Any:
            rollouts, batch = args[0], deal(*args)
            self.tokens = max(len(one.ids_N) for one in batch.microbatches)
            self.predicting = max(len(one.predicting_M) for one in batch.microbatches)
            self.microbatches = len(batch.microbatches)
            self.response_tokens = sum(rollouts.length_B)
            return batch

        for one in getattr(run.teacher, "of", {"": run.teacher}).values():
            self._watch_teacher(one)
        if self.config.teachers:
            self._watch_turns(run.teacher)
        model_config = run.trainer.chunks[0].config
        finalize = model_config.finalize_model_grads_func

        def finalized(*args: Any, **kwargs: Any) -> Any:
            self.lost += self._lost_gradients()  # now: the sums over ranks write to the buffers too
            return finalize(*args, **kwargs)

        model_config.finalize_model_grads_func = finalized
        run.phases.enter = run.sync.enter = watched
        run.train_batch = dealt
        step(run)
        run.phases.enter("checkpoint")
        groups, divided = run.layout.student.groups, self.config.parallel.distributed_optimizer
        for kind, any_layout in SAVED.items() if divided else [(ANY_LAYOUT, True)]:
            self.saved[kind] = saving_of(run.trainer.sharded_state(loading=False, any_layout=any_layout), groups)
        run.phases.enter("sync")

    def _watch_turns(self, teachers: Any) -> None:
        """Each turn is a phase of its own: `teacher NAME`."""
        turn, watch = teachers.turn, self.watch

        def turned(name: str) -> None:
            watch.enter(f"before {phases.part_of(name)}")
            turn(name)
            watch.enter(phases.part_of(name))

        teachers.turn = turned

    def _watch_teacher(self, teacher: Any) -> None:
        look, compute = teacher.look, teacher._compute

        def looked(*args: Any) -> Any:
            found = look(*args)
            self.hidden_used = sum(hidden.nbytes for hidden in found[0].of_row.values())
            return found

        def computed(rollouts: Any, deals: Any, sources: Any) -> Any:
            found = compute(rollouts, deals, sources)
            dealt = [rows for deal in deals for rows in deal[teacher.layout.teacher.dp_rank]]
            self.teacher_tokens = max(
                (sum(rollouts.teacher_row_length_B[row] for row in rows) for rows in dealt), default=0
            )
            last = set(dealt[-1]) if dealt else set()
            self.hidden_held = sum(hidden.nbytes for row, hidden in found.items() if row not in last)
            return found

        teacher.look, teacher._compute = looked, computed

    def _buffers(self) -> list[Any]:
        return [b for chunk in self.run.trainer.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def _lost_gradients(self) -> Iterator[str]:
        """Parameters whose gradient is not in megatron's buffer after a backward pass."""
        for chunk in self.run.trainer.chunks:
            for name, parameter in chunk.named_parameters():
                if not parameter.requires_grad:  # beside adapters
                    continue
                buffer = getattr(parameter, "main_grad", None)
                if buffer is None:
                    yield f"{name}: it has no main_grad"
                elif parameter.grad is not None:
                    yield f"{name}: a gradient was left in .grad"
                elif buffer.storage_offset() not in self.watch.written[buffer.untyped_storage()._cdata]:
                    yield f"{name}: nothing was added to its main_grad"


def group_names(layout: Any) -> dict[str, str]:
    """What to call a process group, by torch's name for it: that of the student, else that of the teacher."""
    import torch.distributed as dist

    names: dict[str, str] = {}
    for role in ("teacher", "student"):
        groups = getattr(layout, role).groups
        for name in ("dp_cp", "expt_dp", "tp_ep", "ep", "pp", "mp", "cp", "dp", "tp"):
            if (group := getattr(groups, name, None)) is not None:
                names[group.group_name] = f"{role} {name} ({group.size()})"
    assert dist.group.WORLD is not None
    names[dist.group.WORLD.group_name] = f"all ({dist.get_world_size()})"
    return names


def rehearse_rank(config: TrainConfig, nodes: int, rank: int, cut: Cut) -> Rehearsal:
    """Go through one step as one rank."""
    machine.prepare()
    with tempfile.TemporaryDirectory(prefix="prune-opd-") as folder:
        rehearsal = Rehearsal(reduced(config, nodes, cut, Path(folder) / "models"), nodes, rank)
        with rehearsal.stage():
            rehearsal.build(Path(folder) / "run")
            rehearsal.step()
    return rehearsal
