"""Ed25519 keys and signatures as Nix writes them, and the keyring that trusts.

A key or signature is ``<name>:<base64>``; the name is everything before the first colon
(``src/libutil/signature/local-keys.cc``). A signature counts if a key of *that name* is trusted and
verifies it. Names with white space or control characters are refused: nobody has such a key, and
the names go to logs and error messages.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Self

import nacl.exceptions
import nacl.signing

from proxy.errors import ParseError, SignatureError
from proxy.nix.hashes import base64_decode

_SIGNATURE_SIZE: Final = 64
_PUBLIC_SIZE: Final = 32
_SEED_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class Signature:
    """A detached signature, and the name of the key that it claims to be from.

    Attributes:
        key_name: Such as ``cache.nixos.org-1``.
        value: 64 bytes.
    """

    key_name: str
    value: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``<key name>:<base64 of 64 bytes>``.

        Raises:
            ParseError: If it is not that.
        """
        return cls(*_parse_named("signature", text, _SIGNATURE_SIZE))

    def __str__(self) -> str:
        """Write it as narinfos do."""
        return _format_named(self.key_name, self.value)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that verifies.

    Attributes:
        name: Such as ``cache.nixos.org-1``.
        key: 32 bytes.
    """

    name: str
    key: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``<name>:<base64 of 32 bytes>``, as in Nix's ``trusted-public-keys``.

        Raises:
            ParseError: If it is not that.
        """
        return cls(*_parse_named("public key", text, _PUBLIC_SIZE))

    def verifies(self, message: bytes, signature: Signature) -> bool:
        """Tell whether this key made ``signature`` over ``message``; names are not compared."""
        try:
            nacl.signing.VerifyKey(self.key).verify(message, signature.value)
        except (nacl.exceptions.BadSignatureError, nacl.exceptions.ValueError):
            return False
        return True

    def __str__(self) -> str:
        """Write it as Nix's ``trusted-public-keys`` wants it."""
        return _format_named(self.name, self.key)


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signs.

    Attributes:
        name: Such as ``cache.nixos.org-1``.
        key: 64 bytes: the seed, then the public half (the layout of libsodium).
    """

    name: str
    key: bytes = field(repr=False)

    @classmethod
    def from_seed(cls, name: str, seed: bytes) -> Self:
        """Make the key that the 32 bytes of ``seed`` stand for."""
        return cls(name, seed + bytes(nacl.signing.SigningKey(seed).verify_key))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``<name>:<base64 of 64 bytes>``, as ``nix key generate-secret`` writes it.

        Raises:
            ParseError: If it is not that, or its two halves do not belong together.
        """
        secret = cls(*_parse_named("secret key", text, _SEED_SIZE + _PUBLIC_SIZE))
        if secret != cls.from_seed(secret.name, secret.key[:_SEED_SIZE]):
            raise ParseError("secret key", "the public half does not belong to the secret one")
        return secret

    def sign(self, message: bytes) -> Signature:
        """Sign ``message``, such as a narinfo's fingerprint."""
        signed = nacl.signing.SigningKey(self.key[:_SEED_SIZE]).sign(message)
        return Signature(self.name, signed.signature)

    @property
    def public_key(self) -> PublicKey:
        """The key that verifies what this one signs."""
        return PublicKey(self.name, self.key[_SEED_SIZE:])

    def __str__(self) -> str:
        """Write it in full, as a key file holds it: keep it out of logs."""
        return _format_named(self.name, self.key)


class Keyring:
    """The public keys that are trusted.

    Args:
        keys: Of two with the same name the first counts, as in Nix (``src/libstore/keys.cc``).
    """

    def __init__(self, keys: Iterable[PublicKey]) -> None:
        self._keys: dict[str, PublicKey] = {}
        for key in keys:
            self._keys.setdefault(key.name, key)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the trusted keys, in the order given."""
        return tuple(self._keys)

    def verify(self, fingerprint: bytes, signatures: Iterable[Signature]) -> PublicKey:
        """Return the first trusted key that verifies one of ``signatures``.

        Raises:
            SignatureError: If none does; says who signed and who is trusted.
        """
        tried = tuple(signatures)
        for signature in tried:
            key = self._keys.get(signature.key_name)
            if key is not None and key.verifies(fingerprint, signature):
                return key
        raise SignatureError(self._refusal(tried))

    def _refusal(self, signatures: tuple[Signature, ...]) -> str:
        signers = dict.fromkeys(signature.key_name for signature in signatures)
        forged = ", ".join(name for name in signers if name in self._keys)
        trusted = ", ".join(self._keys) or "no key"
        if forged:
            return f"the signature of {forged} does not verify; trusted: {trusted}"
        return f"signed by {', '.join(signers) or 'nobody'}; trusted: {trusted}"

    def __repr__(self) -> str:
        """Show the names."""
        return f"Keyring({', '.join(self._keys)})"


def _parse_named(what: str, text: str, size: int) -> tuple[str, bytes]:
    name, colon, encoded = text.partition(":")
    if not colon:
        raise ParseError(what, "no colon between name and value")
    if not name or " " in name or not name.isprintable():
        raise ParseError(what, "the name is empty or has white space or control characters")
    try:
        value = base64_decode(encoded)
    except ParseError as error:
        raise ParseError(what, error.reason) from None
    if len(value) != size:
        raise ParseError(what, f"{len(value)} bytes instead of {size}")
    return name, value


def _format_named(name: str, value: bytes) -> str:
    return f"{name}:{base64.b64encode(value).decode()}"
