"""Chats in a model's own template, which is written in Jinja as `transformers` has it."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from eco_optax.training.data.readers import need

Message = Mapping[str, str]  # With the keys role ("system", "user", "assistant") and content.


class Template(NamedTuple):
  """How the messages of a chat become one text."""

  source: str  # In Jinja.
  bos_token: str = ""
  eos_token: str = ""  # Ends a reply.


#: The format of OpenAssistant-Guanaco, in which chats are prepared that have no other template.
GUANACO = Template(
  "{% for message in messages %}"
  "### {{ 'Assistant' if message['role'] == 'assistant' else 'Human' }}: {{ message['content'] }}"
  "{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)


def beside(tokenizer: pathlib.Path) -> Template:
  """The template that is kept beside a tokenizer.json.

  Args:
    tokenizer: path of the file; `tokenizer_config.json` and perhaps `chat_template.jinja` are in
      its folder.

  Raises:
    ValueError: if there is none, naming where it was looked for.
  """
  config, template = (
    tokenizer.parent / x for x in ("tokenizer_config.json", "chat_template.jinja")
  )
  told: dict[str, Any] = json.loads(config.read_text()) if config.exists() else {}
  source = template.read_text() if template.exists() else told.get("chat_template")
  if not isinstance(source, str):
    raise ValueError(
      f"{tokenizer.parent} has no chat_template.jinja, and no chat_template in"
      " tokenizer_config.json: leave out --chat_template, or use the tokenizer of a chat model"
    )
  named = lambda name: token["content"] if isinstance(token := told.get(name), dict) else token
  return Template(source, named("bos_token") or "", named("eos_token") or "")


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
  sandbox = need("jinja2.sandbox", "a chat template")
  environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

  def fail(message: str) -> None:
    raise ValueError(f"the chat template does not take it: {message}")

  environment.globals["raise_exception"] = fail
  environment.filters["tojson"] = lambda x, **more: json.dumps(x, ensure_ascii=False, **more)
  return environment.from_string(source)


def check(message: Message, special: Iterable[str]) -> None:
  """Raises `ValueError` if a message holds one of the tokens that are marks between messages."""
  if found := [token for token in special if token in message["content"]]:
    raise ValueError(f"a message holds {found[0]!r}, which is a mark between messages: remove it")


def render(template: Template, messages: Sequence[Message], is_asked: bool = False) -> str:
  """The text of a chat.

  Args:
    template: of the model.
    messages: in order.
    is_asked: whether the text ends where the assistant's reply begins.

  Raises:
    ImportError: without the jinja2 package.
    ValueError: if the template cannot take such messages.
  """
  jinja2 = need("jinja2", "a chat template")
  try:
    return _compiled(template.source).render(
      messages=list(messages),
      add_generation_prompt=is_asked,
      bos_token=template.bos_token,
      eos_token=template.eos_token,
    )
  except jinja2.TemplateError as error:
    raise ValueError(f"the chat template cannot be used ({error})") from error


def with_replies(
  template: Template, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
  """The text of a chat, and from which to which character each of the assistant's replies is.

  A reply reaches up to its end mark, so that a model learns to end.

  Raises:
    ValueError: if the template changes what is before a reply when the reply is there.
  """
  text, spans = render(template, messages), []
  for i, message in enumerate(messages):
    if message["role"] == "assistant":
      before = render(template, messages[:i], is_asked=True)
      after = render(template, messages[: i + 1])
      if not (text.startswith(before) and text.startswith(after.rstrip())):
        raise ValueError(
          "the chat template writes a message otherwise once another follows: leave out"
          " --chat_template"
        )
      spans.append((len(before), len(after.rstrip())))
  return text, spans
