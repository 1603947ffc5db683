"""MLflow's signature on the raw body: vectors, tampering, window, rotation."""

from __future__ import annotations

import base64
import hmac
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defense_core.errors import ConfigError
from pipelines.triggers.secret_files import Secrets
from pipelines.triggers.signature import NotAuthentic, Verifier, sign
from tests.triggers.fakes import SECRET, event, headers

NOW = 1_700_000_000


def verifier(*secrets: str, now: float = NOW, window_s: float = 300) -> Verifier:
    keys = [each.encode() for each in secrets or (SECRET,)]
    return Verifier(lambda: keys, window_s=window_s, clock=lambda: now)


def judge(verify: Verifier, given_headers: dict[str, str], body: bytes) -> str:
    """``""`` for an authentic delivery, else the reason."""
    try:
        envelope = verify.envelope({name.lower(): value for name, value in given_headers.items()})
        verify.verify(envelope, body)
    except NotAuthentic as error:
        return error.reason
    return ""


def test_signature_is_that_of_mlflow():
    from mlflow.webhooks.delivery import _generate_hmac_signature

    body = event("модель", "7")
    assert sign(SECRET.encode(), "id-1", NOW, body) == _generate_hmac_signature(SECRET, "id-1", str(NOW), body.decode())


def test_signature_vector():
    # printf 'abc.1700000000.{}' | openssl dgst -sha256 -hmac kkkkkkkkkkkkkkkk -binary | base64
    assert sign(b"k" * 16, "abc", 1700000000, b"{}") == "v1,qRHYcRdt54Zd97P5xohlcNfdljjS1FlEgFCnB3ftnbM="


def test_genuine_delivery_is_authentic():
    body = event()
    assert judge(verifier(), headers(body, at=NOW), body) == ""


@pytest.mark.parametrize("name", ["X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id"])
def test_every_header_is_needed_and_bound(name):
    body = event()
    genuine = headers(body, at=NOW)
    assert judge(verifier(), {key: value for key, value in genuine.items() if key != name}, body) == "unsigned"
    other = headers(event("vision-b"), "d-2", at=NOW + 1)
    assert judge(verifier(), {**genuine, name: other[name]}, body) == "forged"


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "v1,",
        "v2,{mac}",
        "{mac}",
        "v1,{mac}x",
        " v1,{mac}",
        "v1,{mac} v1,{mac}",
        "v1,{short}",
        "v1,é",
        "v1,{hex}",
        "v1,{loose}",
    ],
)
def test_any_other_form_is_refused(signature):
    body = event()
    genuine = headers(body, at=NOW)
    mac = genuine["X-MLflow-Signature"][3:]
    # The last character but one carries bits that no byte holds: another text that decodes to the same bytes.
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    loose = mac[:-2] + letters[letters.index(mac[-2]) + 1] + "="
    text = signature.format(mac=mac, short=mac[:-4], hex=base64.b64decode(mac).hex(), loose=loose)
    assert judge(verifier(), {**genuine, "X-MLflow-Signature": text}, body) == "malformed"


@pytest.mark.parametrize("timestamp", ["", "-1", "1.5", "1e9", " 1700000000", "١٧٠٠٠٠٠٠٠٠", "9" * 13, "now"])
def test_timestamp_is_digits(timestamp):
    body = event()
    assert judge(verifier(), {**headers(body, at=NOW), "X-MLflow-Timestamp": timestamp}, body) == "malformed"


@pytest.mark.parametrize("delivery", ["", "a.b", "a b", "ü", "x" * 65, "a/b", "a\nb"])
def test_delivery_id_is_plain(delivery):
    body = event()
    assert judge(verifier(), {**headers(body, at=NOW), "X-MLflow-Delivery-Id": delivery}, body) == "malformed"


@pytest.mark.parametrize(("offset_s", "reason"), [(-301, "expired"), (-300, ""), (0, ""), (300, ""), (301, "expired")])
def test_window_is_closed_on_both_sides(offset_s, reason):
    body = event()
    assert judge(verifier(), headers(body, at=NOW + offset_s), body) == reason


