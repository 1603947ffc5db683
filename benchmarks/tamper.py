"""A release is changed at random, a thousand times, and verified each time: ``tamper.json``.

``python -m benchmarks.tamper`` makes two small signed releases and a registered version once, then applies
one mutation after the other to a copy. ``found``: the verification fails; ``named_file``: each changed file
(or tag) is named by a finding, with what was expected and what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_results
from components._runtime import registry_tags as tag
from components._runtime.envelopes import seal, unseal
from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect
from components._runtime.model_signature import SIGNATURE, sign_folder
from components._runtime.release import ATTESTATIONS
from components._runtime.signing_keys import (
    KeyPair,
    TrustedSigner,
    generate_key_pair,
    load_public_key,
    load_signing_key,
)
from components._runtime.verification import Verification, verify_release
from components._runtime.verification_registry import verify_registered
from components.gate_promotion.step import gate_promotion
from components.promote_model.step import promote_model
from defense_core.verdict import Verdict
from tests.finished_chain import another_model, make_chain, make_release
from tests.small_model import DENYING, make_inputs

MUTATIONS = 1000
SHARES = {
    "flip": 500,
    "truncate": 50,
    "append": 50,
    "rewrite": 40,
    "delete": 50,
    "add": 40,
    "link": 20,
    "swap_files": 40,
    "swap_evidence": 50,
    "old_decision": 20,
    "drop_statement": 20,
    "reorder_statements": 40,
    "re_sign_statement": 20,
    "re_sign_folder": 20,
    "edit_tag": 40,
}
"""How many of each kind; together :data:`MUTATIONS`."""
TAGS = (
    tag.DECISION,
    tag.POLICY,
    tag.IDENTITY,
    tag.SOURCE_DIGEST,
    tag.ONNX_DIGEST,
    tag.BUNDLE_DIGEST,
    tag.EVIDENCE_DIGEST,
    tag.FILES_DIGEST,
)


@dataclass
class Ground:
    """What mutations are made on.

    Attributes:
        original: the release; never changed.
        other: another model's, signed with the same key.
        older: a decision folder by another policy on the same evidence.
        copy: what a mutation may change; made anew after each.
        keys, stranger: the signer's key pair, and another one.
    """

    original: Path
    other: Path
    older: Path
    copy: Path
    keys: KeyPair
    stranger: KeyPair
    connection: MlflowConnection
    version: str
    random: random.Random

    def files(self, below: str = "") -> list[str]:
        """Names of the release's files."""
        found = [path for path in (self.original / below).rglob("*") if path.is_file()]
        return sorted(path.relative_to(self.original).as_posix() for path in found)

    def verify(self) -> Verification:
        """Verify the copy."""
        return verify_release(self.copy, TrustedSigner(public_key=self.keys.public))


def flip(ground: Ground) -> tuple[str, list[str]]:
    """One bit."""
    name = ground.random.choice(ground.files())
    data = bytearray((ground.copy / name).read_bytes())
    place, bit = ground.random.randrange(len(data)), ground.random.randrange(8)
    data[place] ^= 1 << bit
    (ground.copy / name).write_bytes(bytes(data))
    return f"flip bit {bit} of byte {place} of {name}", [name]


def truncate(ground: Ground) -> tuple[str, list[str]]:
    """The end of a file is cut off."""
    name = ground.random.choice(ground.files())
    data = (ground.copy / name).read_bytes()
    size = ground.random.randrange(len(data))
    (ground.copy / name).write_bytes(data[:size])
    return f"truncate {name} to {size} bytes", [name]


def append(ground: Ground) -> tuple[str, list[str]]:
    """Bytes are added to a file."""
    name = ground.random.choice(ground.files())
    added = ground.random.choice([b"\n", b" ", b"\x00", b"{}", ground.random.randbytes(16)])
    with open(ground.copy / name, "ab") as stream:
        stream.write(added)
    return f"append {len(added)} bytes to {name}", [name]


