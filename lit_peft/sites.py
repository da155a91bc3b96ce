"""Where in a model adapters can go: roles, names and patterns -> module paths.

Paths are real ones (what `get_submodule` takes): of the outermost adapter around a module, or of the module itself.
Patterns are matched with the path without the `base` segments that adapters around whole blocks add.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from lit_peft.structure import (
    ARCHITECTURES,
    HEADS,
    Geometry,
    Site,
    blocks_of,
    geometry,
    input_table,
    is_linear,
    output_head,
    stacks_of,
    walk,
    widths,
    within,
)

__all__ = [
    "ARCHITECTURES",
    "ROLES",
    "Geometry",
    "Site",
    "attention",
    "classification_head",
    "coverage",
    "describe_coverage",
    "feed_forward",
    "find",
    "geometry",
    "input_embedding",
    "is_linear",
    "layer_index",
    "layers",
    "linears",
    "match",
    "output_embedding",
    "stacks",
    "walk",
    "widths",
]

Targets = Sequence[str] | str | None


def stacks(model: nn.Module) -> list[list[str]]:
    """The paths of the transformer layers: one list, or one each for encoder and decoder.

    A stack is the longest list of blocks of one class that hold linear layers and are not inside another such list.
    """
    return [[site.path for site in stack] for stack in stacks_of(model)]


def layers(model: nn.Module) -> list[str]:
    """The paths of all transformer layers (the residual blocks), the encoder's first."""
    return [path for stack in stacks(model) for path in stack]


def attention(model: nn.Module) -> list[str]:
    """The paths of the attention blocks, self- and cross-attention; BERT's include the output projection."""
    return [site.path for site in blocks_of(model)[0]]


def feed_forward(model: nn.Module) -> list[str]:
    """The paths of the feed-forward blocks; two per layer (in, out) where, as in BERT, no module holds both halves."""
    return [site.path for site in blocks_of(model)[1]]


def input_embedding(model: nn.Module) -> str | None:
    """The path of the token embedding."""
    site = input_table(model)
    return site.path if site else None


def output_embedding(model: nn.Module) -> str | None:
    """The path of the linear layer that yields the vocabulary's logits, if the model has one."""
    site = output_head(model)
    return site.path if site else None


def classification_head(model: nn.Module) -> str | None:
    """The path of the head that yields class scores, if the model has one."""
    return next((site.path for site in walk(model) if site.name in HEADS), None)


ROLES: dict[str, Callable[[nn.Module], list[str]]] = {
    "attention": attention,
    "feed-forward": feed_forward,
    "residual": layers,
    "embedding": lambda model: [path for path in [input_embedding(model)] if path is not None],
}


