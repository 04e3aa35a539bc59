"""What a folder of labelled files means: parts, classes, wrappers; what cannot be told is refused.

===============================  ==================================================
laid out as                      read as
===============================  ==================================================
``CLASS/*``                      classes; files in folders below belong to the class
``train/CLASS``, ``test/CLASS``  parts of classes, by any name in ``data.names``
``CLASS/train``, ``CLASS/test``  the same, turned inside out
``train_CLASS``, ``test_CLASS``  the same, in one name
``ANY/`` around one of these     the one inside
``train/CLASS``, ``test/*``      the part without class folders is left out and said
``images/*``, ``masks/*``        no classes
===============================  ==================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from treelora_cli.data.folders import Folder, Passed
from treelora_cli.data.names import (
    TEST,
    TRAIN,
    VAL,
    copied_from,
    label_key,
    one_spelling,
    part_of,
    parts_among,
    parts_and_classes,
    say_files,
    says_about_pictures,
    says_files,
    says_leftover,
    says_no_class,
    says_unlabelled,
    shared_words,
    surely_unlabelled,
    tidy_label,
)
from treelora_cli.errors import DataError

_SHOWN = 6
_NEXT = "Put them into folders CLASS/*.png, or write a table of path,label."

Labelled = tuple[str, Path]
"""Class name and file."""


class NoLabelError(DataError):
    """Files of the wanted kind, and no folder that names a class: a table may name them."""


@dataclass(frozen=True)
class Layout:
    """Labelled files by part."""

    train: list[Labelled]
    test: list[Labelled]


def read_layout(folder: Folder, classes: Sequence[str] | None, passed: Passed, kind: str) -> Layout:
    """Tell classes and parts.

    Args:
        folder: What ``scan`` found.
        classes: The classes asked for by name, which settle what would be ambiguous.
        passed: Takes notes.
        kind: Names the files, as in "images".

    Raises:
        DataError: No classes, or more than one way to read it; the message says what was seen.
    """
    reader = _Reader(None if classes is None else {tidy_label(name) for name in classes}, passed, kind, folder.path)
    layout = reader.read(folder)
    spelling = one_spelling(label for label, _ in [*layout.train, *layout.test])
    changed = sorted({name for name, kept in spelling.items() if tidy_label(name) != kept})
    if changed:
        shown = ", ".join(f"'{name}' as '{spelling[name]}'" for name in changed[:_SHOWN])
        passed.notes.append(f"Class names that differ only in case or Unicode form are one class: {shown}.")
    return Layout(
        [(spelling[label], file) for label, file in layout.train],
        [(spelling[label], file) for label, file in layout.test],
    )


def val_unused(count: int, kind: str) -> str:
    """Return what to tell where a test part makes the validation part superfluous."""
    return f"Scored on the test part; the validation part ({count} {kind}) is unused."


class _Reader:
    def __init__(self, classes: set[str] | None, passed: Passed, kind: str, root: Path) -> None:
        self.classes = classes
        self.passed = passed
        self.kind = kind
        self.root = root

    def read(self, folder: Folder) -> Layout:
        """Read a folder of parts, of classes, or around one of these."""
        if self._asked_for(folder):
            return Layout(self._classes(folder), [])
        folder = self._labelled(folder)
        names = [inner.name for inner in folder.inner]
        meant, shared = parts_among(names), shared_words(names)
        parts = [inner for inner in folder.inner if meant[inner.name] is not None]
        if not parts:
            return self._read_without_parts(folder)
        others = []
        for inner in (inner for inner in folder.inner if inner not in parts):
            if says_unlabelled(inner.name, shared) or says_about_pictures(inner.name):
                self._leave(inner, "says that it has no labels")
            elif self._is_unlabelled(inner) and self._are_train_and_test(parts, meant):
                self._leave(inner, "has no class folders")
            else:
                others.append(inner)
        if not others:
            return self._read_parts(parts, meant)
        if len(parts) == 1 and all(not inner.inner for inner in folder.inner):
            return Layout(self._classes(folder), [])  # a class that is called train, among others
        if len(parts) > 1:
            raise self._ambiguous(
                folder,
                f"'{others[0].name}' is no part that is known. Give {self._best(parts, meant, others[0])}, or name",
            )
        best = self._best(parts, meant, others[0])
        raise self._ambiguous(folder, f"is '{parts[0].name}' a part or a class? Give {best}, or name")

    @staticmethod
    def _best(parts: Sequence[Folder], meant: Mapping[str, str | None], other: Folder) -> Path:
        """Return the folder to learn from, perhaps: the training part, else the one that is no held-out part."""
        return next((part for part in parts if meant[part.name] == TRAIN), other).path

    def _labelled(self, folder: Folder) -> Folder:
        """Return the folder without folders in it that say they are unlabelled, unless there are no others."""
        left = {inner.path: "says that it has no labels" for inner in folder.inner if surely_unlabelled(inner.name)}
        left |= {inner.path: "is no class by its name" for inner in folder.inner if says_leftover(inner.name)}
        if not left or len(left) == len(folder.inner):
            return folder
        for inner in folder.inner:
            if inner.path in left:
                self._leave(inner, left[inner.path])
        return replace(folder, inner=tuple(inner for inner in folder.inner if inner.path not in left))

    def _are_train_and_test(self, parts: Sequence[Folder], meant: Mapping[str, str | None]) -> bool:
        """True when there is a training part with class folders and a held-out part: nothing beside them is a class."""
        kinds = {meant[part.name] for part in parts}
        train = (part for part in parts if meant[part.name] == TRAIN)
        return len(kinds) > 1 and any(not self._is_unlabelled(part) for part in train)

    def _asked_for(self, folder: Folder) -> bool:
        return self.classes is not None and self.classes <= {tidy_label(inner.name) for inner in folder.inner}

    def _read_without_parts(self, folder: Folder) -> Layout:
        inside = [inner for inner in folder.inner if inner.inner and not inner.files]
        if len(folder.inner) == 1 and inside:
            self.passed.notes.append(f"{folder.path} holds one folder; read was {inside[0].path}.")
            return self.read(inside[0])
        if named := parts_and_classes(inner.name for inner in folder.inner):
            return self._read_named(folder, named)
        divided = [inner for inner in folder.inner if self._parts_in(inner)]
        if not divided:
            return Layout(self._classes(folder), [])
        if len(divided) == len(folder.inner) and not any(self._unfiled(inner).files for inner in divided):
            return self._turned(divided)
        raise self._ambiguous(folder, f"only a part of {divided[0].path} is in folders of parts. Name")

    def _read_named(self, folder: Folder, named: Mapping[str, tuple[str, str]]) -> Layout:
        """Read ``train_CLASS`` and ``test_CLASS``."""
        found: dict[str, list[Labelled]] = {TRAIN: [], TEST: [], VAL: []}
        for inner in folder.inner:
            part, label = named[inner.name]
            found[part] += [(label, file) for file in inner.all_files()]
        name, (part, label) = next(iter(named.items()))
        self.passed.notes.append(f"{name}/ is the part '{part}' of class '{label}', the other folders likewise.")
        return self._with_held_out(found)

    @staticmethod
    def _unfiled(folder: Folder) -> Folder:
        """Return the folder inside ones that say no more than ``images``."""
        while len(folder.inner) == 1 and not folder.files and says_files(folder.inner[0].name):
            folder = folder.inner[0]
        return folder

    def _parts_in(self, folder: Folder) -> Sequence[Folder]:
        """Return the folders of parts in a class folder, if it holds no other folders."""
        inner = self._unfiled(folder).inner
        return inner if all(part_of(one.name) is not None and not one.inner for one in inner) else ()

    def _turned(self, classes: Sequence[Folder]) -> Layout:
        """Read ``CLASS/train`` and ``CLASS/test``."""
        found: dict[str, list[Labelled]] = {TRAIN: [], TEST: [], VAL: []}
        for folder in classes:
            for inner in self._parts_in(folder):
                found[str(part_of(inner.name))] += [(folder.name, file) for file in inner.all_files()]
        return self._with_held_out(found)

    def _read_parts(self, parts: Sequence[Folder], meant: Mapping[str, str | None]) -> Layout:
        found: dict[str, list[Labelled]] = {TRAIN: [], TEST: [], VAL: []}
        for folder in parts:
            part = meant[folder.name]
            assert part is not None
            if self._is_unlabelled(folder):
                self._leave(folder, "has no class folders")
            else:
                found[part] += self._classes(self._unwrapped(folder))
        if not any(found.values()):
            seen = ", ".join(f"{folder.name}/ ({len(folder.all_files())})" for folder in parts)
            raise NoLabelError(
                f"{self.root}: {self.kind} in {seen} but no class folders in them; there is no label. {_NEXT}"
            )
        train = next((folder for folder in parts if meant[folder.name] == TRAIN), None)
        if train is not None and not found[TRAIN]:
            labelled = next(folder for folder in parts if not self._is_unlabelled(folder))
            raise NoLabelError(
                f"{train.path} has no class folders: there is no label to learn from. To learn from what is held out,"
                f" give {labelled.path}."
            )
        return self._with_held_out(found)

    def _with_held_out(self, found: dict[str, list[Labelled]]) -> Layout:
        train, test, val = found[TRAIN], found[TEST], found[VAL]
        if not train:
            if test and val:
                raise DataError(f"{self.root}: there are held-out parts and no labelled training part.")
            return Layout(test or val, [])
        if test and val:
            self.passed.notes.append(val_unused(len(val), self.kind))
        return Layout(train, test or val)

    def _unwrapped(self, folder: Folder) -> Folder:
        """Return the folder whose folders are the classes of a part."""
        while len(folder.inner) == 1 and not folder.files and folder.inner[0].inner and not folder.inner[0].files:
            folder = folder.inner[0]
        return folder

    def _is_unlabelled(self, folder: Folder) -> bool:
        inner = self._unwrapped(folder).inner
        if len(inner) != 1 or inner[0].inner:
            return not inner
        return says_no_class(inner[0].name) or inner[0].name == folder.name

    def _classes(self, folder: Folder) -> list[Labelled]:
        """Take each folder in ``folder`` as a class."""
        if not self._asked_for(folder):
            folder = replace(folder, inner=tuple(map(self._without_masks, folder.inner)))
        if not self._asked_for(folder):
            self._refuse_two_levels(folder)
            folder = self._named(folder)
        if folder.files and folder.inner:
            self.passed.notes.append(f"{len(folder.files)} {self.kind} beside the class folders were left out.")
        self._say_nested(folder)
        wanted = [inner for inner in folder.inner if self.classes is None or tidy_label(inner.name) in self.classes]
        return [(inner.name, file) for inner in wanted for file in inner.all_files()]

    def _refuse_two_levels(self, folder: Folder) -> None:
        """Raise ``DataError`` where folders and the folders in them could be the classes."""
        nested = [inner for inner in folder.inner if not self._unfiled(inner).files]
        branching = [inner for inner in nested if len(self._unfiled(inner).inner) > 1]
        if branching and len(nested) == len(folder.inner):
            raise self._ambiguous(folder, f"two levels of folders could be classes. Give {nested[0].path}, or name")
        for inner in branching:
            beside = {label_key(one.name) for one in folder.inner if one is not inner}
            repeated = [one.name for one in self._unfiled(inner).inner if label_key(one.name) in beside]
            if repeated:
                raise self._ambiguous(
                    folder, f"'{repeated[0]}' is here and in {inner.path}, too. Give that, remove one of them, or name"
                )
            if says_files(inner.name):
                raise self._ambiguous(
                    folder, f"is '{inner.name}' a class, or what is in it? Give {inner.path}, or name"
                )

    def _say_nested(self, folder: Folder) -> None:
        """Say which classes take their pictures from several folders."""
        nested = [inner for inner in folder.inner if inner.inner and (inner.files or len(inner.inner) > 1)]
        for inner in nested[:_SHOWN]:
            seen = ", ".join(f"{one.name}/" for one in inner.inner[:_SHOWN])
            self.passed.notes.append(f"{self.kind.capitalize()} in folders of {inner.path} ({seen}) are of its class.")

    def _named(self, folder: Folder) -> Folder:
        """Return the folder without folders in it that say they are unlabelled.

        Raises:
            NoLabelError: The names of those that are left tell of no class.
        """
        folder = self._labelled(folder)
        self._refuse_copies(folder)
        names = [inner.name for inner in folder.inner]
        if len(names) == 1 and says_no_class(names[0]):
            raise NoLabelError(
                f"{folder.path}: {self.kind} in {names[0]}/ only, which names no class; there is no label. {_NEXT}"
            )
        about = any(map(says_files, names)) and all(says_files(name) or says_about_pictures(name) for name in names)
        if about or say_files(names):
            seen = ", ".join(f"{name}/" for name in names[:_SHOWN])
            raise NoLabelError(
                f"{folder.path}: {self.kind} in {seen}, which name no classes. If they do, name them with --classes."
            )
        return folder

    def _refuse_copies(self, folder: Folder) -> None:
        """Raise ``DataError`` when a class folder is a file manager's copy of another one."""
        names = {inner.name for inner in folder.inner}
        for name in sorted(names):
            if copied_from(name) in names:
                raise DataError(
                    f"{folder.path}: '{name}' seems to be a copy of '{copied_from(name)}'. Remove one of them, or name"
                    " the classes with --classes."
                )

    def _without_masks(self, folder: Folder) -> Folder:
        """Return a class's folder without what belongs to its pictures, such as ``masks`` beside ``images``."""
        about = [inner for inner in folder.inner if says_about_pictures(inner.name)]
        others = [inner for inner in folder.inner if inner not in about]
        if not about or not (folder.files or others) or not all(says_files(inner.name) for inner in others):
            return folder
        for inner in about:
            self._leave(inner, "holds no pictures of the class")
        return replace(folder, inner=tuple(others))

    def _leave(self, folder: Folder, reason: str) -> None:
        count = len(folder.all_files())
        self.passed.notes.append(f"{folder.path} {reason}: its {count} {self.kind} were left out.")

    def _ambiguous(self, folder: Folder, question: str) -> DataError:
        seen = []
        for inner in folder.inner[:_SHOWN]:
            below = ", ".join(f"{one.name}/" for one in inner.inner[:3])
            seen.append(f"{inner.name}/ ({below or len(inner.files)})")
        more = ", ..." if len(folder.inner) > _SHOWN else ""

        return DataError(f"{folder.path} holds {', '.join(seen)}{more}: {question} --classes of this level.")
