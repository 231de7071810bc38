"""Whose signatures count for what is kept already: of its upstream nobody may know any more."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.errors import SignatureError, TrustError
from proxy.nix import narinfo
from proxy.nix.narinfo import NarInfo, VerifiedNarInfo
from proxy.nix.signature import Keyring
from proxy.nix.store_path import HashPart


class Trust:
    """Several keyrings, any of which will do.

    Args:
        keyrings: None for somebody who is believed without signatures.
    """

    def __init__(self, keyrings: Iterable[Keyring | None]) -> None:
        self._keyrings = tuple(keyrings)

    def verify(self, info: NarInfo, hash_part: HashPart) -> VerifiedNarInfo:
        """Let through what is about the path and signed by a trusted key.

        Raises:
            TrustError: It is not.
        """
        return narinfo.verify_by_any(info, hash_part=hash_part, keyrings=self._keyrings)

    def is_changed(self, info: NarInfo, error: TrustError) -> bool:
        """Tell what has changed since it was signed from what nobody signs who is trusted.

        Args:
            info: What did not verify.
            error: Why.
        """
        if not isinstance(error, SignatureError):
            return True
        trusted = {name for keyring in self._keyrings if keyring for name in keyring.names}
        return any(signature.key_name in trusted for signature in info.signatures)
