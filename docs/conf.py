"""How the documentation is built: `make docs`; any warning, or a public name left out, fails it."""

import importlib
import inspect
import re
import types

project = "eco_optax"
author = "The eco_optax authors"
copyright = author

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "eco_optax"
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

smartquotes_action = "De"  # Dashes only: P' is mathematics.
default_role = "py:obj"  # `quantize_params` in a docstring is a link, and other code is code.
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
  "optax.ScalarOrSchedule": "optax.ScalarOrSchedule",
  "Rounding": "Rounding",
}
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# The package and those of its modules that users reach into.
MODULES = (
  "eco_optax",
  "eco_optax.diagnostics",
  "eco_optax.interop.compressed_tensors",
  "eco_optax.interop.config_json",
  "eco_optax.interop.gguf",
  "eco_optax.interop.gguf_tokenizer",
  "eco_optax.interop.hugging_face",
  "eco_optax.interop.qwix",
  "eco_optax.interop.safetensors",
  "eco_optax.linen",
  "eco_optax.nnx",
  "eco_optax.rounding",
  "eco_optax.theory",
  "eco_optax.wire",
)


def public_names() -> set[str]:
  """Full names of all that is public: every one has its entry in the API pages."""
  found = set()
  for module in map(importlib.import_module, MODULES):
    for name, thing in vars(module).items():
      own = getattr(thing, "__module__", module.__name__)
      if module.__name__ in ("eco_optax", "eco_optax.wire"):  # Of several files.
        own = own.startswith(module.__name__) and module.__name__
      if not name.startswith("_") and not isinstance(thing, types.ModuleType):
        found |= {f"{module.__name__}.{name}"} if own == module.__name__ else set()
  return found


def _check_names(app, env) -> None:
  """Fails the build where a public name has no entry."""
  from sphinx.errors import ExtensionError

  missing = public_names() - set(env.domains["py"].objects)
  if missing and app.builder.name == "html":
    raise ExtensionError(f"docs/api has no entry for {', '.join(sorted(missing))}")


def _list_fields(app, what, name, thing, options, lines) -> None:
  """Lists a NamedTuple's fields, with the comments that say what they hold."""
  own = getattr(thing, "__module__", "").startswith("eco_optax")
  if own and what == "class" and thing.__bases__ == (tuple,):
    comments = dict(re.findall(r"^  (\w+): .+?  # (.+)$", inspect.getsource(thing), re.MULTILINE))
    lines += ["", *(f":ivar {field}: {comments.get(field, '')}" for field in thing._fields)]


def _skip_field(app, what, name, thing, skip, options) -> bool | None:
  """Leaves out what Python itself says of a NamedTuple's fields."""
  return True if type(thing).__name__ == "_tuplegetter" else None


def _find_alias(app, env, node, contnode):
  """Finds `eco.quantize` and `quantize`, as docstrings say, wherever they say it."""
  name = f"eco_optax.{node.get('reftarget', '').removeprefix('eco.')}"
  domain, page = env.domains["py"], node.get("refdoc", "")
  return domain.resolve_xref(env, page, app.builder, "obj", name, node, contnode)


def _mathml(node, display: str) -> str:
  """A formula as MathML: browsers draw it without a script or a network."""
  from latex2mathml.converter import convert

  formula = convert(node.astext(), display=display)
  if "\\" in formula:  # A command that the converter does not know is left as text.
    raise ValueError(f"no MathML for {node.astext()}")
  return formula


def _visit_inline(translator, node) -> None:
  from docutils import nodes

  translator.body.append(_mathml(node, "inline"))
  raise nodes.SkipNode


def _visit_block(translator, node) -> None:
  from docutils import nodes

  translator.body.append(f'<div class="formula">{_mathml(node, "block")}</div>')
  raise nodes.SkipNode


def _keep_short_cells_whole(app, doctree) -> None:
  """Marks short cells of tables: a number and its error stay on one line, and the table scrolls."""
  from docutils import nodes

  for cell in doctree.findall(nodes.entry):
    if len(cell.astext()) <= 24:
      cell["classes"].append("short")


def setup(app) -> None:
  """Registers the checks, the formulas, the reading of fields and the search for names."""
  app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
  app.connect("doctree-read", _keep_short_cells_whole)
  app.connect("missing-reference", _find_alias)
  app.connect("env-check-consistency", _check_names)
  app.connect("autodoc-process-docstring", _list_fields)
  app.connect("autodoc-skip-member", _skip_field)
