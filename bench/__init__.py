"""Benchmarks: how the proxy compares with nginx, and with no proxy at all. See README.md."""
