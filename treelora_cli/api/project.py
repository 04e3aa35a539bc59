"""What can be done with a project: open or create it, learn, go back, answer, ship."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.api.opened import Opened
from treelora_cli.api.values import BASE, Evaluation
from treelora_cli.config.by_name import from_names
from treelora_cli.errors import DataError, UsageError
from treelora_cli.project import Project as Stored

if TYPE_CHECKING:
    from treelora_cli.backend.runtime import Reporter, Runtime
    from treelora_cli.backend.values import Picture, Prediction, Turn
    from treelora_cli.learning.answering import Answerer
    from treelora_cli.learning.evaluation import HeldOut
    from treelora_cli.learning.export import ExportReport, ExportRequest
    from treelora_cli.learning.task import TaskReport
    from treelora_cli.learning.unknown import Threshold, Wanted


class Project(Opened):
    """A project directory, with its model loaded when first needed: what ``Opened`` shows, and all that can be done.

    Args:
        stored: The directory, as ``treelora_cli.project`` reads it.
        start: Starts device and processes; called once, when a call needs the model.
    """

    # -- open -----------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: str | Path = ".",
        *,
        device: str | None = None,
        offline: bool = False,
        reporter: Reporter | None = None,
    ) -> Project:
        """Open the project at ``directory`` or the nearest above it.

        Args:
            directory: Where to look.
            device: ``cpu``, ``cuda``, ``mps``; the best there is when ``None``.
            offline: Never ask the network.
            reporter: Shows notes and progress; nothing is shown when ``None``.

        Raises:
            ProjectError: There is no project, or it is damaged.
        """
        stored = Stored.open(Stored.locate(Path(directory).expanduser()))
        return cls(stored, _starter(device, offline, reporter))

    @classmethod
    def create(
        cls,
        directory: str | Path,
        *,
        backend: str | None = None,
        model: str | None = None,
        weights: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str | None = None,
        offline: bool = False,
        reporter: Reporter | None = None,
    ) -> Project:
        """Make a project around a frozen base model, as ``treelora init`` does.

        Args:
            directory: Absent or empty.
            backend: ``vit`` (the default) or ``causal-lm``.
            model: timm name, hub id, local directory or GGUF file; the embedded ViT when ``None``.
            weights: Local ``.safetensors`` for a model given by name.
            settings: More settings by full name, such as ``{"adapter.rank": 4}``.
            device: See ``open``.
            offline: See ``open``.
            reporter: See ``open``.

        Raises:
            TreeLoraError: Bad settings, a model that cannot be loaded, or a directory in use.
        """
        from treelora_cli.learning.opening import make_project

        start = _starter(device, offline, reporter)
        own = {"backend": backend, "base.model": model, "base.weights": None if weights is None else str(weights)}
        flags = from_names({**(settings or {}), **{key: value for key, value in own.items() if value is not None}})
        root = Path(directory).expanduser()
        return cls(make_project(root, flags, None, "settings", start()), start)

    def newest(self) -> Project:
        """Return another object at what was committed last, with the same loaded model; this one stays as it is."""
        other = Project(Stored.open(self.root), self._start)
        other._runtime, other._base = self._runtime, self._base
        return other

    # -- learn ----------------------------------------------------------------------------------------

    def train_task(
        self,
        data: str | Path,
        *,
        name: str | None = None,
        val: str | Path | None = None,
        classes: Sequence[str] | None = None,
        metric: str | None = None,
        columns: Mapping[str, str] | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
        settings: Mapping[str, Any] | None = None,
        evaluate: bool = True,
        abandon: bool = False,
    ) -> TaskReport:
        """Learn one more task and commit it; the earlier tasks' data is not needed.

        Args:
            data: Image folder, manifest or table.
            name: Task name; made of the data's when ``None``.
            val: Held-out data, when it lies elsewhere.
            classes: Only these classes of an image folder.
            metric: Score of the task; chosen from the data when ``None``.
            columns: Source column by the name expected.
            train_limit: Most training examples per class or task.
            test_limit: Most held-out examples per class or task.
            settings: Settings of this task by full name, such as ``{"train.epochs": 1}``.
            evaluate: Score every task afterwards.
            abandon: Give up a task that was interrupted, which otherwise is an error.

        Raises:
            TreeLoraError: Bad data, no memory, another writer, ...; the project is as before.
        """
        from treelora_cli.backend.values import DataRequest
        from treelora_cli.learning.evaluation import Scored
        from treelora_cli.learning.new_task import task_name
        from treelora_cli.learning.task import learn_task

        path = Path(data).expanduser().absolute()
        request = DataRequest(
            path=path,
            val=None if val is None else Path(val).expanduser().absolute(),
            classes=None if classes is None else tuple(classes),
            columns=dict(columns or {}),
            metric=metric,
            train_limit=train_limit,
            test_limit=test_limit,
            seed=self._stored.state.fixed["seed"],
        )
        chosen = task_name(name, path)
        self._stored.check_free(chosen)
        config = self._config(settings)
        with self._writing(f"train-task {chosen}") as stored:
            base = self._loaded(config)
            report = learn_task(
                stored,
                base,
                request,
                chosen,
                config,
                self.runtime,
                evaluate=Scored.ALL if evaluate else Scored.NONE,
                resume=False,
                abandon=abandon,
            )
        self.reload()
        return report

    @contextmanager
    def _writing(self, purpose: str) -> Iterator[Stored]:
        """Hold the writer's lock; of several processes the main one does."""
        if not self.runtime.is_main:
            yield self._stored
            return
        with self._stored.lock(purpose) as stored:
            yield stored

    def rollback(self, task: str) -> tuple[str, ...]:
        """Return to the exact state before ``task`` was learned.

        Returns:
            The tasks undone: ``task`` and every later one. ``treelora rollback --undo`` brings them back.

        Raises:
            TreeLoraError: No such task, or that state is not kept any more.
        """
        before = self.tasks
        with self._stored.lock(f"rollback {task}") as stored:
            self._enter(stored.rollback(task))
        return before[len(self.tasks) :]

    # -- answer ---------------------------------------------------------------------------------------

    def evaluate(
        self,
        *,
        tasks: Sequence[str] | None = None,
        inference: str | None = None,
        limit: int | None = None,
        changed_data: bool = False,
        places: Mapping[str, Path] | None = None,
    ) -> Evaluation:
        """Score the held-out data of learned tasks over everything learned, no task identity given, and watch sets.

        Args:
            tasks: Only these; all, and every watch set, when ``None``.
            inference: ``routed``, ``latest`` or ``merged``; ``base``: the untouched language model.
            limit: Most held-out examples per class or task.
            changed_data: Also score tasks whose held-out data changed, on what is there.
            places: Where some tasks' data lies now, by task.

        Raises:
            UsageError: Nothing is learned, or no such task.
            DataError: No task's held-out data is there.
        """
        from treelora_cli.learning.evaluation import measured_alike, read_held_out, score_tasks
        from treelora_cli.learning.gate import of_sets, of_tasks, watched

        self._stored.check_learned()
        wanted = [self._stored.entry(name).name for name in (self.tasks if tasks is None else tasks)]
        for name in places or {}:
            self._stored.entry(name)
        config = self._config({} if inference in (None, BASE) else {"inference": inference})
        base = self._loaded(config)
        records = {name: self._stored.task_record(name) for name in wanted}
        held_out = tuple(read_held_out(base, records, limit, changed_data=changed_data, places=places))
        self._say(held_out)
        if not any(one.data for one in held_out):
            raise DataError(f"No task can be scored. {held_out[0].name}: {held_out[0].problem}")
        chosen = BASE if inference == BASE else str(config.inference)
        sets = self._stored.watch() if tasks is None else ()
        every = [*held_out, *watched(base, sets, self.runtime.reporter, limit)]
        everything = score_tasks(base, self._stored.memory(), chosen, every)
        scores = of_tasks(everything)
        now = {name: score.value for name, score in scores.items()}
        how = None if chosen == BASE else chosen
        compared = {
            one.name for one in held_out if measured_alike(one, records[one.name], how, changed_data=changed_data)
        }
        if len(compared) < len(now):
            self.runtime.reporter.note("'-': other examples, or answered in another way, than when it was learned.")
        standing = self._stored.matrix().standing(now, wanted, compared)
        return Evaluation(chosen, standing, scores, held_out, of_sets(everything))

    def _say(self, held_out: Iterable[HeldOut]) -> None:
        for one in held_out:
            if one.data is None:
                self.runtime.reporter.note(f"Task '{one.name}' is not scored: {one.problem}")
            elif one.changed:
                self.runtime.reporter.note(f"Task '{one.name}': {one.changed}.")

    def predict(
        self,
        inputs: Sequence[str | Path | Sequence[Turn] | Picture],
        *,
        inference: str | None = None,
        threshold: float | str | None = None,
    ) -> list[Prediction]:
        """Answer images or prompts, without being told the task.

        Args:
            inputs: Paths of images or images in memory, prompts, or chats as sequences of turns.
            inference: ``routed``, ``latest`` or ``merged``; the project's own when ``None``.
            threshold: Say ``unknown`` below it: a probability, or ``auto`` for what 5 of 100 held-out examples of the
                project's own fall below (``auto:1``: 1 of 100).

        Raises:
            UsageError: Nothing is learned, or no such threshold can be had.
            DataError: An input cannot be read or is too long.
        """
        return [answer for _, answer in self.answers(inputs, inference=inference, threshold=threshold)]

    def answers(
        self,
        inputs: Iterable[str | Path | Sequence[Turn] | Picture],
        *,
        inference: str | None = None,
        threshold: float | str | None = None,
        bad: list[str] | None = None,
    ) -> Iterator[tuple[str, Prediction]]:
        """As ``predict``, but hand out each input with its answer as they come.

        The model is loaded at once, inputs are taken and answered some at a time. Those that cannot be read are left
        out where a list is given that takes a line on each.
        """
        answerer = self.answerer(inference=inference, threshold=threshold)
        given = (str(one) if isinstance(one, Path) else one for one in inputs)
        return answerer.each(list(given) if isinstance(inputs, Sequence) else given, bad)

    def answerer(self, *, inference: str | None = None, threshold: float | str | None = None) -> Answerer:
        """Load the model and return what answers with it, at the state that this object is at now.

        Args:
            inference: See ``predict``.
            threshold: See ``predict``.

        Raises:
            UsageError: Nothing is learned, or no such threshold can be had.
        """
        from treelora_cli.learning.answering import Answerer
        from treelora_cli.learning.evaluation import blamed
        from treelora_cli.learning.unknown import wanted

        asked = None if threshold is None else wanted(threshold)
        self._stored.check_learned()
        config = self._config({} if inference is None else {"inference": inference})
        base, chosen = self._loaded(config), str(config.inference)
        if chosen not in self._answerers:
            memory = self._stored.memory()
            with blamed(memory):
                predictor = base.predictor(memory, chosen)
            self._answerers[chosen] = Answerer(chosen, predictor, memory, self.runtime.reporter)
        found = self._answerers[chosen]
        return found if asked is None else replace(found, threshold=self._threshold(asked, found))

    def _threshold(self, asked: Wanted, answerer: Answerer) -> Threshold:
        """Return the threshold in this project's own figures; held-out examples are scored where none are stored."""
        from treelora_cli.learning.unknown import Threshold, own_share

        if asked.own is None:
            return Threshold(probability=asked.probability)
        if getattr(answerer.predictor, "tells_foreign", False):
            return Threshold()
        if not getattr(answerer.predictor, "tells_familiarity", False):
            raise UsageError(
                f"--threshold auto: answered as {answerer.inference}, nothing says how familiar an input is."
                " Give a probability, such as --threshold 0.5."
            )
        familiar = [value for one in self._stored.answers().values() for value in one.familiar]
        if not familiar:
            self.runtime.reporter.note("No familiarity is stored yet: the held-out examples are scored first.")
            scores = self.evaluate(inference=answerer.inference).scores.values()
            familiar = [value for one in scores if one.answers is not None for value in one.answers.familiar]
        return Threshold(familiarity=own_share(familiar, asked.own))

    def inference(self, given: str | None = None) -> str:
        """Return how answers are made: as ``given``, else as the project's settings say."""
        return str(self._config({} if given is None else {"inference": given}).inference)

    # -- ship -----------------------------------------------------------------------------------------

    def export(
        self,
        out: str | Path,
        *,
        kind: str = "merged",
        task: str | None = None,
        dtype: str = "float32",
        verify: bool = True,
        force: bool = False,
        limit: int | None = None,
    ) -> ExportReport:
        """Write what timm, transformers, peft or onnxruntime loads without treelora.

        Args:
            out: Directory to write, absent or empty.
            kind: ``merged``, ``adapter``, ``routed``, ``gguf`` or ``onnx``.
            task: Task of an adapter; the latest when ``None``.
            dtype: Type of the saved weights.
            verify: Reload with stock code and compare.
            force: Replace an earlier export.
            limit: Most held-out examples per class or task in the comparison.

        Raises:
            UsageError: Unknown kind or task, or ``out`` is in use.
            ResourceError: The disk is full.
        """
        from treelora_cli.backend.values import ExportOptions
        from treelora_cli.learning.export import ExportRequest

        options = ExportOptions(dtype=dtype)
        return self.write_export(ExportRequest(Path(out).expanduser(), kind, task, options, verify, force, limit))

    def write_export(self, request: ExportRequest) -> ExportReport:
        """As ``export``, of a complete request."""
        from treelora_cli.learning.export import write_export

        request.check(self._stored)
        config = self._config()
        return write_export(self._stored, self._loaded(config, exact=True), request, str(config.inference))


def _starter(device: str | None, offline: bool, reporter: Reporter | None) -> Callable[[], Runtime]:
    def start() -> Runtime:
        import os

        from treelora_cli.backend.runtime import Silent, open_runtime, quiet_libraries

        quiet_libraries()
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        return open_runtime(device, offline=offline, reporter=reporter or Silent())

    return start
