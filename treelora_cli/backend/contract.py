"""The whole contract between the core and a model family.

The core never asks which backend it has. A backend turns data into batches, batches into losses and a
trained task into tensors that a later prediction needs; it never touches the project directory, the
tree or the bandit.

Symbols: ``D`` adapted layers, ``r`` LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from treelora_cli.algorithm.kinds import TokenMoments
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.backend.values import (
        Change,
        DataRequest,
        ExportCheck,
        ExportOptions,
        Learned,
        Memory,
        Picture,
        Prediction,
        Score,
        Turn,
    )
    from treelora_cli.config import BaseConfig, Config

    Tensors = dict[str, torch.Tensor]


class TaskData(Protocol):
    """One task's examples, read and validated."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class or answer names in a fixed order; empty for free text."""

    @property
    def numbered(self) -> bool:
        """True when the labels are numbers without names, which mean something in their own file only."""

    @property
    def metric(self) -> str:
        """Name of the task's score, such as ``accuracy``."""

    @property
    def train_size(self) -> int:
        """Training examples."""

    @property
    def test_size(self) -> int:
        """Held-out examples; 0 when there are none."""

    @property
    def digest(self) -> str:
        """SHA-256 over the examples, hex."""

    @property
    def held_out(self) -> tuple[str, ...]:
        """Content hash of each held-out example, ``Recorded.DIGITS`` hex digits each."""

    @property
    def change(self) -> Change | None:
        """What differs from ``DataRequest.recorded``; ``None`` when nothing does, or nothing was recorded."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user: what was skipped, converted or split off."""

    @property
    def sample(self) -> str:
        """The first example as the model will see it."""

    @property
    def tokens(self) -> Sequence[tuple[str, bool]]:
        """The same token by token, and whether each is learned; empty where there are no tokens."""


STORED_KINDS = {"int64": "I64", "float64": "F64", "float32": "F32", "bfloat16": "BF16"}
"""Types of number that a project stores, with their names in safetensors."""


OTHERS = 9
"""Most answers named beside the chosen one."""


class TaskSession(Protocol):
    """One task while it is learned. The network's adapter slot is the core's; the rest is the session's."""

    def try_step(self, parameters: Sequence[torch.Tensor]) -> None:
        """Compute gradients of ``parameters`` on as many examples as are held at once, to measure arithmetic with."""

    def try_forward(self) -> None:
        """Do a part of the frozen pass, or the forward part of a step where there is none, for the same purpose."""

    def prepare(self) -> None:
        """Pass over the data once with the frozen base: statistics, prototypes, caches."""

    def probe_losses(self, count: int) -> Iterator[torch.Tensor]:
        """Yield up to ``count`` scalar losses of mini-batches at the shared reference point."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""

    def batches(self, epoch: int) -> Iterator[Any]:
        """Yield this process's share of each step's batch; the order depends on seed and epoch only."""

    def loss(self, batch: Any) -> torch.Tensor:
        """Return the task loss of a batch, a scalar mean over its examples."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained beyond the adapter."""

    def finish(self) -> Learned:
        """Collect what later predictions need, with the trained adapter in the slot."""


@runtime_checkable
class StatefulSession(Protocol):
    """A session that an interrupted task continues from by more than its parameters."""

    def state(self) -> Tensors:
        """Return it, tensors on the CPU; may be empty."""

    def load_state(self, saved: Tensors) -> None:
        """Continue from what ``state`` returned."""


@runtime_checkable
class ChoosingSession(Protocol):
    """A session whose gradient can be taken in more than one way: the device decides which is faster."""

    def gradient_ways(self) -> tuple[str, ...]:
        """Return the ways, after ``prepare``: first what is taken unless another is clearly faster; none: no choice."""

    def take_gradient(self, way: str) -> None:
        """Take every gradient in this way from now on."""

    def try_gradient(self, parameters: Sequence[torch.Tensor], *, longest: bool) -> None:
        """Compute gradients of ``parameters`` on one of the task's own batches, the longest or a middling one."""


@runtime_checkable
class BranchSession(Protocol):
    """A session that can share one adapter among tasks of a kind; the core asks for it where ``tree.branch`` does."""

    def token_moments(self) -> TokenMoments:
        """Return sums over the task's tokens in the frozen network, after ``prepare``."""

    def open_branch(self, name: str, *, ask: bool) -> None:
        """Try a branch of this name; with ``ask`` not if images kept out of the first epochs lose by it."""

    def join_branch(self, name: str | None) -> None:
        """Belong to a branch, or to the frozen features, and train nothing; the branch's adapter is in the slot."""


class Predictor(Protocol):
    """Answers without being told the task.

    For ``predict --threshold auto``, a predictor whose answers say how familiar an input is has a true attribute
    ``tells_familiarity``; one that itself tells inputs of no task (``task`` is ``None``, ``task_confidence`` is not),
    ``tells_foreign``.
    """

    def evaluate(self, task: TaskData) -> Score:
        """Score the held-out examples of a task over everything learned so far."""

    def predict(self, inputs: Sequence[str | Sequence[Turn] | Picture]) -> list[Prediction]:
        """Answer each input: a prompt, the messages of a chat, or an image, by its path or as it came over a wire."""


