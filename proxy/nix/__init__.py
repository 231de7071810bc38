"""The words of the Nix binary-cache protocol, as values: no files, no network, no clock.

Bottom to top: `hashes`, then `store_path`, `signature`, `decoders` and `cache_info`, then
`nar_name` and `nar`, then `narinfo`.

Everything that comes from outside is parsed into a value that cannot be wrong, or refused with
`proxy.errors.ParseError`; what arrived but is not what was signed is refused with a
`proxy.errors.TrustError`.
"""
