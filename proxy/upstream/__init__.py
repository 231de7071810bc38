"""One remote binary cache over HTTP: how to ask it, and how to recognise an answer that is none."""