def rewrite(ground: Ground) -> tuple[str, list[str]]:
    """JSON is written with other white space: the same meaning, other bytes."""
    name = ground.random.choice([name for name in ground.files() if name.endswith((".json", SIGNATURE))])
    content = json.loads((ground.copy / name).read_bytes())
    indent = ground.random.choice([1, 2, 4])
    (ground.copy / name).write_text(json.dumps(content, indent=indent), "utf-8")
    return f"rewrite {name} with an indent of {indent}", [name]


def delete(ground: Ground) -> tuple[str, list[str]]:
    """A file is missing."""
    name = ground.random.choice(ground.files())
    (ground.copy / name).unlink()
    return f"delete {name}", [name]


def add(ground: Ground) -> tuple[str, list[str]]:
    """A file that nobody signed."""
    folder = ground.random.choice(["", "bundle/", "evidence/", f"{ATTESTATIONS}/", ".git/", "code/"])
    stem = f"{ground.random.randrange(1000):03d}"
    name = folder + stem + ground.random.choice([".py", ".json", ".onnx", ".gitignore"])
    (ground.copy / name).parent.mkdir(exist_ok=True)
    (ground.copy / name).write_bytes(b"{}")
    return f"add {name}", [name]


def link(ground: Ground) -> tuple[str, list[str]]:
    """A file becomes a link to its own content elsewhere."""
    name = ground.random.choice(ground.files())
    (ground.copy / name).unlink()
    (ground.copy / name).symlink_to(ground.original / name)
    return f"turn {name} into a link", [name]


def swap_files(ground: Ground) -> tuple[str, list[str]]:
    """Two files change places."""
    first, second = ground.random.sample(ground.files(), 2)
    contents = [(ground.original / name).read_bytes() for name in (first, second)]
    (ground.copy / first).write_bytes(contents[1])
    (ground.copy / second).write_bytes(contents[0])
    return f"swap {first} and {second}", [first, second]


def swap_evidence(ground: Ground) -> tuple[str, list[str]]:
    """Evidence of another model, one file or all of it."""
    differing = [
        name
        for name in ground.files("evidence")
        if (ground.other / name).is_file()
        and (ground.other / name).read_bytes() != (ground.original / name).read_bytes()
    ]
    chosen = differing if ground.random.random() < 0.3 else [ground.random.choice(differing)]
    for name in chosen:
        shutil.copyfile(ground.other / name, ground.copy / name)
    what = chosen[0] if len(chosen) == 1 else "all evidence"
    return f"take {what} from another model's release", chosen


def old_decision(ground: Ground) -> tuple[str, list[str]]:
    """A decision that was made before, by another policy on the same evidence."""
    names = ["decision.json", "policy.json", "gate.json"][: ground.random.randint(1, 3)]
    for name in names:
        shutil.copyfile(ground.older / name, ground.copy / "evidence" / name)
    return f"replay an old {' and '.join(names)}", [f"evidence/{name}" for name in names]


def drop_statement(ground: Ground) -> tuple[str, list[str]]:
    """A statement is missing."""
    name = ground.random.choice(ground.files(ATTESTATIONS))
    (ground.copy / name).unlink()
    return f"drop the statement {name}", [name]


def reorder_statements(ground: Ground) -> tuple[str, list[str]]:
    """Two statements change places."""
    first, second = ground.random.sample(ground.files(ATTESTATIONS), 2)
    for name, source in ((first, second), (second, first)):
        shutil.copyfile(ground.original / source, ground.copy / name)
    return f"reorder the statements {first} and {second}", [first, second]


def re_sign_statement(ground: Ground) -> tuple[str, list[str]]:
    """A statement, signed by somebody else; at times the folder too."""
    name = ground.random.choice(ground.files(ATTESTATIONS))
    stranger = load_signing_key(ground.stranger.private)
    payload = unseal((ground.original / name).read_bytes(), load_public_key(ground.keys.public), name)
    (ground.copy / name).write_bytes(seal(payload, stranger))
    return f"re-sign {name} with another key", [name]


