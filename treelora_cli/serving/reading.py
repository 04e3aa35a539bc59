"""From a request's body to inputs. What a request names is never opened as a file; images come as their bytes.

Three forms: JSON with ``inputs`` (prompts or chats) or ``images`` (base64), a form with files, one bare image.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from treelora_cli.backend.values import Picture
from treelora_cli.data.messages import read_messages
from treelora_cli.data.pixels import pixels_of
from treelora_cli.errors import DataError
from treelora_cli.learning.answering import Input
from treelora_cli.serving.limits import Limits, Refusal

if TYPE_CHECKING:
    from starlette.datastructures import Headers

JSON, FORM = "application/json", "multipart/form-data"
_BARE = "application/octet-stream"


def kind_of(headers: Mapping[str, str], *, images: bool) -> str:
    """Return the form in which a request's inputs come, by its content type.

    Raises:
        Refusal: 415, it is none that this project takes.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "A body is taken as it is, without Content-Encoding.")
    if kind == JSON or (images and (kind in (FORM, _BARE) or kind.startswith("image/"))):
        return kind
    taken = f"{FORM} (files), image/* (one image) or {JSON} with 'images'" if images else f"{JSON} with 'inputs'"
    raise Refusal(415, f"Content-Type {kind[:80] or 'missing'}: this project takes {taken}.")


async def inputs_of(kind: str, headers: Headers, body: bytes, limits: Limits, *, images: bool) -> list[Input]:
    """Return the inputs that a body holds.

    Raises:
        Refusal: 413, they are too many or too large; 422, they cannot be read.
    """
    from starlette.concurrency import run_in_threadpool

    if kind == FORM:
        pictures = await _files(headers, body, limits)
        return await run_in_threadpool(_checked, pictures, limits)
    return await run_in_threadpool(_parsed, kind, body, limits, images)


def _parsed(kind: str, body: bytes, limits: Limits, images: bool) -> list[Input]:
    if kind == JSON:
        found = _listed(_document(body), "images" if images else "inputs", limits)
        if not images:
            return [_text(one, number) for number, one in enumerate(found, start=1)]
        return _checked([_decoded(one, number) for number, one in enumerate(found, start=1)], limits)
    return _checked([Picture("image", body)], limits)


# -- JSON ------------------------------------------------------------------------------------------


def _document(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except UnicodeDecodeError as error:
        raise Refusal(422, f"The body is not UTF-8 text (byte {error.start}).") from error
    except ValueError as error:
        raise Refusal(422, f"Invalid JSON ({error}).") from error
    except RecursionError as error:
        raise Refusal(422, "JSON nested too deeply.") from error
    if not isinstance(found, dict):
        raise Refusal(422, "Expected a JSON object.")
    return found


def _listed(document: dict[str, Any], key: str, limits: Limits) -> list[Any]:
    """Return the inputs of a document that holds them and nothing else."""
    if set(document) != {key}:
        unknown = sorted(set(document) - {key})
        got = f"got {_shown(unknown[0])}" if unknown else "it is missing"
        raise Refusal(422, f"Expected a JSON object with '{key}' alone; {got}.")
    found = document[key]
    if not isinstance(found, list) or not found:
        raise Refusal(422, f"'{key}' is a list of one or more.")
    _check_number(len(found), limits)
    return found


def _check_number(count: int, limits: Limits) -> None:
    if count > limits.items:
        raise Refusal(413, f"More than {limits.items} inputs in one request. Send them in several.")


def _text(one: Any, number: int) -> Input:
    where = f"input {number}"
    try:
        json.dumps(one, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal(422, f"{where}: half of a surrogate pair, which is no text.") from error
    if isinstance(one, str):
        if not one.strip():
            raise Refusal(422, f"{where} is empty.")
        return one
    if not isinstance(one, list):
        raise Refusal(422, f"{where}: expected a text, or a list of messages with role and content.")
    try:
        return read_messages(one, where)
    except DataError as error:
        raise Refusal(422, str(error)) from error


def _decoded(one: Any, number: int) -> Picture:
    if not isinstance(one, str):
        raise Refusal(422, f"image {number}: expected base64 text.")
    text = one.partition(",")[2] if one.startswith("data:") else one
    try:
        return Picture(f"image {number}", base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Refusal(422, f"image {number}: not base64 ({error}).") from error


# -- images ----------------------------------------------------------------------------------------


async def _files(headers: Headers, body: bytes, limits: Limits) -> list[Picture]:
    """Return the files of a form; names are for messages only."""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(headers, whole(), max_files=limits.items, max_fields=8)
    parser.spool_max_size = limits.body  # the body is in memory already, and goes to no disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            _check_number(limits.items + 1, limits)
        raise Refusal(422, f"The form cannot be read: {error.message}") from error
    except (ValueError, KeyError, LookupError, UnicodeError) as error:
        raise Refusal(422, f"The form cannot be read ({type(error).__name__}).") from error
    found = []
    for key, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise Refusal(422, f"Field {_shown(key)} is no file. With curl: -F image=@photo.jpg")
        name = _shown(value.filename or "image")
        found.append(Picture(name, await value.read()))
        await value.close()
    if not found:
        raise Refusal(422, "The form holds no file. With curl: -F image=@photo.jpg")
    return found


def _checked(pictures: list[Picture], limits: Limits) -> list[Input]:
    """Look at the head of each image: what claims more pixels than allowed is never decoded."""
    for one in pictures:
        try:
            count = pixels_of(one.data, one.name)
        except DataError as error:
            raise Refusal(422, str(error)) from error
        if count > limits.pixels:
            raise Refusal(413, f"{one.name}: more than {limits.pixels:,} pixels. Send it smaller.")
    return list(pictures)


def _shown(name: str) -> str:
    """Return a name from a request on one short line that every terminal shows."""
    return ascii(name)[1:-1][:80]
