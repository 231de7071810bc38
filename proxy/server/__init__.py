"""HTTP to clients: requests to resources, answers and errors to statuses, files to sockets."""
