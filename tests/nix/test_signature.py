"""Tests of `proxy.nix.signature`."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.errors import ParseError, SignatureError
from proxy.nix.signature import Keyring, PublicKey, SecretKey, Signature
from tests.nix.strategies import secret_keys

ALICE = SecretKey.from_seed("alice-1", b"a" * 32)
BOB = SecretKey.from_seed("bob-1", b"b" * 32)
OTHER_ALICE = SecretKey.from_seed("alice-1", b"o" * 32)
MESSAGE = b"1;/nix/store/..."


def b64(size: int) -> str:
    """Return ``size`` bytes in base64."""
    return base64.b64encode(bytes(size)).decode()


def test_rfc8032_vector() -> None:
    """Keys and signatures are those of RFC 8032 §7.1, test 2."""
    seed = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    secret = SecretKey.parse(f"key-1:{base64.b64encode(seed + public).decode()}")
    assert secret.public_key == PublicKey("key-1", public)
    assert secret.sign(b"\x72").value.hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


@given(secret_keys, st.binary())
def test_round_trip(secret: SecretKey, message: bytes) -> None:
    """Keys and signatures read back, and what a key signed its other half verifies."""
    assert SecretKey.parse(str(secret)) == secret
    public = PublicKey.parse(str(secret.public_key))
    signature = Signature.parse(str(secret.sign(message)))
    assert public.verifies(message, signature)
    assert Keyring([public]).verify(message, [signature]) == public


@given(secret_keys, st.binary(min_size=1), st.data())
def test_any_change_breaks_a_signature(
    secret: SecretKey, message: bytes, data: st.DataObject
) -> None:
    """One bit flipped in the message or in the signature, and it no longer verifies."""
    value = secret.sign(message).value
    bit = data.draw(st.integers(0, 8 * (len(message) + len(value)) - 1))
    both = bytearray(message + value)
    both[bit // 8] ^= 1 << bit % 8
    changed = Signature(secret.name, bytes(both[len(message) :]))
    assert not secret.public_key.verifies(bytes(both[: len(message)]), changed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "no colon", id="empty"),
        pytest.param("garbage", "no colon", id="no colon"),
        pytest.param(f":{b64(64)}", "name is empty", id="no name"),
        pytest.param(f"a b:{b64(64)}", "white space", id="space in the name"),
        pytest.param(f"a\x1b[31m:{b64(64)}", "control", id="escape sequence in the name"),
        pytest.param("a:", "0 bytes instead of 64", id="no value"),
        pytest.param(f"a:{b64(63)}", "63 bytes instead of 64", id="too short"),
        pytest.param(f"a:{b64(65)}", "65 bytes instead of 64", id="too long"),
        pytest.param(f"a:{b64(64)}\r", "not base64", id="carriage return"),
        pytest.param(f"a:b:{b64(64)}", "not base64", id="second colon"),
        pytest.param(f"a:{b64(64)}é", "not base64", id="beyond ASCII"),
    ],
)
def test_signature_refuses(text: str, reason: str) -> None:
    """What is no signature is refused, with the reason."""
    with pytest.raises(ParseError, match=reason):
        Signature.parse(text)


def test_padding_may_be_missing() -> None:
    """Nix reads base64 without padding, and so do we."""
    text = str(ALICE.sign(MESSAGE))
    assert Signature.parse(text.rstrip("=")) == Signature.parse(text)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_public_key_has_32_bytes(size: int) -> None:
    """A public key of another length is refused."""
    with pytest.raises(ParseError, match=f"public key: {size} bytes instead of 32"):
        PublicKey.parse(f"a:{b64(size)}")


def test_secret_key_halves_belong_together() -> None:
    """A secret key whose public half is another's is refused."""
    mixed = SecretKey("alice-1", ALICE.key[:32] + BOB.key[32:])
    with pytest.raises(ParseError, match="does not belong"):
        SecretKey.parse(str(mixed))


def test_secret_key_stays_out_of_logs() -> None:
    """The representation of a secret key shows its name only."""
    assert repr(ALICE) == "SecretKey(name='alice-1')"


