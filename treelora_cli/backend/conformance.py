"""Check that a backend meets the contract, before anything is trained with it.

::

    registration -> settings -> model -> data and its options -> session -> what is handed over
                 -> predictions -> a second task -> exports

Every check either holds or tells in one line what is wrong. What others build on ends the examination: without a
session there are no tensors to look at.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.backend.contract import STORED_KINDS, Backend, Base, ExportingBase, Predictor, TaskData, TaskSession
from treelora_cli.backend.registry import missing_members
from treelora_cli.backend.values import DataRequest, ExportOptions, Learned, Memory, Score, TaskMemory, layout_of
from treelora_cli.config import BaseConfig, Config, resolve
from treelora_cli.config.fields import check_range
from treelora_cli.errors import DataError, TreeLoraError, UsageError, first_line

if TYPE_CHECKING:
    import torch

    from treelora_cli.backend.runtime import Runtime

_HEX = re.compile(r"[0-9a-f]{64}")
_NOBODYS = "no-such-name"
_FEW = 8
"""Examples of each class, or in all, that the examination learns from."""
_ANSWERS = ("routed", "latest", "merged", "base")


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: What was checked, as a statement of what should hold.
        problem: One line; ``None`` where it holds.
    """

    check: str
    problem: str | None


class _Unmet(Exception):
    """A check that does not hold; its text is the problem."""


class _Ended(Exception):
    """What is examined next cannot be had."""


def _hold(condition: object, problem: str) -> None:
    if not condition:
        raise _Unmet(problem)