def re_sign_folder(ground: Ground) -> tuple[str, list[str]]:
    """Everything, signed by somebody else, with a file changed at times."""
    changed = flip(ground)[0] if ground.random.random() < 0.5 else "nothing else"
    (ground.copy / SIGNATURE).unlink()
    sign_folder(ground.copy, load_signing_key(ground.stranger.private))
    return f"re-sign the folder with another key after: {changed}", [SIGNATURE]


def edit_tag(ground: Ground) -> tuple[str, list[str]]:
    """A tag of the registered version; :func:`measured` puts it back."""
    name = ground.random.choice(TAGS)
    value = ground.random.choice(["", "quarantined", "edited", "sha256:" + "0" * 64])
    ground.connection.client.set_model_version_tag("digits", ground.version, name, value)
    return f"edit the tag {name} to {value!r}", [f"tag {name}"]


KINDS: dict[str, Callable[[Ground], tuple[str, list[str]]]] = {
    each.__name__: each
    for each in (
        flip,
        truncate,
        append,
        rewrite,
        delete,
        add,
        link,
        swap_files,
        swap_evidence,
        old_decision,
        drop_statement,
        reorder_statements,
        re_sign_statement,
        re_sign_folder,
        edit_tag,
    )
}


def measured(ground: Ground, kind: str) -> dict[str, Any]:
    """One mutation and what the verification said of it."""
    if kind == "edit_tag":
        before = dict(ground.connection.client.get_model_version("digits", ground.version).tags)
        mutation, changed = edit_tag(ground)
        uri = f"models:/digits/{ground.version}"
        found = verify_registered(ground.connection, uri, TrustedSigner(public_key=ground.keys.public))
        name = changed[0].removeprefix("tag ")
        ground.connection.client.set_model_version_tag("digits", ground.version, name, before[name])
    else:
        mutation, changed = KINDS[kind](ground)
        found = ground.verify()
        shutil.rmtree(ground.copy)
        shutil.copytree(ground.original, ground.copy)
    named = {each.file for each in found.differences if each.bound and each.why and each.file in each.why + each.file}
    failed = found.verdict is Verdict.FAIL
    return {"mutation": mutation, "kind": kind, "found": failed, "named_file": failed and set(changed) <= named}


def prepare(work: Path, seed: int) -> Ground:
    """Two models' releases, an older decision and a registered version, in ``work``."""
    keys, stranger = generate_key_pair(work / "keys"), generate_key_pair(work / "stranger")
    chain = make_chain(make_inputs(work / "inputs"), work / "chain")
    make_release(chain, work / "release", keys.private)
    make_release(another_model(chain, work / "another"), work / "other", keys.private)
    gate_promotion(chain.evidence, DENYING, work / "older")
    connection = connect(MlflowSettings(f"sqlite:///{work / 'mlflow.db'}"))
    done = promote_model(work / "release", name="digits", alias="champion", connection=connection)
    shutil.copytree(work / "release", work / "copy")
    version = str(done["results"]["version"])
    names = {"original": "release", "other": "other", "older": "older", "copy": "copy"}
    folders = {field: work / name for field, name in names.items()}
    return Ground(
        **folders,
        keys=keys,
        stranger=stranger,
        connection=connection,
        version=version,
        random=random.Random(seed),
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = datetime.now(UTC)
    order = [kind for kind, count in SHARES.items() for _ in range(count)]
    with tempfile.TemporaryDirectory(prefix="quarantine-tamper-") as folder:
        ground = prepare(Path(folder), options.seed)
        whole = ground.verify()
        if whole.verdict is not Verdict.PASS:
            raise SystemExit(f"the release itself does not verify: {whole.differences}")
        ground.random.shuffle(order)
        rows = [measured(ground, kind) for kind in order]
    write_results("tamper", rows, command=f"python -m benchmarks.tamper --seed {options.seed}", started=started)
    missed = [row for row in rows if not (row["found"] and row["named_file"])]
    print(f"{len(rows)} mutations, {len(rows) - len(missed)} found and named; {Counter(row['kind'] for row in missed)}")
    for row in missed[:20]:
        print(row)


if __name__ == "__main__":
    main()
