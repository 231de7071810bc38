"""How commands reach the running daemon: a Unix socket, and JSON a line each.

A command sends ``{"command": NAME, "arguments": {…}}``. The daemon answers with any number of
``{"progress": {…}}``, and ends with ``{"result": {…}}`` or ``{"error": TEXT}``. A client that leaves before
that has its command cancelled. What the commands are is for whoever runs the server to say.
"""
