"""A folder that is a binary cache, and what is derived from it.

Outside of ``.state`` the folder is at every instant, also after a crash, a valid ``file://`` binary cache
that Nix reads without us; a file appears there under its final name only when it is complete, verified
and on the disk. Everything inside of ``.state`` can be deleted.
"""