@given(st.text())
def test_parsers_survive_anything(text: str) -> None:
    """Any text is read or refused, never a crash."""
    for parse in (Signature.parse, PublicKey.parse, SecretKey.parse):
        for candidate in (text, f"a:{text}"):
            with contextlib.suppress(ParseError):
                assert parse(str(parse(candidate))) == parse(candidate)


@pytest.mark.parametrize(
    "signatures",
    [
        pytest.param([ALICE.sign(MESSAGE)], id="the only one"),
        pytest.param([BOB.sign(MESSAGE), ALICE.sign(MESSAGE)], id="after an unknown signer"),
        pytest.param(
            [ALICE.sign(b"x"), ALICE.sign(MESSAGE)], id="after an invalid one of the same"
        ),
        pytest.param([OTHER_ALICE.sign(MESSAGE), ALICE.sign(MESSAGE)], id="after a name taken"),
        pytest.param([Signature("alice-1", b"x"), ALICE.sign(MESSAGE)], id="after a short one"),
    ],
)
def test_one_valid_signature_is_enough(signatures: list[Signature]) -> None:
    """One valid signature of a trusted key is enough, wherever it stands."""
    assert Keyring([ALICE.public_key]).verify(MESSAGE, signatures) == ALICE.public_key


def test_any_trusted_key_will_do() -> None:
    """Trust is a set of keys; the key that verified is returned."""
    keyring = Keyring([ALICE.public_key, BOB.public_key])
    assert keyring.verify(MESSAGE, [BOB.sign(MESSAGE)]) == BOB.public_key
    assert keyring.names == ("alice-1", "bob-1")
    assert repr(keyring) == "Keyring(alice-1, bob-1)"


def test_first_key_of_a_name_wins() -> None:
    """Of two keys with one name only the first is trusted, as in Nix."""
    keyring = Keyring([ALICE.public_key, OTHER_ALICE.public_key])
    assert keyring.verify(MESSAGE, [ALICE.sign(MESSAGE)]) == ALICE.public_key
    with pytest.raises(SignatureError):
        keyring.verify(MESSAGE, [OTHER_ALICE.sign(MESSAGE)])


@pytest.mark.parametrize(
    ("keys", "signatures", "text"),
    [
        pytest.param([ALICE], [], "signed by nobody; trusted: alice-1", id="unsigned"),
        pytest.param(
            [], [ALICE.sign(MESSAGE)], "signed by alice-1; trusted: no key", id="nobody is trusted"
        ),
        pytest.param(
            [ALICE],
            [BOB.sign(MESSAGE), BOB.sign(b"x")],
            "signed by bob-1; trusted: alice-1",
            id="a stranger",
        ),
        pytest.param(
            [ALICE, BOB],
            [ALICE.sign(b"x")],
            "the signature of alice-1 does not verify; trusted: alice-1, bob-1",
            id="another text",
        ),
        pytest.param(
            [ALICE],
            [Signature("alice-1", BOB.sign(MESSAGE).value)],
            "the signature of alice-1 does not verify; trusted: alice-1",
            id="a stranger under a trusted name",
        ),
    ],
)
def test_refusal_says_who_signed_and_who_is_trusted(
    keys: list[SecretKey], signatures: list[Signature], text: str
) -> None:
    """The error names the signers and the trusted keys, so that the operator can act."""
    keyring = Keyring(secret.public_key for secret in keys)
    with pytest.raises(SignatureError) as caught:
        keyring.verify(MESSAGE, signatures)
    assert str(caught.value) == text


@given(secret_keys, secret_keys, st.binary())
def test_strangers_are_never_trusted(trusted: SecretKey, other: SecretKey, message: bytes) -> None:
    """Nobody's signature passes for another's, whatever name it claims."""
    assume(trusted.key != other.key)
    forged = Signature(trusted.name, other.sign(message).value)
    with pytest.raises(SignatureError):
        Keyring([trusted.public_key]).verify(message, [forged])