def find(model: nn.Module, role: str) -> list[str]:
    """The paths of the modules in a role: "attention", "feed-forward", "residual" or "embedding".

    Raises:
        ValueError: Unknown role, or the model has no such module.
    """
    if role not in ROLES:
        raise ValueError(f"Unknown role {role!r}: use one of {list(ROLES)}.")
    paths = ROLES[role](model)
    if not paths:
        raise ValueError(f"Found no {role} module in {type(model).__name__}: name the modules instead of the role.")
    return paths


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> outermost module of every linear layer but the output embedding and the classification head.

    Example:
        >>> from torch import nn
        >>> list(linears(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))))
        ['0', '2']
    """
    return {site.path: site.module for site in _linears(model, list(walk(model)))}


def layer_index(path: str) -> int | None:
    """The number of the layer a path lies in: its first number, or None outside the layers.

    Example:
        >>> layer_index("model.layers.11.self_attn.q_proj"), layer_index("lm_head")
        (11, None)
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def match(
    model: nn.Module,
    target_modules: Targets = None,
    *,
    exclude_modules: Targets = None,
    layers_to_transform: int | Sequence[int] | None = None,
    kinds: Callable[[nn.Module], bool] = is_linear,
    partial: bool = False,
) -> list[str]:
    """The paths of the modules that target patterns name, by HF PEFT's grammar, in the model's order.

    Args:
        model: Any module, also one with adapters in it.
        target_modules: A list: paths that equal an entry or end with "." and it. A string: a regular expression for the
            whole path. "all-linear" (or None): all linear layers but heads. "attention", "feed-forward": all linear
            layers in those blocks.
        exclude_modules: The same grammar; wins over `target_modules`.
        layers_to_transform: Only these layers, by number. Full paths in a list are kept regardless.
        kinds: Which modules can be matched by name.
        partial: Accept a list entry that exists in some of the layers only.

    Raises:
        ValueError: An entry matches nothing, or only some of the layers asked.
    """
    sites = list(walk(model))
    asked = _layers_asked(model, layers_to_transform)
    if asked is not None and isinstance(target_modules, str) and _role(target_modules) is None:
        raise ValueError(
            "layers_to_transform does not go with a regular expression in target_modules: "
            f"put the layers into {target_modules!r}, or give a list."
        )
    entries = [target_modules or "all-linear"] if isinstance(target_modules, str | None) else list(target_modules)
    if not entries:
        raise ValueError("target_modules is an empty list: name modules, or use 'all-linear'.")
    expression = isinstance(target_modules, str)
    chosen: set[str] = set()
    for entry in entries:
        found = _named(model, sites, entry, kinds, expression)
        if asked is not None:
            found = [site for site in found if site.name == entry or layer_index(site.name) in asked]
        # an entry that carries a layer's number asked for that layer; roles and expressions ask for what there is
        if not (partial or expression or _role(entry) or layer_index(entry) is not None):
            _check_layers(model, entry, found, asked)
        chosen |= {site.path for site in found}
    if exclude_modules:
        expression = isinstance(exclude_modules, str)
        for entry in [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules:
            chosen -= {site.path for site in _named(model, sites, entry, kinds, expression)}
    if not chosen:
        raise ValueError(f"Nothing is left of target_modules {target_modules!r} without {exclude_modules!r}.")
    return [site.path for site in sites if site.path in chosen]


def coverage(paths: Iterable[str], model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each kind of module among `paths`: in how many layers it is, of how many, such as `{"q_proj": (30, 30)}`.

    A kind is the shortest end of a path that is unique within its layer ("c_proj" is "attn.c_proj" and "mlp.c_proj").
    Modules outside the layers count as one of one, under their whole name.
    """
    sites = list(walk(model))
    wanted = set(paths)
    left = {site.path: site.name for site in sites if site.path in wanted}
    # per stack and layer: the end of its path within the layer -> the module's real path
    tree: list[list[dict[str, list[str]]]] = []
    for stack in stacks_of(model):
        tree.append([])
        for layer in stack:
            inside: dict[str, list[str]] = {}
            for site in sites:
                if within(site, layer) and (is_linear(site.base) or site.path in left):
                    # a layer itself goes by its class; the experts of a mixture count as one
                    inner = site.name.removeprefix(layer.name + ".") if site != layer else type(layer.base).__name__
                    kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", "." + inner)[1:]
                    inside.setdefault(kind, []).append(site.path)
            tree[-1].append(inside)
    labels = _labels([list(inside) for stack in tree for inside in stack])
    counts: dict[str, tuple[int, int]] = {}
    for part in tree:
        # an encoder's layers do not count for what only a decoder's layers have
        total = dict.fromkeys((labels[kind] for kinds in part for kind in kinds), len(part))
        done: Counter[str] = Counter()
        for kinds in part:
            # popping all paths of a kind, so that those that are left lie outside of the layers
            hit = [kind for kind, real in kinds.items() if [left.pop(path) for path in real if path in left]]
            done.update(dict.fromkeys((labels[kind] for kind in hit), 1))
        for label, layers_there in total.items():
            before = counts.get(label, (0, 0))
            counts[label] = (before[0] + done[label], before[1] + layers_there)
    return {label: count for label, count in counts.items() if count[0]} | dict.fromkeys(left.values(), (1, 1))


def describe_coverage(paths: Iterable[str], model: nn.Module) -> str:
    """`coverage` as one line: "q_proj 30/30, v_proj 30/30"."""
    return ", ".join(f"{label} {done}/{total}" for label, (done, total) in coverage(paths, model).items())


def _labels(kinds_of_layers: list[list[str]]) -> dict[str, str]:
    """For each kind the shortest end that no other kind of any layer shares with it."""
    shared: set[str] = set()
    for kinds in kinds_of_layers:
        ends = Counter(end for kind in kinds for end in _ends(kind))
        shared |= {end for end, count in ends.items() if count > 1}
    kinds = [kind for kinds in kinds_of_layers for kind in kinds]
    return {kind: next((end for end in _ends(kind) if end not in shared), kind) for kind in kinds}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _linears(model: nn.Module, sites: list[Site]) -> list[Site]:
    """What "all-linear" means: neither the output embedding nor anything in a classification head."""
    logits = output_head(model)
    return [site for site in sites if is_linear(site.base) and not _in_head(site) and site != logits]


def _in_head(site: Site) -> bool:
    return site.name.partition(".")[0] in HEADS


def _role(entry: str) -> str | None:
    return entry.lower() if entry.lower() in ("all-linear", "attention", "feed-forward") else None


def _layers_asked(model: nn.Module, layers_to_transform: int | Sequence[int] | None) -> set[int] | None:
    if layers_to_transform is None:
        return None
    asked = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
    depth = max((len(stack) for stack in stacks_of(model)), default=0)
    if not asked or not asked <= set(range(depth)):
        raise ValueError(f"layers_to_transform {sorted(asked)}: this model's layers are 0 to {depth - 1}.")
    return asked


def _named(
    model: nn.Module, sites: list[Site], entry: str, kinds: Callable[[nn.Module], bool], expression: bool
) -> list[Site]:
    """The sites that one target means; never none."""
    role = _role(entry)
    if role == "all-linear":
        found = _linears(model, sites)
    elif role is not None and not any(_ends_in(site, entry) and kinds(site.base) for site in sites):
        blocks = blocks_of(model)[role == "feed-forward"]
        found = [site for site in sites if is_linear(site.base) and any(within(site, block) for block in blocks)]
    elif expression:
        try:
            pattern = re.compile(entry)
        except re.error as error:
            raise ValueError(f"target_modules {entry!r} is no regular expression: {error}.") from None
        found = [site for site in sites if kinds(site.base) and not _in_head(site) and pattern.fullmatch(site.name)]
    else:
        # a head that a task trains whole is only adapted where it is named in full
        near = [site for site in sites if _ends_in(site, entry) and (site.name == entry or not _in_head(site))]
        found = [site for site in near if kinds(site.base)]
        if near and not found:
            raise ValueError(
                f"{entry!r} names {type(near[0].base).__name__} modules, which this method cannot wrap. "
                f"This model's linear layers end in {_leaves(model, sites)}."
            )
    if found:
        return found
    leaves = _leaves(model, sites)
    if role is not None:
        raise ValueError(f"Found no linear layers for {entry!r}. This model's linear layers end in {leaves}.")
    if expression and any(_ends_in(site, entry) for site in sites):
        raise ValueError(
            f"The regular expression {entry!r} matches no whole module path. "
            f"To match the ends of paths give a list: [{entry!r}]."
        )
    what = "No module path matches the regular expression" if expression else "No module path ends in"
    guess = difflib.get_close_matches(entry, leaves, n=1)
    hint = f" Did you mean {guess[0]!r}?" if guess else ""
    raise ValueError(f"{what} {entry!r}. This model's linear layers end in {leaves}.{hint}")


def _ends_in(site: Site, entry: str) -> bool:
    return site.name == entry or site.name.endswith("." + entry)


def _leaves(model: nn.Module, sites: list[Site]) -> list[str]:
    return list(dict.fromkeys(site.name.rpartition(".")[2] for site in _linears(model, sites)))


def _check_layers(model: nn.Module, entry: str, found: list[Site], asked: set[int] | None) -> None:
    """Refuse an entry that some of the layers asked lack: half-adapted models train, and are not what was meant."""
    for stack in stacks_of(model):
        layers_here = [layer for index, layer in enumerate(stack) if asked is None or index in asked]
        have = [layer for layer in layers_here if any(within(site, layer) for site in found)]
        # a stack without any is fine: an encoder has no cross-attention
        if have and len(have) < len(layers_here):
            missing = [str(index) for index, layer in enumerate(stack) if layer in layers_here and layer not in have]
            raise ValueError(
                f"{entry!r} is in only {len(have)} of {len(layers_here)} layers (not in layer {', '.join(missing)}). "
                "Name the layers with layers_to_transform, or the modules by their full paths."
            )
    if asked is not None and not found:
        raise ValueError(f"{entry!r} is in none of the layers {sorted(asked)} that layers_to_transform names.")
