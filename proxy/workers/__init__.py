"""Several processes that accept clients, and the core behind them that has everything else.

Each worker has a listening socket of its own, serves what is in the store by itself, and asks the core for
all else. The core has the store's lock, the index, the upstreams, and every download.
"""