class Examination:
    """One run of all checks; ``findings`` grows as they are made.

    Args:
        name: The backend's registration.
        backend: The backend.
        flags: Settings over the backend's own, such as the model.
        data: A task's data; without it nothing after loading the model is checked.
        load: Loads a base, as ``Backend.load`` does.
        runtime: Device and reporter.
        scratch: An empty directory for exports.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        flags: Config,
        data: Path | None,
        load: Callable[[Config], Base],
        runtime: Runtime,
        scratch: Path,
    ) -> None:
        self.name, self.backend, self.flags, self.data = name, backend, flags, data
        self.load, self.runtime, self.scratch = load, runtime, scratch
        self.findings: list[Finding] = []
        self.config: Config
        self.base: Base

    def run(self) -> list[Finding]:
        """Make every check that can be made."""
        try:
            self._registration()
            self._settings()
            self._model()
            if self.data is not None:
                task = self._task(self.data)
                self._options(self.data, task)
                memory = self._learn(task, Memory((), dict), "first")
                self._predictions(memory, task)
                memory = self._learn(task, memory, "second")
                self._answers(memory, task, str(self.config.inference))
                self._exports(memory, task)
                self._further_exports(memory, task)
        except _Ended:
            pass
        return self.findings

    @contextmanager
    def _check(self, check: str, *, needed: bool = False) -> Iterator[None]:
        problem = None
        try:
            yield
        except (_Unmet, TreeLoraError) as error:
            problem = str(error)
        except Exception as error:  # a backend under examination may raise anything
            problem = f"{type(error).__name__}: {first_line(error)}"
        self.findings.append(Finding(check, problem))
        if problem is not None and needed:
            raise _Ended

    def _members(self, thing: object, protocol: type[Any], without: tuple[str, ...] = ()) -> None:
        with self._check(f"{protocol.__name__} has every member", needed=True):
            lacking = missing_members(thing, protocol, without)
            _hold(not lacking, f"it lacks {', '.join(lacking)}")

    # -- the backend ----------------------------------------------------------------------------------

    def _registration(self) -> None:
        self._members(self.backend, Backend)
        with self._check("its name is the one it is registered by"):
            _hold(self.backend.name == self.name, f"it calls itself '{self.backend.name}', not '{self.name}'")
        with self._check("contender_heads, if any, are names"):
            heads = getattr(self.backend, "contender_heads", ())
            _hold(isinstance(heads, tuple) and all(isinstance(one, str) for one in heads), f"they are {heads!r}")

    def _settings(self) -> None:
        with self._check("defaults() are settings within their ranges", needed=True):
            defaults = self.backend.defaults()
            _hold(isinstance(defaults, Config), f"it returns {type(defaults).__name__}, not Config")
            _check_ranges(defaults)
            self.config = replace(resolve(self.flags, Config(), defaults), backend=self.name)
        with self._check("resolve_base accepts its own output", needed=True):
            first = self.backend.resolve_base(self.config.base, offline=self.runtime.offline)
            _hold(isinstance(first, BaseConfig), f"it returns {type(first).__name__}, not BaseConfig")
            second = self.backend.resolve_base(first, offline=self.runtime.offline)
            _hold(second == first, f"it makes {second} of {first}")
            self.config = replace(self.config, base=first)

    def _model(self) -> None:
        from torch import nn

        from treelora_cli.backend import adapters

        with self._check("the model loads", needed=True):
            self.base = self.load(self.config)
        self._members(self.base, Base, () if getattr(self.backend, "contender_heads", ()) else ("contender",))
        with self._check("the network has a LoRA slot on each of its layers", needed=True):
            layers = self.base.layers
            _hold(isinstance(layers, tuple) and layers, f"layers are {layers!r}, not a tuple of names")
            _hold(isinstance(self.base.network, nn.Module), "network is no torch module")
            adapters.slot_parameters(self.base.network, layers)
        with self._check("only the slot is trained, the base is frozen"):
            named = self.base.network.named_parameters()
            loose = [name for name, one in named if one.requires_grad and "lora_" not in name]
            _hold(not loose, f"'{(loose or [''])[0]}' asks for a gradient")
        with self._check("the fingerprint is a SHA-256 and the same when the model is loaded again"):
            again = self.load(self.config)
            _hold(_HEX.fullmatch(str(self.base.fingerprint)), f"it is {self.base.fingerprint!r}")
            _hold(again.fingerprint == self.base.fingerprint, "it changed: the weights are not the same twice")
            _hold(again.layers == self.base.layers, "the layers changed")
        with self._check("facts are JSON"):
            json.dumps(self.base.facts)

    # -- data -----------------------------------------------------------------------------------------

    def _task(self, data: Path) -> TaskData:
        request = DataRequest(path=data.absolute(), train_limit=_FEW, test_limit=_FEW, seed=0)
        with self._check("the data is read", needed=True):
            task = self.base.read_task(request)
        self._members(task, TaskData)
        with self._check("what is read of the data has the types of the contract", needed=True):
            _hold(isinstance(task.labels, tuple), f"labels are {type(task.labels).__name__}, not a tuple")
            _hold(all(isinstance(one, str) for one in task.labels), "labels are not names")
            _hold(isinstance(task.metric, str), f"metric is {task.metric!r}, not a name")
            _hold(type(task.train_size) is int and task.train_size > 0, f"train_size is {task.train_size!r}")
            _hold(type(task.test_size) is int, f"test_size is {task.test_size!r}")
            _hold(_HEX.fullmatch(str(task.digest)), f"digest is {task.digest!r}, not a SHA-256")
            _hold(isinstance(task.notes, tuple) and isinstance(task.sample, str), "notes or sample are of another type")
        with self._check("the same data read again is the same"):
            again = self.base.read_task(request)
            for part in ("digest", "labels", "train_size", "test_size"):
                _hold(getattr(again, part) == getattr(task, part), f"{part} changed")
        with self._check("the held-out part read alone is the same"):
            alone = self.base.read_task(DataRequest.from_json(json.loads(json.dumps(request.to_json()))))
            _hold(alone.test_size == task.test_size, f"{alone.test_size} examples, were {task.test_size}")
            _hold(alone.labels == task.labels, f"labels are {alone.labels}, were {task.labels}")
        return task

    def _options(self, data: Path, task: TaskData) -> None:
        plain = DataRequest(path=data.absolute(), seed=0)
        with self._check("data that is missing is a data error"):
            found = self._refused(replace(plain, path=data.absolute().parent / _NOBODYS), DataError)
            _hold(found is None, "it is read all the same")
        with self._check("--classes is honoured or refused"):
            found = self._refused(replace(plain, classes=(_NOBODYS,)), TreeLoraError)
            _hold(found is None, "a class that is not there is ignored in silence")
            if len(task.labels) > 2:
                some = self._refused(replace(plain, classes=task.labels[:2]), TreeLoraError)
                _hold(some is None or set(some.labels) == set(task.labels[:2]), "other classes are read, too")
        with self._check("--metric is honoured or refused"):
            found = self._refused(replace(plain, metric=_NOBODYS), TreeLoraError)
            _hold(found is None, "a score that is not known is ignored in silence")
        groups = max(1, len(task.labels))
        for option, size in (("train_limit", "train_size"), ("test_limit", "test_size")):
            with self._check(f"--{option.replace('_', '-')} is honoured or refused"):
                few = {"train_limit": None, "test_limit": None, option: 2}
                wanted = replace(plain, train_limit=few["train_limit"], test_limit=few["test_limit"])
                found = self._refused(wanted, TreeLoraError)
                count = 0 if found is None else getattr(found, size)
                _hold(count <= 2 * groups, f"2 were asked for, {count} examples of {groups} classes came")

    def _refused(self, request: DataRequest, kind: type[TreeLoraError]) -> TaskData | None:
        """Return what is read, ``None`` when it is refused with an error for people."""
        try:
            return self.base.read_task(request)
        except kind:
            return None

    # -- learning -------------------------------------------------------------------------------------

    def _learn(self, task: TaskData, memory: Memory, name: str) -> Memory:
        with self._check(f"the {name} task's session opens", needed=True):
            session = self.base.session(task, memory, self.config)
        if not memory.tasks:
            self._members(session, TaskSession)
        with self._check(f"the {name} task is learned", needed=True):
            self._train(session)
        with self._check(f"the {name} task hands over what can be stored", needed=True):
            learned = session.finish()
            _hold(isinstance(learned, Learned), f"finish() returns {type(learned).__name__}, not Learned")
            own, shared = _stored(learned.tensors, "tensors"), _stored(learned.shared(), "shared()")
            for key, (kind, _) in layout_of(shared).items():
                _hold(kind in STORED_KINDS, f"shared(): '{key}' is {kind}; a project stores {', '.join(STORED_KINDS)}")
            _hold(layout_of(learned.shared()) == layout_of(shared), "shared() is something else when it is read again")
            json.dumps(learned.facts)
        adapter = self._slot()
        stored = TaskMemory(name, task.labels, task.metric, lambda: adapter, lambda: own)
        return memory.with_task(stored, lambda: _copied(shared))

    def _slot(self) -> Any:
        from treelora_cli.backend import adapters

        scale = self.config.adapter.scale
        return adapters.read_slot(self.base.network, self.base.layers, scale)

    def _train(self, session: TaskSession) -> None:
        """Do what ``train-task`` does, in one step: reference point, frozen pass, probe, a step of the optimizer."""
        import torch

        from treelora_cli.backend import adapters

        assert self.config.seed is not None
        scale = self._slot().scale
        slot = adapters.slot_parameters(self.base.network, self.base.layers)
        adapters.write_slot(
            self.base.network,
            adapters.reference_point(self.base.network, self.base.layers, scale, self.config.seed),
        )
        ups = [up for _, up in slot]
        session.try_step(ups)
        session.try_forward()
        _hold(not any(bool(up.any()) for up in ups), "try_step or try_forward changed the adapter")
        session.prepare()
        losses = list(session.probe_losses(2))
        _hold(0 < len(losses) <= 2, f"probe_losses(2) gives {len(losses)}")
        for loss in losses:
            _scalar(loss, "a probe's loss")
            torch.autograd.grad(loss, ups)
        steps = session.steps_per_epoch
        _hold(type(steps) is int and steps > 0, f"steps_per_epoch is {steps!r}")
        batches = list(session.batches(0))
        _hold(len(batches) == steps, f"an epoch has {len(batches)} batches, steps_per_epoch is {steps}")
        first = self._loss(session, batches[0])
        own = session.parameters()
        _hold(all(one.requires_grad for one in own), "parameters() holds one that is not trained")
        trained = [one for pair in slot for one in pair] + own
        torch.autograd.backward(first)
        _hold(all(up.grad is not None for up in ups), "the loss does not reach the adapter")
        torch.optim.SGD(trained, lr=1e-3).step()
        for one in trained:
            one.grad = None
        same, again = self._loss(session, batches[0]), self._loss(session, next(iter(session.batches(0))))
        _hold(torch.equal(same, again), "the first batch of an epoch is another one when it is asked for again")

    def _loss(self, session: TaskSession, batch: Any) -> torch.Tensor:
        import torch

        torch.manual_seed(0)  # dropout
        loss = session.loss(batch)
        _scalar(loss, "the loss")
        return loss

    # -- answering ------------------------------------------------------------------------------------

    def _predictions(self, memory: Memory, task: TaskData) -> None:
        with self._check("an inference that is not known is refused"):
            try:
                self.base.predictor(memory, _NOBODYS)
            except UsageError:
                pass
            else:
                raise _Unmet("--inference is ignored in silence")
        for inference in _ANSWERS:
            self._answers(memory, task, inference)

    def _answers(self, memory: Memory, task: TaskData, inference: str) -> None:
        with self._check(f"{len(memory.tasks)} learned: --inference {inference} scores, or is refused"):
            try:
                predictor = self.base.predictor(memory, inference)
            except UsageError:
                _hold(inference != self.config.inference, "the backend refuses its own default")
                return
            lacking = missing_members(predictor, Predictor)
            _hold(not lacking, f"the predictor lacks {', '.join(lacking)}")
            score = predictor.evaluate(task)
            _hold(isinstance(score, Score), f"evaluate() returns {type(score).__name__}, not Score")
            _hold(0 <= score.value <= 1, f"the score is {score.value}, not in [0, 1]")
            _hold(score.count == task.test_size, f"{score.count} of {task.test_size} examples are scored")
            _hold(predictor.predict([]) == [], "predict([]) is not []")

    def _further_exports(self, memory: Memory, task: TaskData) -> None:
        if not isinstance(self.base, ExportingBase):
            return
        for kind in ("routed", "onnx", "gguf"):
            with self._check(f"--format {kind} exports and reloads, or is refused"):
                out = self.scratch / kind
                out.mkdir()
                try:
                    export = self.base.further_export(kind)
                    export.write(memory, out, ExportOptions())
                except UsageError:
                    continue
                _hold(any(out.iterdir()) and bool(export.load_line(out)), "nothing is written, or nothing loads it")
                check = export.check(memory, out, [(memory.tasks[-1].name, task)])
                _hold(check.passed, f"reloaded, it differs by {check.largest_difference:.2g}")

    def _exports(self, memory: Memory, task: TaskData) -> None:
        for kind, one in (("merged", None), ("adapter", memory.tasks[-1].name)):
            with self._check(f"--format {kind} exports and reloads, or is refused"):
                out = self.scratch / kind
                out.mkdir()
                try:
                    if one is None:
                        self.base.export_merged(memory, out, ExportOptions())
                    else:
                        self.base.export_adapter(memory, one, out)
                except UsageError:
                    continue
                _hold(any(out.iterdir()), "nothing is written")
                _hold(isinstance(self.base.load_line(out, one), str), "load_line() is not a line")
                check = self.base.check_export(memory, out, one, [(memory.tasks[-1].name, task)])
                _hold(check.passed, f"reloaded, it differs by {check.largest_difference:.2g}")


def _check_ranges(config: Config) -> None:
    for section, part in vars(config).items():
        if dataclasses.is_dataclass(part) and section != "stream":
            for key, value in vars(part).items():
                check_range(type(part), key, value, f"{section}.{key}")
        elif section != "stream":
            check_range(Config, section, part, section)


def _scalar(loss: torch.Tensor, what: str) -> None:
    _hold(loss.ndim == 0 and loss.is_floating_point(), f"{what} is no scalar: {loss.dtype} {list(loss.shape)}")
    _hold(bool(loss.isfinite()), f"{what} is not finite")


def _stored(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return tensors as a project would read them again."""
    import torch
    from safetensors.torch import load, save

    for name, one in tensors.items():
        _hold(isinstance(one, torch.Tensor), f"{where}: '{name}' is {type(one).__name__}, not a tensor")
        _hold(one.device.type == "cpu" and not one.requires_grad, f"{where}: '{name}' is not a plain tensor on the CPU")
        _hold(one.numel() == 0 or bool(one.isfinite().all()), f"{where}: '{name}' holds values that are not finite")
    return load(save(dict(tensors)))


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in tensors.items()}
