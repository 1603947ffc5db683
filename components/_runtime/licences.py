"""The licence of a model: what the operator declares and what the artifact says of itself, as one SPDX expression.

What is beside a model is a claim, not proof. Claims that differ, and texts that are no SPDX expression, leave the
licence unknown, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from components._runtime.spdx import spdx
from defense_core.artifact_scan.kinds import SAFETENSORS, kind_of
from defense_core.files import sha256_bytes
from defense_core.model_spec import WEIGHTS
from defense_core.safetensors_file import read_metadata

DECLARED = "the operator"
MAX_BYTES = 1 << 20
"""Of a file beside the model; what comes after is not read."""
MAX_FRONT_MATTER_BYTES = 16 << 10
# Brackets in brackets cost the YAML reader the square of their number.
_MAX_BRACKETS = 256
_UNREADABLE = "unreadable front matter"
_CANNOT_BE_READ = "cannot be read"
# Taken apart without a pattern for what follows: one that tries where the blanks end takes the cube of their number.
_TAG = re.compile(r"SPDX-License-Identifier:([^\n]*)")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_METADATA = ("license", "licence")
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Claim:
    """One place that states a licence.

    Attributes:
        where: ``the operator``, the name of a file beside the model, or ``safetensors metadata``.
        stated: its text, or that it cannot be read.
        licence: that as an SPDX expression; ``None``: it is none.
        sha256: digest of what was read of the file beside the model; ``None`` where it is no such file.
    """

    where: str
    stated: str
    licence: str | None
    sha256: str | None = None


@dataclass(frozen=True)
class Licence:
    """What all claims come to.

    Attributes:
        licence: SPDX expression; ``None``: unknown.
        why: why it is unknown; empty where it is known.
        claims: every place that states one.
    """

    licence: str | None
    why: str
    claims: tuple[Claim, ...]


def licence_of(declared: str, artifact: Path, companions: Sequence[Path] = ()) -> Licence:
    """Bring together what is declared and what is found.

    Args:
        declared: by the operator; empty: nothing.
        artifact: the fetched file, or the folder of a bundle, after the artifact scan found it clean.
        companions: files beside it that may state one; a README does so in its front matter, others by an SPDX tag.
    """
    claims = [Claim(DECLARED, declared, spdx(declared))] if declared else []
    claims += _carried(artifact)
    claims += [claim for path in companions for claim in _beside(path)]
    named = sorted({claim.licence for claim in claims if claim.licence is not None})
    unreadable = [claim for claim in claims if claim.licence is None]
    if not claims:
        why = "nothing states a licence"
    elif unreadable and unreadable[0].stated.startswith(_CANNOT_BE_READ):
        why = f"{unreadable[0].where} {unreadable[0].stated}"
    elif unreadable:
        why = f"{unreadable[0].where} says {unreadable[0].stated!r}, which is no SPDX expression"
    elif len(named) > 1:
        why = "; ".join(f"{claim.where} says {claim.licence}" for claim in claims)
    else:
        return Licence(named[0], "", tuple(claims))
    return Licence(None, why, tuple(claims))


def _carried(artifact: Path) -> Iterator[Claim]:
    path = artifact / WEIGHTS if artifact.is_dir() else artifact
    if not path.is_file() or kind_of(path).name != SAFETENSORS:
        return
    metadata = read_metadata(path)
    for key in _METADATA:
        if key in metadata:
            yield _claim("safetensors metadata", metadata[key])


def _beside(path: Path) -> Iterator[Claim]:
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES)
    except OSError as error:
        yield Claim(path.name, f"{_CANNOT_BE_READ}: {error.strerror}", None)
        return
    content = data.decode("utf-8", "replace").replace("\r\n", "\n")
    stated = _front_matter_field(content) if path.name == "README.md" else list(_tagged(content))
    for each in dict.fromkeys(stated):
        yield _claim(path.name, each, sha256_bytes(data))


def _tagged(content: str) -> Iterator[str]:
    for line in _TAG.findall(content):
        stated = line.strip(" \t").removesuffix("*/").removesuffix("-->").strip(" \t")
        if 0 < len(stated) <= 200 and not {"*", ">"} & set(stated):
            yield stated


def _front_matter_field(content: str) -> list[str]:
    """What the front matter states; that it cannot be read, where that is so."""
    front = _FRONT_MATTER.match(content)
    if front is None:
        return []
    try:
        fields = _fields(front[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return [_UNREADABLE]
    stated = [value for key, value in fields if key.value in _METADATA and value.tag != _NULL]
    return [text for value in stated for text in _texts(value)]


def _fields(text: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a mapping, as nodes: no object is built of what a stranger wrote.

    Raises:
        ValueError, yaml.YAMLError: too long, aliases (each may stand for a million copies), or no YAML.
    """
    if len(text.encode()) > MAX_FRONT_MATTER_BYTES or text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise ValueError(f"more than {MAX_FRONT_MATTER_BYTES} bytes or {_MAX_BRACKETS} brackets")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("an alias")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return root.value if isinstance(root, yaml.MappingNode) else []


def _texts(value: yaml.Node) -> list[str]:
    """A text, or a list of texts; nothing else states a licence."""
    nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
    return [node.value if isinstance(node, yaml.ScalarNode) and node.tag == _TEXT else _UNREADABLE for node in nodes]


def _claim(where: str, stated: str, sha256: str | None = None) -> Claim:
    return Claim(where, stated[:200], spdx(stated), sha256)
