"""Where each thing lies: the same for those in a hurry."""

from __future__ import annotations

from pathlib import Path

from proxy.store.layout import Layout
from tests.closures import StoreEntry
from tests.store.publishing import nar_name

ENTRY = StoreEntry.make("hello-1.0")


def test_names_as_texts() -> None:
    """A name that is a text is that of the path."""
    layout = Layout(Path("/srv/cache"))
    name = nar_name(ENTRY)
    assert layout.narinfo_name(name.hash_part) == str(layout.narinfo(name.hash_part))
    assert layout.nar_name(name) == str(layout.nar(name))
    remembered = layout.remembered_narinfo("cache.example.org", name.hash_part)
    assert layout.remembered_narinfo_name("cache.example.org", name.hash_part) == str(remembered)