def test_dots_cannot_move_between_id_timestamp_and_body():
    # "a" . "1" . "700000000.x" and "a.1" . "700000000" . "x" are one signed text; neither form is let in.
    body = b"700000000.x"
    moved = headers(b"x", at=NOW)
    moved["X-MLflow-Signature"] = sign(SECRET.encode(), "a", 1, body)
    moved["X-MLflow-Delivery-Id"], moved["X-MLflow-Timestamp"] = "a.1", "700000000"
    assert judge(verifier(now=700000000), moved, b"x") == "malformed"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_changed_byte_is_accepted(data):
    body = event()
    genuine = headers(body, at=NOW)
    place = data.draw(st.integers(0, len(body) - 1))
    changed = bytearray(body)
    changed[place] ^= data.draw(st.integers(1, 255))
    assert judge(verifier(), genuine, bytes(changed)) == "forged"
    assert judge(verifier(), genuine, body + data.draw(st.binary(min_size=1, max_size=4))) == "forged"
    assert judge(verifier(), genuine, body[:place]) == "forged"


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_no_guessed_signature_is_accepted(mac):
    body = event()
    guessed = {**headers(body, at=NOW), "X-MLflow-Signature": "v1," + base64.b64encode(mac).decode()}
    assert judge(verifier(), guessed, body) == "forged"


def test_any_current_secret_counts_and_no_former_one():
    body = event()
    old, new = "the-old-secret-0123456789", "the-new-secret-0123456789"
    assert judge(verifier(new, old), headers(body, at=NOW, secret=old), body) == ""
    assert judge(verifier(new, old), headers(body, at=NOW, secret=new), body) == ""
    assert judge(verifier(new), headers(body, at=NOW, secret=old), body) == "forged"


def test_comparison_takes_every_secret_and_constant_time(monkeypatch):
    compared = []
    genuine = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or genuine(a, b))
    body = event()
    assert judge(verifier(SECRET, "another-secret-0123456789"), headers(body, at=NOW), body) == ""
    assert compared == [(32, 32), (32, 32)]


# -- where secrets come from -----------------------------------------------------------


def test_secrets_of_environment_and_files_count(tmp_path):
    (tmp_path / "new").write_text("the-secret-of-a-file-01\n")
    environment = {"QUARANTINE_HOOK_SECRET": "s" * 16, "QUARANTINE_HOOK_SECRET_PREVIOUS": "t" * 16}
    secrets = Secrets.from_environment([tmp_path / "new"], environment)
    assert list(secrets()) == [b"s" * 16, b"t" * 16, b"the-secret-of-a-file-01"]


def test_changed_file_counts_without_a_restart(tmp_path):
    now = [0.0]
    path = tmp_path / "secret"
    path.write_text("first-secret-0123456789")
    secrets = Secrets(files=[path], clock=lambda: now[0])
    path.write_text("second-secret-0123456789-and-longer")
    now[0] = 2.0
    assert list(secrets()) == [b"second-secret-0123456789-and-longer"]


@pytest.mark.parametrize("broken", ["", "short", None])
def test_broken_rotation_keeps_the_known_secret(tmp_path, broken):
    now = [0.0]
    path = tmp_path / "secret"
    path.write_text("first-secret-0123456789")
    secrets = Secrets(files=[path], clock=lambda: now[0])
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    now[0] = 2.0
    assert list(secrets()) == [b"first-secret-0123456789"]


@pytest.mark.parametrize(
    ("fixed", "content"), [((), None), (("short",), None), ((), ""), ((), "short"), ((), b"\xff" * 20)]
)
def test_no_usable_secret_is_refused_at_the_start(tmp_path, fixed, content):
    files = []
    if content is not None:
        files = [tmp_path / "secret"]
        files[0].write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refused:
        Secrets(fixed, files)
    assert "short" not in str(refused.value).replace("too short", "")


def test_missing_file_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match="not usable"):
        Secrets(files=[tmp_path / "absent"])


def test_verifying_is_cheap():
    body, verify = event(), verifier()
    genuine = {name.lower(): value for name, value in headers(body, at=NOW).items()}
    started = time.process_time()
    for _ in range(1000):
        verify.verify(verify.envelope(genuine), body)
    assert time.process_time() - started < 10.0  # it takes a tenth of a second
