"""Answer prompts as the project did that wrote this directory, with transformers, peft and safetensors.

::

    python predict.py "a prompt" ...
    python predict.py --base /where/the/base/lies --messages chat.json

    from predict import Routed
    answer = Routed("DIRECTORY").answer("a prompt")

Nothing of treelora is needed. The frozen base reads the bare input; a linear router on its states says which task it is
from. Where that task's answers are a closed set that frozen states tell apart, its head answers; else its adapter does,
asked as its task was. An input that is from none of the tasks is answered by the untouched base.

Symbols: ``T`` tokens of an input, ``C`` width, ``F`` features.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

_BLANK_LINES = re.compile(r"^(\s*\n)+")
_TAIL = 24
_OPENING = 16
_LABEL_TOKENS = 128

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else the chat template reads."""


class _Reached(Exception):
    """The forward pass arrived at the last block that is read."""


class Routed:
    """Base, adapters, router and heads of one export.

    Args:
        folder: The directory that holds this file.
        base: Where the base model lies, if not where ``routed.json`` says: hub id, directory or GGUF file.
        device: Where to compute.
    """

    def __init__(self, folder: str | Path, base: str | None = None, device: str = "cpu") -> None:
        self.folder = Path(folder).resolve()
        self.device = torch.device(device)
        self.config: dict[str, Any] = json.loads((self.folder / "routed.json").read_text(encoding="utf-8"))
        self.tasks: list[dict[str, Any]] = self.config["tasks"]
        self.tensors = load_file(self.folder / "router.safetensors", device=device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(self.folder / "tokenizer"), trust_remote_code=False)
        self.model: Any = _load_base(self.config["base"], base, self.device)
        self.network: Any = None
        for path in self.config["adapters"]:
            where = str(self.folder / path)
            if self.network is None:
                self.network = PeftModel.from_pretrained(self.model, where, adapter_name=_named(path)).eval()
            else:
                self.network.load_adapter(where, adapter_name=_named(path))

    def answer(self, given: str | Sequence[Message], system: str = "") -> dict[str, Any]:
        """Answer a prompt or a chat.

        Args:
            given: A prompt, or the messages before the answer.
            system: System prompt of a prompt.

        Returns:
            ``output``; ``task``, ``None`` where the untouched base answered; ``probability`` of the output among a
            closed set of answers, else ``None``; ``task_scores``, ``None`` where nothing is chosen from.
        """
        messages: list[Message] = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        text = given if isinstance(given, str) else _spoken(messages)
        features = self._features(text)
        task, scores = self._route(features, _system(messages))
        known = None if task is None else self.tasks[task]
        found: dict[str, Any] = {"task": None if known is None else known["name"], "task_scores": scores}
        if known is not None and known["sharpness"] is not None:
            head = self.tensors[f"closed.{task}.weight"], self.tensors[f"closed.{task}.bias"]
            chances = (known["sharpness"] * (head[0] @ features + head[1])).softmax(dim=0)
            return {**found, "output": known["labels"][int(chances.argmax())], "probability": float(chances.max())}
        manner = self.config["common"] if known is None else known
        if known is not None and known["system"] and not _system(messages):
            messages = [{"role": "system", "content": known["system"]}, *messages]
        output, probability = self._ask(text, messages, manner, None if known is None else known["adapter"])
        return {**found, "output": output, "probability": probability}

    # -- router ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _features(self, text: str) -> Tensor:
        """Return what frozen states tell of an input, (F,)."""
        ids = list(self.tokenizer(text)["input_ids"]) or [self.config["start_id"]]
        most = self.config["max_length"]
        if len(ids) > most:
            ids = [*ids[: most // 4], *ids[len(ids) - (most - most // 4) :]]
        embedded, read = self._states(torch.tensor([ids], device=self.device))
        counted = torch.ones(len(ids), 1, device=self.device)
        counted[0] = float(len(ids) == 1)  # models park a huge state on the first token
        opening = counted.clone()
        opening[1 + _OPENING :] = 0
        last = read[-1]
        parts = [_mean(embedded, counted), _mean(embedded, opening), _mean(last, counted), last[-1]]
        parts += [_mean(earlier, counted) for earlier in read[:-1]]
        return torch.cat([functional.layer_norm(part, part.shape) for part in parts])

    def _states(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return embeddings and the states after each block that is read, each (T, C)."""
        blocks = self.model.get_submodule(self.config["blocks"])
        read: list[int] = self.config["read_blocks"]
        embedded: list[Tensor] = []
        seen: dict[int, Tensor] = {}

        def note(index: int, out: Any) -> None:
            seen[index] = out[0] if isinstance(out, tuple) else out
            if index == read[-1]:
                raise _Reached

        hooks = [self.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: embedded.append(out))]
        for index in read:
            hook = blocks[index].register_forward_hook(lambda _m, _i, out, index=index: note(index, out))
            hooks.append(hook)
        try:
            with self.network.disable_adapter():
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return embedded[0][0].float(), [seen[index][0].float() for index in read]

    def _route(self, features: Tensor, system: str) -> tuple[int | None, list[float] | None]:
        """Return the likeliest task, ``None`` where the input is from none, and the scores of all."""
        if len(self.tasks) == 1:
            return 0, None
        weight = self.tensors["router.weight"]
        scores = weight @ features[: weight.shape[1]] + self.tensors["router.bias"]
        own = [task["system"] for task in self.tasks]
        if system and system in own:
            scores[torch.tensor([one != system for one in own], device=self.device)] = -torch.inf
        best = int(scores.argmax())
        floors = self.config["floors"]
        known = floors is None or float(scores.max()) >= floors[best]
        return best if known else None, scores.tolist()

    # -- answers --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _ask(
        self, text: str, messages: Sequence[Message], manner: dict[str, Any], adapter: str | None
    ) -> tuple[str, float | None]:
        """Return what an adapter, or the untouched base, answers, and its probability among the labels."""
        prompt = self._prompt(text, messages, manner)
        ids = self._prompt_ids(prompt, manner["style"])
        if len(ids) + min(manner["most_new"], self.config["context"] // 4) > self.config["context"]:
            raise ValueError(f"The prompt has {len(ids)} tokens; the model's context is {self.config['context']}.")
        if adapter is not None:
            self.network.set_adapter(_named(adapter))
        with self.network.disable_adapter() if adapter is None else nullcontext():
            labels = self._label_ids(prompt[-_TAIL:], manner) if manner["by_label"] else []
            if labels and sum(len(label) - 1 for label in labels) <= _LABEL_TOKENS:
                chances = self._log_likelihoods(ids, labels).softmax(dim=0)
                return manner["labels"][int(chances.argmax())], float(chances.max())
            return self._written(ids, manner), None

    def _prompt(self, text: str, messages: Sequence[Message], manner: dict[str, Any]) -> str:
        if manner["style"] == "labels":
            return f"{text}\nOptions: {', '.join(manner['labels'])}\nAnswer:"
        if manner["style"] != "chat":
            return text
        if not self.config["has_template"]:
            return "\n".join([*(f"{one['role'].capitalize()}: {one['content']}" for one in messages), "Assistant:"])
        written = self.tokenizer.apply_chat_template(
            self._in_parts(self._adapted(messages)), tokenize=False, add_generation_prompt=True
        )
        extra = self.config["only_asked"]
        return str(written)[: len(written) - len(extra)] if extra and written.endswith(extra) else str(written)

    def _in_parts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages whose text is a list of its one part, where the template wants that."""
        if not self.config["takes_parts"]:
            return [dict(one) for one in messages]
        return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]

    def _adapted(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages as the template takes them: a system prompt it does not take opens the first question."""
        system, others = _system(messages), [one for one in messages if one["role"] != "system"]
        if self.config["takes_system"] or not system:
            return list(messages)
        first = next((place for place, one in enumerate(others) if one["role"] == "user"), None)
        if first is None:
            return [{"role": "user", "content": system}, *others]
        others[first] = {**others[first], "content": f"{system}\n\n{others[first]['content']}"}
        return others

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _prompt_ids(self, text: str, style: str) -> list[int]:
        special = not (style == "chat" and self.config["has_template"])
        ids = self._tokens(text, special=special)
        while special and len(ids) > 1 and ids[-1] in self.config["end_ids"]:
            ids.pop()
        return ids or [self.config["start_id"]]

    def _label_ids(self, tail: str, manner: dict[str, Any]) -> list[list[int]]:
        """Return the tokens of each label after a prompt with this end; none begins another."""
        found = [self._continued(tail, label, manner["style"]) for label in manner["labels"]]
        clash = any(a is not b and b[: len(a)] == a for a in found for b in found)
        return [[*label, *self.config["end_ids"][:1]] for label in found] if clash else found

    def _continued(self, tail: str, label: str, style: str) -> list[int]:
        if style == "chat":
            glue = self.config["opening"]
        else:
            glue = "" if not tail or tail[-1].isspace() or label[:1].isspace() else " "
        special = not (style == "chat" and self.config["has_template"])
        before, joint = self._prompt_ids(tail, style), self._tokens(tail + glue + label, special=special)
        while special and len(joint) > len(before) + 1 and joint[-1] in self.config["end_ids"]:
            joint.pop()
        if joint[: len(before)] == before and len(joint) > len(before):
            return joint[len(before) :]
        return self._tokens(glue + label, special=False)

    def _log_likelihoods(self, ids: list[int], labels: list[list[int]]) -> Tensor:
        """Return the log-likelihood of each label after the prompt, (labels,)."""
        width = max(map(len, labels))
        rows = torch.tensor([[*ids, *label, *[0] * (width - len(label))] for label in labels], device=self.device)
        mask = torch.ones_like(rows)
        for row, label in enumerate(labels):
            mask[row, len(ids) + len(label) :] = 0
        logits = self.model(input_ids=rows, attention_mask=mask, use_cache=False).logits[:, len(ids) - 1 : -1]
        chosen = logits.float().log_softmax(dim=2).gather(2, rows[:, len(ids) :, None])[:, :, 0]
        return cast("Tensor", (chosen * mask[:, len(ids) :]).sum(dim=1))

    def _written(self, ids: list[int], manner: dict[str, Any]) -> str:
        """Return the likeliest continuation, word for word."""
        rows = torch.tensor([ids], device=self.device)
        most = max(1, min(manner["most_new"], self.config["context"] - len(ids)))
        ends, plain = self.config["stop_ids"], dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
        self.model.generation_config.max_length = None
        written = self.model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            max_new_tokens=most,
            min_new_tokens=manner["least_new"] or None,
            eos_token_id=ends or None,
            pad_token_id=self.config["pad_id"],
            **plain,
        )[0, len(ids) :].tolist()
        end = next((place for place, one in enumerate(written) if one in ends), len(written))
        text = str(self.tokenizer.decode(written[:end], skip_special_tokens=True))
        if manner["style"] == "chat":
            before = self._tokens(self.config["opening"], special=False)
            opening = str(self.tokenizer.decode(before, skip_special_tokens=True)).strip()
            bare = text.lstrip()
            return (bare[len(opening) :] if opening and bare.startswith(opening) else text).strip()
        text = _BLANK_LINES.sub("", text).rstrip()
        return text[1:] if text[:1] == " " and not text[1:2].isspace() else text


def _load_base(recorded: dict[str, Any], given: str | None, device: torch.device) -> Any:
    """Load the frozen base as the project held it."""
    name, gguf = recorded["name"], recorded["gguf"]
    if given is not None:
        path = Path(given)
        name, gguf = (str(path.parent), path.name) if path.suffix == ".gguf" else (given, None)
    options: dict[str, Any] = {k: v for k, v in recorded["model_args"].items() if k != "trust_remote_code"}
    if recorded["dtype"] == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        options["device_map"] = {"": device}
    else:
        options["dtype"] = getattr(torch, recorded["dtype"])
    if gguf:
        options["gguf_file"] = gguf
        try:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:  # before transformers 5.20 nothing else is given
            pass
    model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
    return model.eval() if recorded["dtype"] == "nf4" else model.to(device).eval()


def _named(path: str) -> str:
    """Return PEFT's name of the adapter in a directory; it may hold no dot."""
    return Path(path).name.replace(".", "_")


def _mean(states: Tensor, counted: Tensor) -> Tensor:
    """Average states (T, C) over the tokens that count (T, 1)."""
    return (states * counted).sum(dim=0) / counted.sum()


def _system(messages: Sequence[Message]) -> str:
    return "\n".join(one["content"] for one in messages if one["role"] == "system")


def _spoken(messages: Sequence[Message]) -> str:
    """Return what was said to the assistant, without the system's words."""
    spoken = [one["content"] for one in messages if one["role"] != "system" and one["content"]]
    return "\n".join(spoken) or "\n".join(one["content"] for one in messages)


def main() -> None:
    """Answer the prompts named on the command line."""
    parser = argparse.ArgumentParser(description="Answer prompts without being told the task.")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--base", help="where the base model lies: hub id, directory or GGUF file")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--messages", type=Path, help="a chat: a JSON list of messages with role and content")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    given: list[Any] = list(asked.prompts)
    if asked.messages:
        given.append(json.loads(asked.messages.read_text(encoding="utf-8")))
    if not given:
        parser.error("give a prompt, or --messages FILE")
    model = Routed(Path(__file__).parent, asked.base, asked.device)
    for one in given:
        print(json.dumps(model.answer(one, asked.system), ensure_ascii=False))


if __name__ == "__main__":
    main()
