"""A process of its own that carries small NARs from upstreams to their place in the store.

A closure is thousands of them, and each takes a dozen system calls on half a dozen threads: in the process
that serves clients all of these would ask for the same interpreter, and hand it to and fro between cores.
"""