class ContenderModel(Protocol):
    """A whole network with one LoRA slot under a contender, as a user without this library would write it.

    Every adapted block runs for every view of every example: no prefix is cached and no frozen pass is made.
    What the head keeps between tasks lives in the object; the adapter is the strategy's.
    """

    def session(self, tasks: Sequence[TaskData], config: Config) -> TaskSession:
        """Open one task for learning, or several that are learned at once."""

    def learned(self) -> None:
        """Take what later answers need from the open session's data, with the trained adapter in the slot."""

    def evaluate(self, task: TaskData) -> Score:
        """Score the held-out examples of a task over everything learned so far, without being told the task."""

    def kept_bytes(self) -> int:
        """Return the bytes kept for later: adapters, heads and statistics."""


class Base(Protocol):
    """A loaded frozen model with one LoRA slot.

    A backend that keeps activations over epochs may say with a method ``kept_plan(task, config)`` where and how many:
    ``{"place": "device", "memory", "file" or "nowhere", "mib": ...}``; ``train-task --dry-run`` shows it.
    """

    @property
    def network(self) -> nn.Module:
        """The network with its adapter slot, which is read and written through ``treelora_cli.backend.adapters``."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted modules in network order, shape (D,)."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the frozen weights, hex."""

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able facts about the architecture, for ``state.json`` and ``status``."""

    def read_task(self, request: DataRequest) -> TaskData:
        """Read and validate a task's data.

        Raises:
            DataError: The data is missing, malformed or of the wrong kind.
        """

    def session(self, task: TaskData, memory: Memory, config: Config) -> TaskSession:
        """Open a task for learning."""

    def predictor(self, memory: Memory, inference: str) -> Predictor:
        """Return a predictor over everything in ``memory``.

        Args:
            memory: Everything learned.
            inference: One of the configuration's, or ``base``: the model without any adapter.

        Raises:
            UsageError: The backend cannot answer so.
        """

    def contender(self, head: str, config: Config) -> ContenderModel:
        """Return the network under one of the backend's ``contender_heads``.

        Only backends that declare the class attribute ``contender_heads``, a tuple of names, are asked.
        """

    def export_merged(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write one merged model that stock code loads into the empty directory ``out``."""

    def export_adapter(self, memory: Memory, task: str, out: Path) -> None:
        """Write one task's adapter that stock PEFT loads into the empty directory ``out``."""

    def load_line(self, out: Path, task: str | None) -> str:
        """Return the line of Python that loads an export with stock code."""

    def check_export(
        self, memory: Memory, out: Path, task: str | None, held_out: Sequence[tuple[str, TaskData]]
    ) -> ExportCheck:
        """Reload ``out`` with stock code (``task`` names an adapter export) and compare.

        A backend whose scoring is slow limits the examples of each task by an attribute ``export_examples``.
        """


@runtime_checkable
class FurtherExport(Protocol):
    """An export beside merged models and adapters; a base gives it by name, see ``ExportingBase``."""

    def write(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write everything learned into the empty directory ``out``."""

    def load_line(self, out: Path) -> str:
        """Return the line that loads it without this library."""

    def check(self, memory: Memory, out: Path, held_out: Sequence[tuple[str, TaskData]]) -> ExportCheck:
        """Load ``out`` without this library and compare."""


@runtime_checkable
class ExportingBase(Protocol):
    """A base with further exports: ``routed``, ``onnx``, ``gguf``."""

    def further_export(self, kind: str) -> FurtherExport:
        """Return the export of this name.

        Raises:
            UsageError: The backend has none such, or a package is missing.
        """


@runtime_checkable
class Backend(Protocol):
    """A model family, registered on the entry-point group ``treelora.backends``.

    A class attribute ``gpu_dtype`` names the type in which a new project's base is held on a GPU where the user says
    nothing; without it, and on a CPU, the backend's usual type. A method ``recognises(model)`` says that a model which
    the user named without a backend is of this family; without it, a project has to name the backend. A method
    ``defaults_on(facts)`` returns ``defaults()`` as they are on a loaded base of these ``Base.facts``; where
    ``train-task`` is told neither batch nor rate, they have the kind of ``device``, such as ``cuda``, too. A tuple
    ``honours`` names those of the settings in ``registry._OFF`` that its sessions act on; others are refused.
    ``divides_base = True`` says that ``load`` gives its blocks to ``runtime.shards`` where there are any.
    """

    name: str

    def defaults(self) -> Config:
        """Return the settings in which this family differs from ``config.DEFAULTS``."""

    def resolve_base(self, base: BaseConfig, *, offline: bool) -> BaseConfig:
        """Check the user's choice of model without loading it; local paths become absolute.

        Raises:
            ModelError: The model is unknown, or not available offline.
        """

    def load(self, config: Config, runtime: Runtime) -> Base:
        """Load the base and attach an adapter slot.

        Raises:
            ModelError: Weights are missing or do not fit.
        """
